"""ServerProcess, on stand-ins of a few lines: how starts, stops and failures are reported."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from ochredb.testing.server_process import ServerProcess, ServerProcessError, free_port

HONEST = """
    import http.server, signal, sys

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[2])))
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
DEAF = HONEST.replace("lambda *_: sys.exit(int(sys.argv[2]))", "signal.SIG_IGN")


def standin(tmp_path: Path, source: str, *arguments: str) -> ServerProcess:
    port = free_port()
    command = [sys.executable, "-c", textwrap.dedent(source), str(port), *arguments]
    return ServerProcess(command, port, tmp_path / "logs" / "server.log")


def test_it_runs_between_enter_and_exit_and_keeps_the_exit_code(tmp_path: Path) -> None:
    server = standin(tmp_path, HONEST, "3")
    with server:
        assert server.running
        assert server.answers()
        assert server.pid > 0
    assert not server.running
    assert not server.answers()
    assert server.returncode == 3
    with server.start():  # Again, on the same port.
        assert server.answers()


def test_no_port_is_given_twice() -> None:
    ports = [free_port() for _ in range(500)]
    assert len(set(ports)) == len(ports)


def test_a_start_that_fails_says_what_the_server_said(tmp_path: Path) -> None:
    server = standin(tmp_path, "raise SystemExit('the disk is full')")
    with pytest.raises(ServerProcessError, match="ended with 1 at start\nthe disk is full"):
        server.start()
    assert server.returncode == 1


def test_a_server_that_never_answers_is_killed(tmp_path: Path) -> None:
    server = standin(tmp_path, "import time; time.sleep(600)")
    with pytest.raises(ServerProcessError, match=r"no answer within 0\.5 s"):
        server.start(timeout_s=0.5)
    assert server.returncode == -9


def test_a_server_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    server = standin(tmp_path, DEAF).start()
    with pytest.raises(ServerProcessError, match=r"still running 0\.5 s after SIGTERM"):
        server.stop(timeout_s=0.5)
    assert server.returncode == -9
