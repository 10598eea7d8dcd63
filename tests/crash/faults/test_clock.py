"""The wall clock of a real server is set ahead and back: nothing is lost, refused or kept (I6)."""

from __future__ import annotations

import time
from pathlib import Path

from .conftest import Connect
from .support import Faults, Written, eager_server, part_files, wait_until

DAY_S = 86_400.0


def test_the_clock_is_set_under_a_running_server(tmp_path: Path, connect: Connect) -> None:
    data = tmp_path / "data"
    data.mkdir()
    faults = Faults(tmp_path, data)
    with eager_server(data, tmp_path / "log", environment=faults.environment) as server:
        client = connect(server)
        kept = Written(client, client.create("kept"))
        dropped = Written(client, client.create("dropped"))
        for off_s in (0.0, DAY_S, -DAY_S, 30 * DAY_S, 0.0):
            faults.clock_is_off(off_s)
            for size in (10, 600_000):
                assert kept.add(size).status == 201
                assert dropped.add(10).status == 201
            kept.check()
            time.sleep(0.8)  # Time for background work to believe it.
            kept.check()
            dropped.check()
        assert client.call("DELETE", "collections/dropped").status == 200
        wait_until(lambda: len(part_files(data)) == 1, "what was replaced is gone")
        kept.check()
        assert server.stop() == 0
        faults.clock_is_off(-10 * DAY_S)
        server.start()
        kept.client = connect(server)
        kept.check()
        assert kept.add(10).status == 201
        kept.check()
        log = (tmp_path / "log").read_text()
        assert "Traceback" not in log, log
