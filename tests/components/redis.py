"""A Redis server of our own, as a process on a free port of the loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from ochredb.testing.server_process import free_port

_START_WAIT_S = 10.0


class RedisServer:
    """What it holds is gone when it ends, as hints may be."""

    def __init__(self, binary: str, root: Path, port: int) -> None:
        self._binary, self._root = binary, root
        self.host, self.port = "127.0.0.1", port
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, root: Path) -> RedisServer:
        """Skips the test where there is no redis-server."""
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.skip("NOT TESTED: redis-server is not installed (apt-get install redis-server)")
        root.mkdir(parents=True, exist_ok=True)
        server = cls(binary, root, free_port())
        server.restart()
        return server

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    def client(self) -> Any:
        import redis

        return redis.Redis.from_url(self.url, protocol=2)

    def restart(self) -> None:
        """Start it again on the same port, empty."""
        self.stop()
        command = [
            self._binary, "--port", str(self.port), "--bind", self.host, "--dir", str(self._root),
            "--save", "", "--appendonly", "no", "--logfile", str(self._root / "redis.log"),
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + _START_WAIT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._root / "redis.log").read_text())
            time.sleep(0.01)

    def flush(self) -> None:
        """Forget everything, scripts too."""
        with self.client() as client:
            client.flushall()
            client.script_flush()

    def pause(self) -> None:
        """It takes connections and answers nothing, until `resume`."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait(_START_WAIT_S)
            self.process = None

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 1) as s:
            s.sendall(b"PING\r\n")
            return s.recv(16) == b"+PONG\r\n"
        return False
