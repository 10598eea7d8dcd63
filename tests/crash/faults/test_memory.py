"""Little memory: a request or a job fails with a clear error, and the process goes on (I9, I12)."""

from __future__ import annotations

import resource
import time
from collections import Counter
from pathlib import Path

from ochredb.testing.server_process import ServerProcess

from .conftest import Connect
from .support import GONE, Client, Written, eager_server, part_files, wait_until

DIMENSION = 1_000


def address_space(server: ServerProcess) -> int:
    """Bytes that the process has mapped."""
    pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def leave(server: ServerProcess, more: int | None) -> None:
    """Let it map so many bytes more than it has; None: as many as it likes."""
    hard = resource.prlimit(server.pid, resource.RLIMIT_AS)[1]
    soft = hard if more is None else address_space(server) + more
    resource.prlimit(server.pid, resource.RLIMIT_AS, (soft, hard))


def test_a_server_without_memory_refuses_and_goes_on(tmp_path: Path, connect: Connect) -> None:
    data = tmp_path / "data"
    before = f"ulimit -Sv {64 << 20}"  # In KiB, no limit at first; but one that is known.
    with eager_server(data, tmp_path / "log", before=before) as server:
        client = connect(server)
        written = Written(client, client.create("records"))
        for size in (10, 100_000, 600_000):
            assert written.add(size).status == 201
        written.check()
        statuses: Counter[int] = Counter()
        for more in (64 << 20, 16 << 20, 4 << 20):
            leave(server, more)
            for size in (10, 100_000, 600_000, 8_000_000):
                statuses[_status(written, size)] += 1
            for body in ({"include": ["documents"]}, {"where_document": {"$contains": "x"}}):
                path = f"collections/{written.collection}/get"
                statuses[_read(client, path, body)] += 1
            time.sleep(0.5)  # Background work has its turn.
        print(f"answers: {dict(statuses)}")
        # 0: the connection broke, as it may where not even the request can be held.
        assert set(statuses) <= {200, 201, 503, 0}
        assert statuses[503] > 0
        leave(server, None)
        wait_until(lambda: _status(written, 10) == 201, "writes resume")
        for size in (10, 100_000, 600_000):
            assert written.add(size).status == 201
        wait_until(lambda: part_files(data) != [], "background work resumes", limit_s=90)
        _resolve(written)
        written.check()
        log = (tmp_path / "log").read_text()
        assert "quarantine" not in log and "damage" not in log, log
        assert server.stop() == 0
        server.start()
        written.client = connect(server)
        written.check()


def _status(written: Written, size: int) -> int:
    try:
        return written.add(size).status
    except GONE:
        return 0


def _read(client: Client, path: str, body: object) -> int:
    try:
        return client.call("POST", path, body).status
    except GONE:
        return 0


def _resolve(written: Written) -> None:
    """Of a write without an answer, either may be true; of all others it is known."""
    path = f"collections/{written.collection}/get"
    got = written.client.call("POST", path, {"include": ["documents"]})
    assert got.status == 200
    found = dict(zip(got.body["ids"], got.body["documents"], strict=True))
    for name in found.keys() - written.documents.keys():
        assert name in written.unanswered, f"{name} was refused, and is there"
        written.documents[name] = found[name]
