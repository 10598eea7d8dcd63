"""Group commit: requests wait in line, one of them leads a flush for all that go along (I1, I2).

The thread of a request that finds a flush free leads one at once; otherwise it waits, and whoever
leads next takes along everything that has queued up meanwhile. For a submitted request, which no
thread waits for, a thread of the log leads.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from ochredb.cancel import Cancelled
from ochredb.catalog.appends import Busy
from ochredb.catalog.logs import LogTable
from ochredb.crash_points import reach
from ochredb.errors import (
    DeadlineExceeded,
    Exhausted,
    OchreError,
    OutcomeUnknown,
    OutOfMemory,
    Unavailable,
)
from ochredb.types import Appended
from ochredb_log.flush import Flusher, copy_of
from ochredb_log.line import Flush, Line, Waiting

log = logging.getLogger("ochredb.log")

CLOSE_WAIT_S = 30.0
# What a repeat may fail with before the log was asked whether the first attempt had landed.
NOT_LOOKED_AT = (Exhausted, Unavailable, Cancelled, DeadlineExceeded)


class GroupCommit:
    """Thread-safe. `on_append`: told of submitted requests, after their outcome was delivered."""

    def __init__(
        self,
        flusher: Flusher,
        table: LogTable,
        line: Line,
        on_append: Callable[[str, int], None],
    ) -> None:
        self._flusher, self._table, self._on_append = flusher, table, on_append
        self.line = line
        self._lock = threading.Lock()  # Guards the line and the next one.
        self._closed = False
        self._idle = threading.Condition(self._lock)
        self._turns: queue.SimpleQueue[Flush | None] = queue.SimpleQueue()  # Of the log's threads.
        self._threads: list[threading.Thread] = []

    def close(self, timeout_s: float = CLOSE_WAIT_S) -> None:
        """Take nothing more, flush what was taken, let the log's own threads end.

        What still waits after `timeout_s`, behind a disk that does not answer, is refused.
        """
        with self._lock:
            self._closed = True
            self._idle.wait_for(lambda: not self.line.flushing, timeout_s)
            late = list(self.line.requests)
            self.line.requests.clear()
        for waiting in late:
            waiting.outcome = waiting.unknown or Unavailable("the database was closed before this")
            self._tell(waiting)
        for _ in self._threads:
            self._turns.put(None)
        for thread in self._threads:
            thread.join(CLOSE_WAIT_S if not late else 0)
            if thread.is_alive():
                log.warning("closing while the disk has not answered a write")
        self._threads = []

    def append(self, waiting: Waiting) -> Appended:
        """Wait for the outcome; perhaps lead."""
        self._enqueue(waiting)
        while not waiting.is_over:
            flush = waiting.flush
            if flush is None:
                try:
                    waiting.done.wait()
                except BaseException:  # An interrupt: do not leave the others without a leader.
                    self._abandon(waiting)
                    raise
                waiting.done.clear()
            else:
                self._lead(flush)
        outcome = waiting.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome is not None
        return outcome

    def _enqueue(self, waiting: Waiting) -> Flush | None:
        """Put it into the line; the flush that it leads, if another one may run.

        Raises Exhausted.
        """
        with self._lock:
            if self._closed:
                raise Unavailable("the database was closed")
            self.line.join(waiting)
            leader = self.line.next()
            # Whoever came before it and may lead does so already.
            assert leader is None or leader is waiting
            return waiting.flush

    def submit(self, waiting: Waiting) -> None:
        """Have the outcome delivered; a thread of the log leads."""
        if not self._has_thread():
            with self._lock:
                if not self._has_thread() and not self._closed:
                    self._threads = self._started_threads()
        flush = self._enqueue(waiting)
        if flush is not None:
            self._turns.put(flush)

    def _has_thread(self) -> bool:
        """Not at first, and not in a fork's child: there they stayed behind."""
        return any(thread.is_alive() for thread in self._threads)

    def _started_threads(self) -> list[threading.Thread]:
        threads: list[threading.Thread] = []
        for _ in range(self.line.flushes_max):
            thread = threading.Thread(target=self._run, name="ochredb-log", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # With one of them the others can be done without.
                if threads:
                    break
                raise OutOfMemory(f"no thread for the log: {error}") from error
            threads.append(thread)
        return threads

    def _run(self) -> None:
        while (flush := self._turns.get()) is not None:
            self._lead(flush)

    def _not_over(self, batch: Sequence[Waiting]) -> dict[Waiting, Waiting]:
        """Requests of a batch that are tried again, and as what.

        Those whose collection was locked; and once a submitted request whose outcome is not known,
        as in `_append_resolved`.
        """
        again: dict[Waiting, Waiting] = {}
        for waiting in batch:
            outcome = waiting.outcome
            if isinstance(outcome, Busy):
                waiting.alone, waiting.outcome = True, None
                again[waiting] = waiting
            elif self._closed or waiting.deliver is None or waiting.unknown is not None:
                continue
            elif isinstance(outcome, OutcomeUnknown):
                request = replace(waiting.request, may_be_repeat=True)
                again[waiting] = replace(
                    waiting, request=request, stored=None, flush=None, unknown=outcome
                )
        return again

    def _tell(self, waiting: Waiting) -> None:
        """Give a request its outcome."""
        waiting.is_over = True
        if waiting.deliver is None:
            waiting.done.set()
            return
        if waiting.unknown is not None and isinstance(waiting.outcome, NOT_LOOKED_AT):
            waiting.outcome = waiting.unknown  # Nobody knows yet.
        assert waiting.outcome is not None
        try:
            waiting.deliver(waiting.outcome)
        except Exception:  # Others are told all the same.
            log.exception("the outcome of a submitted write could not be told")

    def _lead(self, flush: Flush) -> None:
        """Flush one batch, then hand the lead to the first request that came meanwhile."""
        with self._lock:
            batch = self.line.take(flush)
        outcomes: Sequence[Appended | BaseException]
        try:
            outcomes = self._flush_wanted(batch)
        except BaseException as error:
            outcomes = [copy_of(error) for _ in batch]
            if not isinstance(error, Exception):
                raise
        finally:
            for waiting, outcome in zip(batch, outcomes, strict=True):
                waiting.outcome = outcome
            self._remember(batch)
            again = self._not_over(batch)
            reach("flush.acknowledging")
            told: dict[str, int] = {}
            for waiting in batch:
                if waiting in again:
                    continue
                done = waiting.outcome
                if waiting.deliver is not None and isinstance(done, Appended) and not done.repeated:
                    collection = waiting.request.collection
                    told[collection] = max(told.get(collection, 0), done.last_offset)
                self._tell(waiting)
            reach("flush.acknowledged")
            self._hand_over(flush, list(again.values()))
            for collection, last_offset in told.items():
                self._on_append(collection, last_offset)

    def _remember(self, batch: Sequence[Waiting]) -> None:
        """Spare the readers of these writes the way through the log."""
        try:
            for waiting in batch:
                outcome, stored = waiting.outcome, waiting.stored
                if isinstance(outcome, Appended) and not outcome.repeated:
                    self._table.recent.put(
                        waiting.request.collection,
                        outcome.first_offset,
                        waiting.operations,
                        waiting.payload.size,
                    )
                    if stored is not None and stored.object_key is not None:
                        assert stored.byte_start is not None
                        self._table.hot.put(
                            stored.object_key, stored.byte_start, memoryview(waiting.payload)
                        )
        except Exception:  # No memory, for one. The writes are durable, and read from the log.
            log.exception("writes could not be kept for their readers")

    def _hand_over(self, flush: Flush, again: Sequence[Waiting] = ()) -> None:
        """End a flush, and let those lead who may now.

        again: requests of it that go to the head of the line, where they were.
        """
        leaders: list[Waiting] = []
        with self._lock:
            self.line.end(flush)
            self.line.put_back(again)
            while (leader := self.line.next()) is not None:
                leaders.append(leader)
            if not self.line.flushing:
                self._idle.notify_all()
        for leader in leaders:
            if leader.deliver is None:
                leader.done.set()
            else:
                self._turns.put(leader.flush)

    def _abandon(self, waiting: Waiting) -> None:
        """Its thread will not wait any longer. In the line still, it is not written."""
        with self._lock:
            if waiting in self.line.requests:
                self.line.requests.remove(waiting)
            flush = waiting.flush
        if flush is not None:
            self._hand_over(flush)

    def _flush_wanted(self, batch: list[Waiting]) -> list[Appended | OchreError]:
        """Flush those that are still wanted: some may have waited for too long."""
        refused: dict[int, OchreError] = {}
        for number, waiting in enumerate(batch):
            try:
                waiting.cancel.check()
            except OchreError as error:
                refused[number] = error
        if not refused:
            return self._flusher.flush(batch)
        wanted = [waiting for number, waiting in enumerate(batch) if number not in refused]
        flushed = iter(self._flusher.flush(wanted) if wanted else [])
        return [refused.get(number) or next(flushed) for number in range(len(batch))]
