"""A server's reader processes, as processes: started with one end of a channel, and ended.

A reader is this process's own command line once more, with `READER_VARIABLE` in its environment, as
a compactor's worker is (decision 0038); so it reads the same settings in the same way. It ends when
its channel does: that is when the server wants it to, or is gone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import astuple

import ochredb
from ochredb.clock import Clock
from ochredb.vectors.threads import PROCESSORS
from ochredb_frontend import channel
from ochredb_node.memory import GROUP_FOLDER, available_bytes, lines_of, resident_bytes
from ochredb_node.node import Node
from ochredb_node.settings import READER_VARIABLE, Settings

log = logging.getLogger("ochredb.node")

_PROCESSES_MAX = 8  # That read, with the server.
_ROOM_BYTES = 256 << 20  # Of memory beyond what this process takes, which a reader may take too.


class ReaderProcesses:
    """Those that this process started. Thread-safe."""

    def __init__(self, command: Sequence[str], likeness: str, clock: Clock) -> None:
        """command: this process's own, without the interpreter. likeness: see there."""
        self._command, self._likeness, self._clock = list(command), likeness, clock
        self._lock = threading.Lock()  # Guards the next two.
        self._processes: list[subprocess.Popen[bytes]] = []
        self._is_closed = False

    def start(self, sock: socket.socket) -> None:
        """One more, with `sock` as its end of the channel. Raises OSError, also for no memory."""
        _check_memory()
        with self._lock:
            if self._is_closed:
                raise OSError("the server ends")
            process = subprocess.Popen(
                [sys.executable, *self._command],
                env={**os.environ, READER_VARIABLE: f"{sock.fileno()}:{self._likeness}"},
                pass_fds=(sock.fileno(),),
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
            self._processes = [one for one in self._processes if one.returncode is None]
            self._processes.append(process)
        # Nothing is left of it when it ends, whoever wanted that.
        threading.Thread(target=process.wait, name="reader-end", daemon=True).start()

    def close(self, timeout_s: float) -> None:
        """Wait for all of them, whose channels were closed; then kill: they only read."""
        with self._lock:
            self._is_closed = True
        deadline_s = self._clock.monotonic_s() + timeout_s
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline_s - self._clock.monotonic_s()))
                continue
            log.warning("reader process %d is still at work: killed", process.pid)
            process.kill()
            process.wait()


def likeness(settings: Settings) -> str:
    """What a reader has in common with its server: what it was told, and what it was made of.

    Both may change while a server runs: a file of settings, a secret in one, the installation.
    """
    made_ns = os.stat(ochredb.__file__).st_mtime_ns
    return hashlib.sha256(repr((astuple(settings), made_ns)).encode()).hexdigest()


def readers_max(node: Node) -> int:
    """Processes that may read for a server: as many processors as reads may use, less its own."""
    catalog = node.foundation.catalog
    if catalog.is_read_only or catalog.claim is not None or not channel.IS_POSSIBLE:
        return 0
    processors = min(PROCESSORS, _quota(), node.config.frontend.read_threads, _PROCESSES_MAX)
    return processors - 1


def _quota() -> int:
    """Processors that the control group may use, rounded up; many if nothing tells."""
    for line in lines_of(GROUP_FOLDER + "cpu.max"):
        quota, _, period = line.partition(" ")
        if quota.isdigit():
            return -(-int(quota) // int(period))
    return _PROCESSES_MAX


def _check_memory() -> None:
    """Raises OSError if a process as large as this one would be too much for the machine."""
    available = available_bytes()
    wanted = resident_bytes() + _ROOM_BYTES
    if available is not None and available < wanted:
        raise OSError(
            errno.ENOMEM,
            f"{available >> 20} MiB of memory are available, {wanted >> 20} MiB are wanted",
        )
