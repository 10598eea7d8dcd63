"""The line of requests that wait: who leads the next flush, and what that takes along.

At most `flushes_max` flushes run at once. Where that is more than one:

* The small requests of one collection are in one flush at a time: they would only wait for one
  another's lock of its row, in smaller batches. Those of another collection go past them.
* A flush is of small requests or of large ones, whose bytes go to the object store first: nobody
  small waits for that.
* Slow flushes, those of large requests and those that wait for a lock that another process holds,
  leave one flush to the others.

Not thread-safe: guarded by its owner's lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from ochredb.cancel import Cancel
from ochredb.catalog.appends import AppendRequest
from ochredb.errors import Exhausted, OutcomeUnknown
from ochredb.types import Appended, Operations

Delivery = Callable[[Appended | BaseException], None]


@dataclass(slots=True, eq=False)
class Flush:
    """One flush, from the moment that its leader is chosen. collections: kept to it."""

    leader: Waiting
    is_slow: bool
    collections: set[str] = field(default_factory=set)
    batch: list[Waiting] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the line. `outcome` is set before `is_over`, that before `done`.

    stored: the request as it was last written down: its payload inline, or its place in an object.
    alone: somebody else held the lock of its collection; it has a flush that waits for the lock.
    flush: the one that it leads, or is to lead.
    """

    request: AppendRequest
    operations: Operations
    payload: pa.Buffer
    cancel: Cancel
    is_large: bool = False
    # The name is looked up when it is called: a simulation has events of its own.
    done: threading.Event = field(default_factory=lambda: threading.Event())
    stored: AppendRequest | None = None
    alone: bool = False
    flush: Flush | None = None
    outcome: Appended | BaseException | None = None
    is_over: bool = False
    deliver: Delivery | None = None  # Of a submitted request, for which no thread waits.
    unknown: OutcomeUnknown | None = None  # What the first attempt of a submitted request ended in.


class Line:
    """`requests`: those that wait, first come first; `flushing`: flushes chosen and not ended."""

    def __init__(self, *, flushes_max: int, flush_bytes_max: int, requests_max: int) -> None:
        self.flushes_max = flushes_max
        self._flush_bytes_max, self._requests_max = flush_bytes_max, requests_max
        self.requests: deque[Waiting] = deque()
        self.flushing = 0
        self._slow = 0
        self._kept: set[str] = set()  # Collections whose small requests are in a flush.

    def join(self, waiting: Waiting) -> None:
        """Raises Exhausted."""
        if len(self.requests) >= self._requests_max:
            raise Exhausted(f"{len(self.requests)} writes are waiting already")
        self.requests.append(waiting)

    def put_back(self, again: Sequence[Waiting]) -> None:
        """To the head of the line, where they were."""
        self.requests.extendleft(reversed(again))

    def next(self) -> Waiting | None:
        """Choose who leads another flush now; None if none can begin."""
        if self.flushing >= self.flushes_max:
            return None
        for waiting in self.requests:
            if waiting.flush is None and self._may_lead(waiting):
                flush = Flush(waiting, waiting.alone or waiting.is_large)
                self.flushing += 1
                self._slow += flush.is_slow
                if waiting.alone or not waiting.is_large:
                    self._keep(flush, waiting)
                waiting.flush = flush
                return waiting
        return None

    def take(self, flush: Flush) -> list[Waiting]:
        """The leader and whoever goes along, out of the line; nobody if the leader has left it."""
        if flush.leader not in self.requests:
            return []
        size, is_full = flush.leader.payload.size, False
        left: deque[Waiting] = deque()
        for waiting in self.requests:
            if waiting is not flush.leader:
                if is_full or not self._goes_along(waiting, flush):
                    left.append(waiting)
                    continue
                is_full = size + waiting.payload.size > self._flush_bytes_max
                if is_full:
                    left.append(waiting)
                    continue
                size += waiting.payload.size
                if not waiting.is_large:
                    self._keep(flush, waiting)
            flush.batch.append(waiting)
        self.requests = left
        return flush.batch

    def end(self, flush: Flush) -> None:
        """Its leader leads no more."""
        self.flushing -= 1
        self._slow -= flush.is_slow
        self._kept -= flush.collections
        flush.leader.flush = None

    def _may_lead(self, waiting: Waiting) -> bool:
        is_slow = waiting.alone or waiting.is_large
        if is_slow and self._slow >= max(1, self.flushes_max - 1):
            return False
        if waiting.is_large and not waiting.alone:
            return True
        return waiting.request.collection not in self._kept

    def _goes_along(self, waiting: Waiting, flush: Flush) -> bool:
        leader, collection = flush.leader, waiting.request.collection
        if waiting.flush is not None:
            return False
        if leader.alone:
            if collection != leader.request.collection:
                return False
            return waiting.alone or not waiting.is_large
        if waiting.alone:
            return False
        if self.flushes_max > 1 and waiting.is_large != leader.is_large:
            return False
        return waiting.is_large or collection in flush.collections or collection not in self._kept

    def _keep(self, flush: Flush, waiting: Waiting) -> None:
        flush.collections.add(waiting.request.collection)
        self._kept.add(waiting.request.collection)
