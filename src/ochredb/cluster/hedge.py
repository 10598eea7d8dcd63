"""One request at two nodes: the second is asked when the first takes longer than most.

The first call runs in the caller's thread, as it would alone. If it is not back after the delay, a
helper makes the same call to the second node, and whoever is first with an answer wins: the other's
`Cancel` is cancelled. So a request that is answered in time costs an entry in a timer, no thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ochredb.cancel import Cancel
from ochredb.clock import Clock
from ochredb.cluster.budget import RetryBudget, TokenBucket
from ochredb.cluster.nodes import Node
from ochredb.cluster.timer import Helpers, Timer
from ochredb.errors import InvalidArgument, NotFound, OchreError, TooLarge, Unavailable

T = TypeVar("T")
R = TypeVar("R")

ANSWERS = (NotFound, InvalidArgument, TooLarge)
"""Errors that are an answer: any node would say the same."""

_LOOK_AGAIN_S_MIN = 0.1


@dataclass(frozen=True, slots=True)
class Hedging:
    """What the hedges of one process share. `bucket` earns a share of a token for each request."""

    clock: Clock
    timer: Timer
    helpers: Helpers
    bucket: TokenBucket
    budget: RetryBudget


class Race(Generic[T, R]):
    """One call at a first and, perhaps, a second node."""

    def __init__(
        self,
        hedging: Hedging,
        first: Node[T],
        second: Node[T],
        call: Callable[[T, Cancel], R],
        cancel: Cancel,
    ) -> None:
        self._hedging, self._call, self._cancel = hedging, call, cancel
        self._first, self._second = first, second
        self._lock = threading.Lock()
        self._first_cancel = cancel.child()
        self._second_cancel: Cancel | None = None
        self._second_ended: threading.Event | None = None  # There is a second call.
        self._delay_s = self._failed_at_s = 0.0
        self._is_over = False
        self._won: list[R | OchreError] = []  # What the second call ended in, if it came first.

    @property
    def has_hedge(self) -> bool:
        """Whether the second node was asked."""
        return self._second_ended is not None

    def run(self, delay_s: float, patience_s: float) -> R:
        """The first answer; the second node is asked after `delay_s`, if a hedge may be made.

        patience_s: after so long the first has failed for now, and the second is the next attempt.
        Raises what the call at the first node raised if neither has an answer.
        """
        self._delay_s = delay_s
        self._failed_at_s = self._hedging.clock.monotonic_s() + patience_s
        self._look_later(delay_s)
        try:
            answer = self._call_at(self._first, self._first_cancel)
        except BaseException as error:
            if not self._second_answers(error):
                self._end()
                raise
        else:
            self._end()
            return answer
        (outcome,) = self._won
        if isinstance(outcome, OchreError):
            raise outcome
        return outcome

    def _call_at(self, node: Node[T], cancel: Cancel) -> R:
        return node.ask(lambda client: self._call(client, cancel))

    def _second_answers(self, error: BaseException) -> bool:
        """The call at the first node raised this: has the other an answer? Waits for it."""
        with self._lock:
            ended = self._second_ended
        if ended is not None and isinstance(error, Unavailable):
            ended.wait()  # It ends when the request does, as its cancel is a child's.
        return bool(self._won)

    def _end(self) -> None:
        """Nobody waits for the second call any more."""
        with self._lock:
            self._is_over = True
            loser = self._second_cancel
        if loser is not None:
            loser.cancel()

    # -- in the timer's thread

    def _look_later(self, delay_s: float) -> None:
        self._hedging.timer.call_later(delay_s, self._due, lambda: self._is_over)

    def _due(self) -> None:
        """The first node takes its time: ask the second, or look again later."""
        if not self._may_hedge() or not self._begin_second():
            self._look_later(max(2.0 * self._delay_s, _LOOK_AGAIN_S_MIN))

    def _may_hedge(self) -> bool:
        if self._second.is_open or self._second.is_exhausted:
            return False
        if self._first.is_open or self._hedging.clock.monotonic_s() >= self._failed_at_s:
            return self._hedging.budget.take()
        return self._hedging.bucket.take()

    def _begin_second(self) -> bool:
        """False if no thread is free for it."""
        cancel, ended = self._cancel.child(), threading.Event()
        with self._lock:
            if self._is_over:
                return True
            self._second_cancel, self._second_ended = cancel, ended
        if self._hedging.helpers.run(lambda: self._run_second(cancel, ended)):
            self._hedging.budget.counted.hedge()
            return True
        with self._lock:
            self._second_cancel = self._second_ended = None
        ended.set()
        return False

    # -- in a helper's thread

    def _run_second(self, cancel: Cancel, ended: threading.Event) -> None:
        try:
            self._win(self._call_at(self._second, cancel))
        except ANSWERS as error:
            self._win(error)
        except OchreError:
            pass  # The first call decides.
        finally:
            ended.set()

    def _win(self, outcome: R | OchreError) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            self._won.append(outcome)
        self._first.outrun()
        self._first_cancel.cancel()
