"""Processes that compact for this one: started, started again when they end, stopped with it.

A worker is this process's own command line once more, with `WORKER_VARIABLE` in its environment;
so it reads the same settings in the same way, and no secret travels between processes. It lives in
a process group of its own (a terminal's Ctrl-C reaches only the parent, which passes it on), but in
the parent's session: Linux weighs priorities within one. It ends when its standard input does: that
is when the parent is gone, whatever ended it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from ochredb.clock import Clock
from ochredb_node.settings import WORKER_VARIABLE

log = logging.getLogger("ochredb.node")

PAUSE, RESUME = b"pause", b"resume"  # Lines that a worker reads.
INSERTED = b"graph_insertions "  # Begins a line that a worker writes: so many since its start.
_PAUSE_S, _PAUSE_S_MAX = 0.5, 30.0
_STEADY_AFTER_S = 60.0  # Having lived so long, a worker's earlier failures count no more.


class Supervisor:
    """`count` worker processes. `start` returns at once; `stop` waits."""

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        *,
        clock: Clock,
        rng: random.Random,
        is_paused: bool = False,
    ) -> None:
        """command: this process's own, without the interpreter. is_paused: see `pause`."""
        self._command, self._count = list(command), count
        self._clock, self._rng = clock, rng
        self._lock = threading.Lock()  # Guards the next four.
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._is_paused = is_paused
        self.graph_insertions = 0  # Of all workers, since the start.
        self.restarts = 0  # Likewise.
        self._stopping = threading.Event()
        self._stopping_s = 0.0  # Since when.
        self._threads = [
            threading.Thread(target=self._keep, args=(number,), name=f"worker-{number}")
            for number in range(count)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> int:
        with self._lock:
            return sum(process.poll() is None for process in self._processes.values())

    def pause(self, paused: bool) -> None:
        """Have all workers begin no background work, or go on; those to come, too."""
        with self._lock:
            self._is_paused = paused
            for process in self._processes.values():
                _tell(process, PAUSE if paused else RESUME)

    def terminate(self) -> None:
        """Ask all workers to end, and start none anew. Does not wait."""
        with self._lock:
            if self._stopping.is_set():  # A second signal would end them at once.
                return
            self._stopping.set()
            self._stopping_s = self._clock.monotonic_s()
            for process in self._processes.values():
                process.send_signal(signal.SIGTERM)

    def stop(self, timeout_s: float) -> None:
        """The same, and wait; what still runs `timeout_s` after it was asked is killed: it loses
        only work."""
        self.terminate()
        deadline_s = self._stopping_s + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline_s - self._clock.monotonic_s()))
        with self._lock:
            late = [process for process in self._processes.values() if process.poll() is None]
        for process in late:
            log.warning("compactor worker %d is still at work: killed", process.pid)
            process.kill()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _keep(self, number: int) -> None:
        failures = 0
        while True:
            started_s = self._clock.monotonic_s()
            code = self._run(number)
            if code is None:
                return
            if self._stopping.is_set():
                if code != 0:
                    log.warning("compactor worker %d ended with %d", number, code)
                return
            lived_s = self._clock.monotonic_s() - started_s
            failures = 0 if lived_s > _STEADY_AFTER_S else failures + 1
            pause_s = min(_PAUSE_S_MAX, _PAUSE_S * 2.0**failures) * self._rng.uniform(0.5, 1.0)
            log.warning(
                "compactor worker %d ended with %d after %.1f s; started again in %.1f s",
                number, code, lived_s, pause_s,
            )  # fmt: skip
            if self._stopping.wait(pause_s):
                return
            self.restarts += 1

    def _run(self, number: int) -> int | None:
        """One life of a worker: how it ended, or None if there shall be no more."""
        with self._lock:
            if self._stopping.is_set():
                return None
            try:
                process = subprocess.Popen(
                    [sys.executable, *self._command],
                    env={**os.environ, WORKER_VARIABLE: str(number)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    process_group=0,
                )
            except OSError as error:  # No memory, no more processes: as if it had ended at once.
                log.warning("compactor worker %d cannot be started: %s", number, error)
                return -1
            self._processes[number] = process
            _tell(process, PAUSE if self._is_paused else RESUME)  # A worker waits for this.
        with process:  # Its standard input stays open until it ends.
            assert process.stdout is not None
            known = 0
            for line in process.stdout:
                if line.startswith(INSERTED):
                    before, known = known, int(line.removeprefix(INSERTED))
                    with self._lock:
                        self.graph_insertions += known - before
            return process.wait()


def _tell(process: subprocess.Popen[bytes], word: bytes) -> None:
    """One that has just ended hears nothing; its successor is told."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ValueError):
        process.stdin.write(word + b"\n")
        process.stdin.flush()
