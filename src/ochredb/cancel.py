"""One request's right to go on: a deadline, and whether its client is still there."""

from __future__ import annotations

from ochredb.clock import Clock, SystemClock
from ochredb.errors import DeadlineExceeded, OchreError


class Cancelled(OchreError):
    """The client is gone; nobody will read the answer."""


class Cancel:
    """Checked by long work between steps; `cancel()` may be called from another thread.

    Cost of `check`: one clock read.
    """

    __slots__ = ("_cancelled", "_clock", "_deadline_s")

    def __init__(self, timeout_s: float | None = None, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._deadline_s = None if timeout_s is None else self._clock.monotonic_s() + timeout_s
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def check(self) -> None:
        """Raises Cancelled or DeadlineExceeded when the work should stop."""
        if self._cancelled:
            raise Cancelled("the client closed the connection")
        if self._deadline_s is not None and self._clock.monotonic_s() > self._deadline_s:
            raise DeadlineExceeded("the request ran out of time")

    def remaining_s(self) -> float | None:
        """Seconds left (not below 0), or None if there is no deadline."""
        if self._deadline_s is None:
            return None
        return max(0.0, self._deadline_s - self._clock.monotonic_s())
