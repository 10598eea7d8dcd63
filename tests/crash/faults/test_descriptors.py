"""Few file descriptors: a server refuses what is too much, never spins, and goes on (I9)."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from pathlib import Path

from ochredb.testing.server_process import ServerProcess

from .conftest import Connect
from .support import GONE, Client, Written, eager_server, process_time_s, wait_until

LIMIT = 160


def limit_descriptors(server: ServerProcess, count: int) -> None:
    hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (count, hard))


def highest_descriptor(server: ServerProcess) -> int:
    return max(int(path.name) for path in Path(f"/proc/{server.pid}/fd").iterdir())


def test_connections_leave_descriptors_for_files(tmp_path: Path, connect: Connect) -> None:
    """The limit is the process's from its start: more clients than it allows are refused."""
    command = f"ulimit -n {LIMIT}"
    server = eager_server(tmp_path / "data", tmp_path / "server.log", before=command)
    with server, contextlib.ExitStack() as stack:
        written = Written(connect(server), connect(server).create("records"))
        assert written.add(600_000).status == 201
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            for _ in range(2 * LIMIT)
        ]
        # Those that are connected go on, reading and writing files.
        for size in (10, 600_000):
            assert written.add(size).status == 201
        written.check()
        # Who comes now is told so, at once.
        wait_until(lambda: _refused(server) == 503, "a new client is refused")
        used = process_time_s(server.pid)
        time.sleep(2)
        assert process_time_s(server.pid) - used < 1.0, "the accepting spins"
        for one in idle:
            one.close()
        wait_until(lambda: _refused(server) == 200, "new clients are served again")
        written.check()
        assert server.stop() == 0


def _refused(server: ServerProcess) -> int:
    """The status that a new client gets; 0: it is not even answered."""
    client = Client(server.port, timeout_s=2)
    try:
        return client.call("GET", "/api/v2/heartbeat").status
    except GONE:
        return 0
    finally:
        client.close()


def test_without_any_descriptor_left_a_server_goes_on(tmp_path: Path, connect: Connect) -> None:
    """The limit falls under a running server: nothing can be opened, not even to accept."""
    with eager_server(tmp_path / "data", tmp_path / "server.log") as server:
        client = connect(server)
        written = Written(client, client.create("records"))
        assert written.add(600_000).status == 201
        assert written.add(10).status == 201
        written.check()
        limit_descriptors(server, highest_descriptor(server) + 1)
        statuses = [written.add(size).status for size in (10, 600_000, 10, 600_000)]
        assert set(statuses) <= {201, 503}
        assert client.call("GET", f"collections/{written.collection}/count").status in (200, 503)
        # Somebody waits to be accepted meanwhile. (Below the lowest descriptor that is open the
        # event loop would spin: libuv lets one go to turn a client away, and cannot use it.)
        with socket.create_connection(("127.0.0.1", server.port)):
            used = process_time_s(server.pid)
            time.sleep(3)
            assert process_time_s(server.pid) - used < 1.5, "it spins"
        limit_descriptors(server, 1024)
        wait_until(lambda: _refused(server) == 200, "new clients are accepted again")
        written.check()
        for size in (10, 600_000):
            assert written.add(size).status == 201
        written.check()
        assert server.stop() == 0
