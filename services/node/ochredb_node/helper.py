"""A process that folds and merges for a server: started when reads would wait, gone when idle.

Folding and merging hold the interpreter's lock in many short turns, and each read beside them waits
for some of these. So while records are read and many are written, a worker of low priority (see
`supervisor`) does the large part of it. Leases decide who does what: if the worker ends or is
killed, nothing is lost and the server's own threads go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from ochredb.clock import Clock

if TYPE_CHECKING:
    from ochredb_node.supervisor import Supervisor

_START_S = 5.0  # So long it may take to come up; then the server's own threads do the work.
_IDLE_S = 10.0
_STOP_TIMEOUT_S = 5.0  # Then it is killed: it loses only work.


class Helper:
    """`takes` is called by threads that look for work, `turn` by one, about once a second."""

    def __init__(
        self,
        make: Callable[[], Supervisor],
        *,
        clock: Clock,
        is_read: Callable[[], bool],
        is_needed: Callable[[], bool],
    ) -> None:
        """make: of one worker, not yet started. is_read: whether reads would wait for this process.

        is_needed: whether it would be wanted again at once, had it ended.
        """
        self._make, self._clock = make, clock
        self._is_read, self._is_needed = is_read, is_needed
        self._lock = threading.Lock()  # Guards the next four.
        self._supervisor: Supervisor | None = None
        self._started_s = self._wanted_s = 0.0
        self._is_closed = False

    def takes(self, is_large: bool) -> bool:
        """Whether work is left to the process, which is started for large work beside reads."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            if self._supervisor is None:
                if self._is_closed or not is_large or not self._is_read():
                    return False
                self._supervisor = self._make()
                self._supervisor.start()
                self._started_s = now_s
            self._wanted_s = now_s
            return self._supervisor.running > 0 or now_s - self._started_s < _START_S

    def turn(self) -> None:
        """Let the process end after some time without work."""
        if self._supervisor is None:
            return
        needed, now_s = self._is_needed(), self._clock.monotonic_s()
        with self._lock:
            if needed:
                self._wanted_s = now_s
            if now_s - self._wanted_s < _IDLE_S:
                return
        self._end()

    def close(self) -> None:
        """End the process, if there is one, and start none any more."""
        with self._lock:
            self._is_closed = True
        self._end()

    def _end(self) -> None:
        with self._lock:
            supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.stop(_STOP_TIMEOUT_S)
