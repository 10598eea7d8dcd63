"""The wall clock of a real server is set ahead and back: nothing is lost, refused or kept (I6)."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from .conftest import Connect
from .support import Faults, Written, eager_server, wait_until

DAY_S = 86_400.0


def garbage(data: Path) -> set[str]:
    """Objects that nothing refers to: by the catalog, or because it does not know them."""
    connection = sqlite3.connect(f"file:{data}/ochredb.sqlite3?mode=ro", uri=True)
    try:
        rows = connection.execute("SELECT key, unreferenced_us FROM objects").fetchall()
    finally:
        connection.close()
    objects = data / "objects"
    files = {
        str(path.relative_to(objects))
        for kind in ("parts", "fragments", "deleted")
        for path in (objects / kind).rglob("*")
        if path.is_file()
    }
    kept = {key for key, unreferenced_us in rows if unreferenced_us is None}
    return (files | {key for key, _ in rows}) - kept


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
        wait_until(lambda: garbage(data) == set(), "what nothing refers to is gone")
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
