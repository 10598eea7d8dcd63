"""Worker processes: replaced when they end, stopped with their parent, whatever ends it."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ochredb.clock import SystemClock
from ochredb_node.supervisor import Supervisor

# Says who it is, then waits until its standard input ends, as a worker does.
PATIENT = """
import os, signal, sys, threading
folder, number = sys.argv[1], os.environ["OCHREDB_COMPACTOR_WORKER"]
def end(*_):
    open(f"{folder}/ended-{os.getpid()}", "w").close()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
open(f"{folder}/{number}-{os.getpid()}", "w").close()
sys.stdin.buffer.read()
end()
"""
DEAF = PATIENT.replace("signal.signal(signal.SIGTERM, end)", "signal.signal(15, signal.SIG_IGN)")


def make(folder: Path, script: str, count: int) -> Supervisor:
    command = ["-c", script, str(folder)]
    return Supervisor(command, count, clock=SystemClock(), rng=random.Random(1))


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    pause, clock = threading.Event(), SystemClock()
    deadline_s = clock.monotonic_s() + timeout_s
    while not condition():
        assert clock.monotonic_s() < deadline_s, "not in time"
        pause.wait(0.02)


def pids(folder: Path, number: int) -> list[int]:
    return [int(file.name.partition("-")[2]) for file in folder.glob(f"{number}-*")]


def test_a_worker_that_was_killed_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = make(tmp_path, PATIENT, 2)
    supervisor.start()
    try:
        until(lambda: len(pids(tmp_path, 0)) == 1 and len(pids(tmp_path, 1)) == 1)
        assert supervisor.running == 2
        (victim,), (other,) = pids(tmp_path, 0), pids(tmp_path, 1)
        with caplog.at_level(logging.WARNING, "ochredb.node"):
            os.kill(victim, signal.SIGKILL)
            until(lambda: len(pids(tmp_path, 0)) == 2)
        assert "compactor worker 0 ended with -9" in caplog.text
        assert (supervisor.running, supervisor.restarts) == (2, 1)
        assert pids(tmp_path, 1) == [other]
    finally:
        supervisor.stop(10)
    assert supervisor.running == 0
    assert len(list(tmp_path.glob("ended-*"))) == 2, "they were asked to end, not killed"


def test_the_pause_before_a_new_start_grows(tmp_path: Path) -> None:
    script = 'import sys; open(sys.argv[1] + "/count", "a").write("x")'
    supervisor = make(tmp_path, script, 1)
    supervisor.start()
    until(lambda: (tmp_path / "count").exists() and (tmp_path / "count").stat().st_size == 2)
    clock = SystemClock()
    begun_s = clock.monotonic_s()
    until(lambda: (tmp_path / "count").stat().st_size == 3)
    assert clock.monotonic_s() - begun_s > 0.8, "half of two seconds, by chance"
    supervisor.stop(5)
    assert supervisor.running == 0


def test_a_worker_that_does_not_end_is_killed(tmp_path: Path) -> None:
    supervisor = make(tmp_path, DEAF, 1)
    supervisor.start()
    until(lambda: len(pids(tmp_path, 0)) == 1)
    supervisor.stop(0.2)
    assert supervisor.running == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pids(tmp_path, 0)[0], 0)


def test_stopping_what_was_never_started(tmp_path: Path) -> None:
    make(tmp_path, PATIENT, 2).stop(1)


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import random, sys, time\n"
            "from ochredb.clock import SystemClock\n"
            "from ochredb_node.supervisor import Supervisor\n"
            "command = ['-c', sys.argv[1], sys.argv[2]]\n"
            "Supervisor(command, 2, clock=SystemClock(), rng=random.Random(1)).start()\n",
            PATIENT,
            str(tmp_path),
        ]
    )
    until(lambda: bool(pids(tmp_path, 0) and pids(tmp_path, 1)))
    parent.kill()
    parent.wait()
    until(lambda: len(list(tmp_path.glob("ended-*"))) == 2)


def test_what_workers_say_they_have_inserted_is_counted(tmp_path: Path) -> None:
    """Those that have ended included: each says what it did since its own start."""
    script = PATIENT.replace("sys.stdin", 'os.write(1, b"graph_insertions 3\\nx\\n")\nsys.stdin')
    script = script.replace("sys.stdin", 'os.write(1, b"graph_insertions 5\\n")\nsys.stdin', 1)
    supervisor = make(tmp_path, script, 2)
    supervisor.start()
    try:
        until(lambda: supervisor.graph_insertions == 10)
        os.kill(pids(tmp_path, 0)[0], signal.SIGKILL)
        until(lambda: supervisor.graph_insertions == 15)
    finally:
        supervisor.stop(10)
    assert supervisor.graph_insertions == 15
