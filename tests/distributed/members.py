"""One process of a cluster: its ports, its environment, its log, its lives.

Who starts it is a `Launcher`: `Commands` runs `ochredb serve` as anybody would; `Forks` has a
process that has imported everything fork it, which takes milliseconds instead of a second.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ochredb.testing.server_process import ONE_THREAD
from tests.crash.nursery import Nursery

START_S_MAX = 60.0
STOP_S_MAX = 60.0
_TAIL_BYTES = 6000


class MemberFailed(AssertionError):
    """A process did not start, or did not end as it should; the text ends with its log."""


class Launcher(Protocol):
    def spawn(self, arguments: Sequence[str], environment: Mapping[str, str], log: str) -> int:
        """Start a process; returns its id. Its output is appended to `log`."""
        ...

    def signal(self, pid: int, number: signal.Signals) -> None:
        """A process that was killed (SIGKILL) is gone when this returns."""
        ...

    def code(self, pid: int) -> int | None:
        """The exit code of a process that has ended."""
        ...

    def close(self) -> None:
        """Kill whatever still runs."""
        ...


class Commands:
    """`ochredb serve` by this very interpreter."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def spawn(self, arguments: Sequence[str], environment: Mapping[str, str], log: str) -> int:
        command = [sys.executable, "-m", "tests.distributed.process", *arguments]
        with open(log, "ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **ONE_THREAD, **environment},
                cwd=Path(__file__).resolve().parents[2],
                start_new_session=True,
            )
        self._processes[process.pid] = process
        return process.pid

    def signal(self, pid: int, number: signal.Signals) -> None:
        process = self._processes[pid]
        if process.poll() is None:
            process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait()

    def code(self, pid: int) -> int | None:
        return self._processes[pid].poll()

    def close(self) -> None:
        for pid in self._processes:
            self.signal(pid, signal.SIGKILL)


class Forks:
    """By `tests.distributed.process`, run as a program. Thread-safe."""

    def __init__(self, log: str) -> None:
        self._nursery = Nursery("tests.distributed.process", log)
        self._lock = threading.Lock()
        self._codes: dict[int, int] = {}

    def spawn(self, arguments: Sequence[str], environment: Mapping[str, str], log: str) -> int:
        order: dict[str, Any] = {"arguments": arguments, "environment": environment, "log": log}
        pid: int = self._nursery.ask(do="spawn", **order)["pid"]
        with self._lock:
            self._codes.pop(pid, None)
        return pid

    def run(self, order: dict[str, Any]) -> int:
        """Another kind of process: see `process.run`."""
        pid: int = self._nursery.ask(do="spawn", **order)["pid"]
        return pid

    def signal(self, pid: int, number: signal.Signals) -> None:
        with self._lock:
            if pid in self._codes or self._look(pid) is not None:
                return
            answer = self._nursery.ask(do="kill", pid=pid, signal=number.name)
            if number == signal.SIGKILL:
                self._codes[pid] = answer["code"]

    def code(self, pid: int) -> int | None:
        with self._lock:
            return self._look(pid)

    def _look(self, pid: int) -> int | None:
        if pid not in self._codes:
            self._codes.update(self._nursery.ask(do="look")["ended"])
        return self._codes.get(pid)

    def close(self) -> None:
        self._nursery.close()


@dataclass
class Member:
    """roles: as in `--roles`. environment: every setting, as OCHREDB_* variables."""

    name: str
    roles: str
    port: int  # REST; of a frontend.
    rpc_port: int  # Of the others.
    health_port: int
    environment: dict[str, str]
    log: Path
    launcher: Launcher
    host: str = "127.0.0.1"
    pid: int = 0

    @property
    def is_frontend(self) -> bool:
        return "frontend" in self.roles.split(",")

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def rpc_address(self) -> str:
        return f"{self.host}:{self.rpc_port}"

    def start(self) -> None:
        """Only starts it: see `wait_ready`."""
        assert self.pid == 0, f"{self.name} runs already"
        self.pid = self.launcher.spawn(["serve"], self.environment, str(self.log))

    def wait_ready(self, timeout_s: float = START_S_MAX) -> None:
        """Until it says that it is ready. Raises MemberFailed."""
        deadline_s = time.monotonic() + timeout_s
        while not self.is_ready():
            code = self.launcher.code(self.pid)
            if code is not None:
                raise MemberFailed(f"{self.name} ended with {code} at its start\n{self.tail()}")
            if time.monotonic() > deadline_s:
                raise MemberFailed(f"{self.name}: not ready in {timeout_s:g} s\n{self.tail()}")
            time.sleep(0.02)

    def is_ready(self) -> bool:
        return answers(self.host, self.health_port, "/readyz")

    def ended(self) -> int | None:
        """The exit code, if it has ended by itself."""
        return self.launcher.code(self.pid) if self.pid else None

    def kill(self) -> None:
        """kill -9."""
        self.launcher.signal(self.pid, signal.SIGKILL)
        self.pid = 0

    def terminate(self) -> None:
        """SIGTERM; returns at once."""
        self.launcher.signal(self.pid, signal.SIGTERM)

    def wait_ended(self, timeout_s: float = STOP_S_MAX) -> int:
        """Its exit code. Raises MemberFailed, after showing its threads and killing it."""
        deadline_s = time.monotonic() + timeout_s
        while (code := self.launcher.code(self.pid)) is None:
            if time.monotonic() > deadline_s:
                self.launcher.signal(self.pid, signal.SIGUSR1)
                time.sleep(0.5)
                self.kill()
                raise MemberFailed(f"{self.name} ran on {timeout_s:g} s after SIGTERM{self.tail()}")
            time.sleep(0.01)
        self.pid = 0
        return code

    def stop(self, timeout_s: float = STOP_S_MAX) -> int:
        self.terminate()
        return self.wait_ended(timeout_s)

    def tail(self) -> str:
        """The end of its log."""
        with contextlib.suppress(FileNotFoundError):
            text = self.log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
            return f"--- {self.log}\n{text}"
        return f"--- {self.log}: empty"


def answers(host: str, port: int, path: str) -> bool:
    """Whether an HTTP server says 200."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
