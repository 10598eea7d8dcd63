"""Group commit: many requests, one object, one transaction, then the acknowledgements (I1, I2, I3).

A request is encoded by its own thread. If no flush is running its thread leads one at once;
otherwise it waits, and the leader's successor takes everything that has queued up meanwhile. So a
lone writer pays one commit, and a crowd shares one. Who must not wait submits its request: a thread
of the log leads for it.

Unknown outcome: if the commit's own result is lost, the caller gets OutcomeUnknown and may repeat
with the same idempotency key; the repeat takes the row lock before it looks.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import pyarrow as pa

from ochredb.cancel import Cancel, Cancelled
from ochredb.catalog.database import Database
from ochredb.catalog.logs import AppendRequest, LogTable
from ochredb.catalog.namespace import LOCK_LOG
from ochredb.catalog.repeats import named
from ochredb.checksum import signed, xxh3
from ochredb.crash_points import reach
from ochredb.errors import (
    DeadlineExceeded,
    Exhausted,
    NotFound,
    OchreError,
    OutcomeUnknown,
    OutOfMemory,
    Unavailable,
)
from ochredb.fragment import check, encode
from ochredb.ids import IdSource
from ochredb.recent import own_copy
from ochredb.storage.base import ObjectStore
from ochredb.storage.space import Reserve
from ochredb.types import Appended, Op, Operations
from ochredb_log.config import LogConfig
from ochredb_log.flush import Delivery, Flusher, Waiting, copy_of

log = logging.getLogger("ochredb.log")

_MAKE_ROOM_ATTEMPTS_MAX = 10
_CLOSE_WAIT_S = 30.0
# What a repeat may fail with before the log was asked whether the first attempt had landed.
_NOT_LOOKED_AT = (Exhausted, Unavailable, Cancelled, DeadlineExceeded)


class LogService:
    """`ochredb.peers.Log` in this process. Thread-safe; `on_append` is told what was written."""

    def __init__(
        self,
        database: Database,
        table: LogTable,
        store: ObjectStore,
        ids: IdSource,
        config: LogConfig,
        *,
        on_append: Callable[[str, int], None] = lambda _collection, _last_offset: None,
        make_room: Callable[[str], None] | None = None,
        reserve: Reserve | None = None,
    ) -> None:
        """make_room: an embedded engine's own compaction, run when the backlog is full."""
        self._reserve = reserve or Reserve()
        self._database, self._table = database, table
        self._flusher = Flusher(table, store, ids, config, self._reserve)
        self._ids, self._config = ids, config
        self._on_append, self._make_room = on_append, make_room
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._queue: deque[Waiting] = deque()
        self._flushing = self._closed = False
        self._turns: queue.SimpleQueue[bool] = queue.SimpleQueue()  # Of the log's own thread.
        self._thread: threading.Thread | None = None

    def close(self, timeout_s: float = _CLOSE_WAIT_S) -> None:
        """Take nothing more, flush what was taken, let the log's own thread end.

        What still waits after `timeout_s`, behind a disk that does not answer, is refused.
        """
        with self._lock:
            self._closed = True
            self._idle.wait_for(lambda: not self._flushing, timeout_s)
            late = list(self._queue)
            self._queue.clear()
        for waiting in late:
            waiting.outcome = waiting.unknown or Unavailable("the database was closed before this")
            self._tell(waiting)
        if self._thread is not None:
            self._turns.put(False)
            self._thread.join(_CLOSE_WAIT_S if not late else 0)
            if self._thread.is_alive():
                log.warning("closing while the disk has not answered a write")
            self._thread = None

    def append(
        self,
        collection_id: str,
        operations: Operations,
        *,
        idempotency_key: str | None = None,
        request_hash: bytes | None = None,
        request_id: str | None = None,
        expect_last_offset: int | None = None,
        cancel: Cancel,
    ) -> Appended:
        """See `ochredb.peers.Log.append`. Cost: encoding, then a share of one or three fsyncs."""
        cancel.check()
        if operations.op is not Op.DELETE:
            self._reserve.check()
        check(operations)
        payload = encode(operations)
        request = self._request(
            collection_id,
            operations,
            payload,
            idempotency_key,
            request_hash,
            request_id,
            expect_last_offset,
        )
        kept = own_copy(operations, payload.size)
        appended = self._with_room(
            collection_id, cancel, lambda: self._append_resolved(request, kept, payload, cancel)
        )
        if not appended.repeated:
            self._tell_appended(collection_id, appended.last_offset)
        return appended

    def submit(
        self,
        collection_id: str,
        operations: Operations,
        *,
        idempotency_key: str | None = None,
        request_id: str | None = None,
        cancel: Cancel,
        deliver: Delivery,
    ) -> None:
        """See `ochredb.peers.Log.submit`. Cost: encoding, about 0.1 ms for a few records."""
        cancel.check()
        if operations.op is not Op.DELETE:
            self._reserve.check()
        check(operations)
        payload = encode(operations)
        request = self._request(
            collection_id, operations, payload, idempotency_key, None, request_id, None
        )
        kept = own_copy(operations, payload.size)
        self._submit(Waiting(request, kept, payload, cancel, deliver=deliver))

    def append_evaluated(
        self,
        collection_id: str,
        evaluate: Callable[[], Operations],
        *,
        idempotency_key: str | None = None,
        request_hash: bytes | None = None,
        request_id: str | None = None,
        cancel: Cancel,
    ) -> Appended:
        """See `ochredb.peers.Log.append_evaluated`.

        Holds the collection's lock while `evaluate` reads: the last resort of a conditional write
        that kept losing, because it delays the other writers.
        """
        appended = self._with_room(
            collection_id,
            cancel,
            lambda: self._append_evaluated(
                collection_id, evaluate, idempotency_key, request_hash, request_id
            ),
        )
        if appended.last_offset >= appended.first_offset and not appended.repeated:
            self._tell_appended(collection_id, appended.last_offset)
        return appended

    def _append_evaluated(
        self,
        collection_id: str,
        evaluate: Callable[[], Operations],
        key: str | None,
        request_hash: bytes | None,
        request_id: str | None,
    ) -> Appended:
        with self._database.write("append-evaluated") as session:
            if session.one(LOCK_LOG, collection=collection_id) is None:
                raise NotFound(f"Collection [{collection_id}] does not exist.")
            # What a repeat finds now is not what the first attempt found.
            first = self._table.repeated_locked(
                session, collection_id, key, request_hash, request_id
            )
            if first is not None:
                return first
            operations = evaluate()
            if len(operations) == 0 and key is not None and request_hash is not None:
                return self._table.record_nothing_locked(session, collection_id, key, request_hash)
            last = self._table.snapshot(collection_id).last_offset
            if len(operations) == 0:
                return Appended(last + 1, last)
            check(operations)
            payload = encode(operations)
            request = self._request(
                collection_id, operations, payload, key, request_hash, request_id, None
            )
            # Inline whatever its size: nothing waits for a store inside a transaction.
            request = replace(request, payload=payload.to_pybytes())
            return self._table.append_locked(session, request)

    def _with_room(
        self, collection_id: str, cancel: Cancel, attempt: Callable[[], Appended]
    ) -> Appended:
        """An embedded engine compacts by itself when the backlog is full, as often as it takes."""
        for _ in range(_MAKE_ROOM_ATTEMPTS_MAX):
            cancel.check()
            try:
                return attempt()
            except Exhausted:
                if self._make_room is None:
                    raise
                self._make_room(collection_id)
        return attempt()

    def repeated(self, collection_id: str, key: str, request_hash: bytes) -> Appended | None:
        """See `ochredb.peers.Log.repeated`."""
        return self._table.repeated(collection_id, key, request_hash)

    def record_nothing(self, collection_id: str, key: str, request_hash: bytes) -> Appended:
        """See `ochredb.peers.Log.record_nothing`."""
        return self._table.record_nothing(collection_id, key, request_hash)

    def _request(
        self,
        collection_id: str,
        operations: Operations,
        payload: pa.Buffer,
        key: str | None,
        request_hash: bytes | None,
        request_id: str | None,
        expect_last_offset: int | None,
    ) -> AppendRequest:
        checksum = xxh3(memoryview(payload))
        if key is not None and request_hash is None:
            request_hash = checksum.to_bytes(8, "little")
        if key is None:
            key, request_hash = self._ids.uuid7() if request_id is None else named(request_id), None
        return AppendRequest(
            collection=collection_id,
            request_id=key,
            request_hash=request_hash,
            count=len(operations),
            dimension=operations.dimension,
            key_types=operations.key_types,
            expect_last_offset=expect_last_offset,
            payload=None,
            object_key=None,
            byte_start=None,
            byte_stop=None,
            object_bytes=0,
            byte_count=payload.size,
            checksum=signed(checksum),
            # Not of this node's knowing: another may have had it before.
            may_be_repeat=request_id is not None,
        )

    # -- group commit

    def _append_resolved(
        self, request: AppendRequest, operations: Operations, payload: pa.Buffer, cancel: Cancel
    ) -> Appended:
        """Append; if the commit's result is lost, ask once more with the same request id.

        The repeat waits for the row lock before it looks, so what it finds is the truth.
        """
        try:
            return self._append(request, operations, payload, cancel)
        except OutcomeUnknown as unknown:
            again = replace(request, may_be_repeat=True)
            try:
                return self._append(again, operations, payload, cancel)
            except _NOT_LOOKED_AT:
                raise unknown from None  # Nobody knows yet.

    def _append(
        self, request: AppendRequest, operations: Operations, payload: pa.Buffer, cancel: Cancel
    ) -> Appended:
        waiting = Waiting(request, operations, payload, cancel)
        self._enqueue(waiting)
        if not waiting.leads:
            try:
                waiting.done.wait()
            except BaseException:  # An interrupt: do not leave the others without a leader.
                self._abandon(waiting)
                raise
        if waiting.leads:
            self._lead()
        outcome = waiting.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome is not None
        return outcome

    def _enqueue(self, waiting: Waiting) -> None:
        """Put it into the queue; it leads if no flush is running. Raises Exhausted."""
        with self._lock:
            if self._closed:
                raise Unavailable("the database was closed")
            if len(self._queue) >= self._config.queue_requests_max:
                raise Exhausted(f"{len(self._queue)} writes are waiting already")
            self._queue.append(waiting)
            waiting.leads = not self._flushing
            self._flushing = True

    def _submit(self, waiting: Waiting) -> None:
        thread = self._thread
        if thread is None or not thread.is_alive():  # Not yet, or it stayed behind at a fork.
            with self._lock:
                if self._thread is thread:  # Else another submitter was quicker: one is enough.
                    thread = threading.Thread(target=self._run, name="ochredb-log", daemon=True)
                    try:
                        thread.start()
                    except RuntimeError as error:  # Nothing is in the queue yet.
                        raise OutOfMemory(f"no thread for the log: {error}") from error
                    self._thread = thread
        self._enqueue(waiting)
        if waiting.leads:
            self._turns.put(True)

    def _run(self) -> None:
        while self._turns.get():
            self._lead()

    def _take_again(self, batch: Sequence[Waiting]) -> set[Waiting]:
        """Those submitted requests whose outcome is not known: as in `_append_resolved`.

        Their repeats are put at the head of the queue, where they were.
        """
        if self._closed:
            return set()
        doubtful: set[Waiting] = set()
        repeats: list[Waiting] = []
        for waiting in batch:
            outcome = waiting.outcome
            if waiting.deliver is None or waiting.unknown is not None:
                continue
            if isinstance(outcome, OutcomeUnknown):
                again = replace(waiting.request, may_be_repeat=True)
                repeats.append(replace(waiting, request=again, leads=False, unknown=outcome))
                doubtful.add(waiting)
        if repeats:
            with self._lock:
                self._queue.extendleft(reversed(repeats))
        return doubtful

    def _tell(self, waiting: Waiting) -> None:
        """Give a request its outcome."""
        if waiting.deliver is None:
            waiting.done.set()
            return
        if waiting.unknown is not None and isinstance(waiting.outcome, _NOT_LOOKED_AT):
            waiting.outcome = waiting.unknown  # Nobody knows yet.
        assert waiting.outcome is not None
        try:
            waiting.deliver(waiting.outcome)
        except Exception:  # Others are told all the same.
            log.exception("the outcome of a submitted write could not be told")

    def _tell_appended(self, collection_id: str, last_offset: int) -> None:
        """What listeners fail with is no matter of the write, which is durable."""
        try:
            self._on_append(collection_id, last_offset)
        except Exception:
            log.exception("a listener of writes to collection %s failed", collection_id)

    def _lead(self) -> None:
        """Flush one batch, then hand the lead to the first request that came meanwhile."""
        batch = self._take_batch()
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
            again = self._take_again(batch)
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
            self._hand_over()
            for collection, last_offset in told.items():
                self._tell_appended(collection, last_offset)

    def _remember(self, batch: Sequence[Waiting]) -> None:
        """Spare the readers of these writes the way through the log."""
        try:
            for waiting in batch:
                outcome = waiting.outcome
                if isinstance(outcome, Appended) and not outcome.repeated:
                    self._table.recent.put(
                        waiting.request.collection,
                        outcome.first_offset,
                        waiting.operations,
                        waiting.payload.size,
                    )
        except Exception:  # No memory, for one. The writes are durable, and read from the log.
            log.exception("writes could not be kept for their readers")

    def _hand_over(self) -> None:
        """Let the first request in the queue lead the next flush."""
        with self._lock:
            if not self._queue:
                self._flushing = False
                self._idle.notify_all()
                return
            successor = self._queue[0]
            successor.leads = True
        if successor.deliver is None:
            successor.done.set()
        else:
            self._turns.put(True)

    def _abandon(self, waiting: Waiting) -> None:
        """Its thread will not wait any longer. In the queue still, it is not written."""
        with self._lock:
            if waiting in self._queue:
                self._queue.remove(waiting)
            leads = waiting.leads
        if leads:
            self._hand_over()

    def _take_batch(self) -> list[Waiting]:
        batch: list[Waiting] = []
        size = 0
        with self._lock:
            while self._queue:
                size += self._queue[0].payload.size
                if batch and size > self._config.flush_bytes_max:
                    break
                batch.append(self._queue.popleft())
        return batch

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
