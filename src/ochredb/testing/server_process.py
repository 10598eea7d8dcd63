"""A real server in a process of its own, on a free loopback port.

Tests of the wire, crash rounds, the conformance run and the benchmark all need the same few steps:
pick a port, start a command, wait until it answers, stop it, look at how it ended. The command is
an argument, so the same class also runs a peer's server.

    with ochredb_server(Path(directory)) as server:
        httpx.get(server.url + "/api/v2/heartbeat")
    assert server.returncode == 0

Invariants: a started process is always waited for; a server that does not come up raises
`ServerProcessError` with the end of its output, never a bare time-out.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

HOST = "127.0.0.1"
OUTPUT_TAIL_BYTES = 4000
# One thread per native library: on a small machine their spinning workers disturb each other, and
# measurements with them.
ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
_PORTS = range(15_000, 32_000)
_RANDOM = random.SystemRandom()
_given: set[int] = set()


class ServerProcessError(AssertionError):
    """The server did not start, or did not stop; the message ends with its last output."""


def free_port() -> int:
    """Return a TCP port on loopback that nobody listens on, another one each time.

    Not one of those from which outgoing connections draw: one of these would take it between two
    lives of a server.
    """
    while True:
        port = _RANDOM.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            if port not in _given:
                _given.add(port)
                return port


class ServerProcess:
    """One server process: `command` must make it listen on `port` of 127.0.0.1.

    `output_path` receives stdout and stderr. `environment` is added to this process's own.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        output_path: Path,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command = list(command)
        self.host = HOST
        self.port = port
        self.url = f"http://{HOST}:{port}"
        self.output_path = output_path
        self.returncode: int | None = None
        # As a user starts it: that its libraries have one thread each is its own business.
        inherited = {name: value for name, value in os.environ.items() if name not in ONE_THREAD}
        self._environment = {**inherited, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def start(self, timeout_s: float = 60.0) -> ServerProcess:
        """Start the process and wait until it answers a heartbeat. Raises ServerProcessError."""
        assert self._process is None, "the server runs already"
        self.output_path.parent.mkdir(parents=True, exist_ok=True)
        self._output = self.output_path.open("ab")
        self.returncode = None
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=self._environment,
        )
        deadline_s = time.monotonic() + timeout_s
        while not self.answers():
            if self._process.poll() is not None:
                code = self._reap()
                raise ServerProcessError(
                    f"the server ended with {code} at start\n{self.output_tail()}"
                )
            if time.monotonic() > deadline_s:
                self.kill()
                raise ServerProcessError(f"no answer within {timeout_s:g} s\n{self.output_tail()}")
            time.sleep(0.02)
        return self

    def answers(self) -> bool:
        """Return whether the server answers a heartbeat now."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=5)
        try:
            connection.request("GET", "/api/v2/heartbeat")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def stop(self, timeout_s: float = 60.0) -> int:
        """Ask the server to end (SIGTERM), wait, return its exit code; or ServerProcessError."""
        process = self._process
        assert process is not None, "the server was not started"
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerProcessError(
                f"still running {timeout_s:g} s after SIGTERM\n{self.output_tail()}"
            ) from None
        return self._reap()

    def kill(self) -> int:
        """End the server at once (SIGKILL) and return its exit code, -9 unless it was faster."""
        assert self._process is not None, "the server was not started"
        self._process.kill()
        return self._reap()

    def _reap(self) -> int:
        assert self._process is not None
        assert self._output is not None
        self.returncode = self._process.wait()
        self._process = None
        self._output.close()
        self._output = None
        return self.returncode

    @property
    def running(self) -> bool:
        """Whether the process was started, and not yet stopped or killed through this object."""
        return self._process is not None

    def output_tail(self) -> str:
        """Return the last few kilobytes the server printed."""
        with contextlib.suppress(FileNotFoundError):
            return self.output_path.read_bytes()[-OUTPUT_TAIL_BYTES:].decode(errors="replace")
        return ""

    def __enter__(self) -> ServerProcess:
        return self if self.running else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.running:
            self.stop()


def ochredb_server(
    directory: Path,
    *options: str,
    port: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> ServerProcess:
    """Return a server of ours, not yet started, that keeps its data under `directory`.

    `options` are further arguments of `ochredb run`, for example "--allow-reset". Its output goes
    to a file beside `directory`, because everything inside belongs to the engine.
    """
    port = port or free_port()
    # The entry point of the `ochredb` console script, by this very interpreter, so that a server
    # under test never comes from another installation on the PATH.
    command = [
        sys.executable,
        "-c",
        "from ochredb_node.cli import main; raise SystemExit(main())",
        *("run", "--path", str(directory), "--host", HOST, "--port", str(port), *options),
    ]
    output_path = directory.with_name(directory.name + ".server.log")
    return ServerProcess(command, port, output_path, environment=environment)
