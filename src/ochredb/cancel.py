"""One request's right to go on: a deadline, and whether its client is still there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ochredb.clock import Clock, SystemClock
from ochredb.errors import DeadlineExceeded, OchreError


class Cancelled(OchreError):
    """The client is gone; nobody will read the answer."""


class Cancel:
    """Checked by long work between steps; `cancel()` may be called from another thread.

    Work that waits for something else, another process say, asks to be told (`when_cancelled`).
    request_id: what log lines call the request, in each process that works on it.
    Cost of `check`: one clock read.
    """

    __slots__ = ("_calls", "_cancelled", "_clock", "_deadline_s", "request_id")

    def __init__(
        self,
        timeout_s: float | None = None,
        clock: Clock | None = None,
        request_id: str | None = None,
    ) -> None:
        self.request_id = request_id
        self._clock = clock or SystemClock()
        self._deadline_s = None if timeout_s is None else self._clock.monotonic_s() + timeout_s
        self._cancelled = False
        self._calls: list[Callable[[], None]] = []

    def cancel(self) -> None:
        self._cancelled = True
        for call in tuple(self._calls):
            call()

    def when_cancelled(self, call: Callable[[], None]) -> Callable[[], None]:
        """Have `call` called by whoever cancels; at once if that has happened. Take it back by
        calling what this returns.

        It must be quick, must not raise, and may be called twice and from any thread.
        """
        self._calls.append(call)
        if self._cancelled:
            call()

        def take_back() -> None:
            with contextlib.suppress(ValueError):
                self._calls.remove(call)

        return take_back

    def child(self) -> Cancel:
        """For a part of the work: cancelled with this one, or alone. The same deadline."""
        child = Cancel(clock=self._clock, request_id=self.request_id)
        child._deadline_s = self._deadline_s
        self.when_cancelled(child.cancel)
        return child

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
