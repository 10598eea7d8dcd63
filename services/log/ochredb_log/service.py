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
from dataclasses import dataclass, field, replace

import pyarrow as pa

from ochredb.cancel import Cancel, Cancelled
from ochredb.catalog.database import Database
from ochredb.catalog.logs import AppendRequest, LogTable
from ochredb.catalog.namespace import LOCK_LOG
from ochredb.catalog.objects import Swept
from ochredb.checksum import signed, xxh3
from ochredb.errors import (
    DeadlineExceeded,
    Exhausted,
    Internal,
    NotFound,
    OchreError,
    OutcomeUnknown,
    Unavailable,
)
from ochredb.fragment import check, encode
from ochredb.ids import IdSource
from ochredb.recent import own_copy
from ochredb.storage.base import ObjectStore
from ochredb.types import Appended, Operations
from ochredb_log.config import LogConfig

log = logging.getLogger("ochredb.log")

_MAKE_ROOM_ATTEMPTS_MAX = 10
_SWEPT_ATTEMPTS_MAX = 3
# What a repeat may fail with before the log was asked whether the first attempt had landed.
_NOT_LOOKED_AT = (Exhausted, Unavailable, Cancelled, DeadlineExceeded)


Delivery = Callable[[Appended | BaseException], None]


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request in the queue. `outcome` is set before `done`."""

    request: AppendRequest
    operations: Operations
    payload: pa.Buffer
    cancel: Cancel
    done: threading.Event = field(default_factory=threading.Event)
    leads: bool = False
    outcome: Appended | BaseException | None = None
    deliver: Delivery | None = None  # Of a submitted request, for which no thread waits.
    unknown: OutcomeUnknown | None = None  # What the first attempt of a submitted request ended in.


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
    ) -> None:
        """make_room: an embedded engine's own compaction, run when the backlog is full."""
        self._database, self._table, self._store = database, table, store
        self._ids, self._config = ids, config
        self._on_append, self._make_room = on_append, make_room
        self._lock = threading.Lock()
        self._queue: deque[_Waiting] = deque()
        self._flushing = False
        self._turns: queue.SimpleQueue[bool] = queue.SimpleQueue()  # Of the log's own thread.
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """Let the log's own thread end; nothing may be submitted any more."""
        if self._thread is not None:
            self._turns.put(False)
            self._thread.join()
            self._thread = None

    def append(
        self,
        collection_id: str,
        operations: Operations,
        *,
        idempotency_key: str | None = None,
        request_hash: bytes | None = None,
        expect_last_offset: int | None = None,
        cancel: Cancel,
    ) -> Appended:
        """See `ochredb.peers.Log.append`. Cost: encoding, then a share of one or three fsyncs."""
        cancel.check()
        check(operations)
        payload = encode(operations)
        request = self._request(
            collection_id, operations, payload, idempotency_key, request_hash, expect_last_offset
        )
        kept = own_copy(operations)
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
        cancel: Cancel,
        deliver: Delivery,
    ) -> None:
        """See `ochredb.peers.Log.submit`. Cost: encoding, about 0.1 ms for a few records."""
        cancel.check()
        check(operations)
        payload = encode(operations)
        request = self._request(collection_id, operations, payload, idempotency_key, None, None)
        self._submit(_Waiting(request, own_copy(operations), payload, cancel, deliver=deliver))

    def append_evaluated(
        self,
        collection_id: str,
        evaluate: Callable[[], Operations],
        *,
        idempotency_key: str | None = None,
        request_hash: bytes | None = None,
        cancel: Cancel,
    ) -> Appended:
        """See `ochredb.peers.Log.append_evaluated`.

        Holds the collection's lock while `evaluate` reads: the last resort of a conditional write
        that kept losing, because it delays the other writers.
        """
        appended = self._with_room(
            collection_id,
            cancel,
            lambda: self._append_evaluated(collection_id, evaluate, idempotency_key, request_hash),
        )
        if appended.last_offset >= appended.first_offset:
            self._tell_appended(collection_id, appended.last_offset)
        return appended

    def _append_evaluated(
        self,
        collection_id: str,
        evaluate: Callable[[], Operations],
        key: str | None,
        request_hash: bytes | None,
    ) -> Appended:
        with self._database.write() as session:
            if session.one(LOCK_LOG, collection=collection_id) is None:
                raise NotFound(f"Collection [{collection_id}] does not exist.")
            operations = evaluate()
            last = self._table.snapshot(collection_id).last_offset
            if len(operations) == 0:
                return Appended(last + 1, last)
            check(operations)
            payload = encode(operations)
            request = self._request(collection_id, operations, payload, key, request_hash, None)
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

    def record_nothing(self, collection_id: str, key: str, request_hash: bytes) -> None:
        """See `ochredb.peers.Log.record_nothing`."""
        self._table.record_nothing(collection_id, key, request_hash)

    def _request(
        self,
        collection_id: str,
        operations: Operations,
        payload: pa.Buffer,
        key: str | None,
        request_hash: bytes | None,
        expect_last_offset: int | None,
    ) -> AppendRequest:
        checksum = xxh3(memoryview(payload))
        if key is not None and request_hash is None:
            request_hash = checksum.to_bytes(8, "little")
        return AppendRequest(
            collection=collection_id,
            request_id=key if key is not None else self._ids.uuid7(),
            request_hash=None if key is None else request_hash,
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
        waiting = _Waiting(request, operations, payload, cancel)
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

    def _enqueue(self, waiting: _Waiting) -> None:
        """Put it into the queue; it leads if no flush is running. Raises Exhausted."""
        with self._lock:
            if len(self._queue) >= self._config.queue_requests_max:
                raise Exhausted(f"{len(self._queue)} writes are waiting already")
            self._queue.append(waiting)
            waiting.leads = not self._flushing
            self._flushing = True

    def _submit(self, waiting: _Waiting) -> None:
        thread = self._thread
        if thread is None or not thread.is_alive():  # Not yet, or it stayed behind at a fork.
            with self._lock:
                if self._thread is thread:  # Else another submitter was quicker: one is enough.
                    thread = threading.Thread(target=self._run, name="ochredb-log", daemon=True)
                    thread.start()  # If it cannot, nothing is in the queue yet.
                    self._thread = thread
        self._enqueue(waiting)
        if waiting.leads:
            self._turns.put(True)

    def _run(self) -> None:
        while self._turns.get():
            self._lead()

    def _deliver(self, waiting: _Waiting) -> None:
        """Tell a submitted request's outcome, or try again as `_append_resolved` does."""
        outcome, unknown = waiting.outcome, waiting.unknown
        assert outcome is not None and waiting.deliver is not None
        if isinstance(outcome, OutcomeUnknown) and unknown is None:
            again = replace(waiting.request, may_be_repeat=True)
            try:
                self._submit(replace(waiting, request=again, leads=False, unknown=outcome))
            except Exception:  # No room, for one: then it stays unknown.
                waiting.deliver(outcome)
            return
        if unknown is not None and isinstance(outcome, _NOT_LOOKED_AT):
            outcome = waiting.outcome = unknown  # Nobody knows yet.
        waiting.deliver(outcome)

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
            self._remember(batch, outcomes)
        except BaseException as error:
            outcomes = [_copy_of(error) for _ in batch]
            if not isinstance(error, Exception):
                raise
        finally:
            for waiting, outcome in zip(batch, outcomes, strict=True):
                waiting.outcome = outcome
            told: dict[str, int] = {}
            for waiting in batch:
                if waiting.deliver is None:
                    waiting.done.set()
                    continue
                done = waiting.outcome
                if isinstance(done, Appended) and not done.repeated:
                    collection = waiting.request.collection
                    told[collection] = max(told.get(collection, 0), done.last_offset)
                try:
                    self._deliver(waiting)
                except Exception:  # The others of the batch are told all the same.
                    log.exception("the outcome of a submitted write could not be told")
            self._hand_over()
            for collection, last_offset in told.items():
                self._tell_appended(collection, last_offset)

    def _remember(
        self, batch: Sequence[_Waiting], outcomes: Sequence[Appended | BaseException]
    ) -> None:
        """Spare the readers of these writes the way through the log."""
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Appended) and not outcome.repeated:
                self._table.recent.put(
                    waiting.request.collection,
                    outcome.first_offset,
                    waiting.operations,
                    waiting.payload.size,
                )

    def _hand_over(self) -> None:
        """Let the first request in the queue lead the next flush."""
        with self._lock:
            if not self._queue:
                self._flushing = False
                return
            successor = self._queue[0]
            successor.leads = True
        if successor.deliver is None:
            successor.done.set()
        else:
            self._turns.put(True)

    def _abandon(self, waiting: _Waiting) -> None:
        """Its thread will not wait any longer. In the queue still, it is not written."""
        with self._lock:
            if waiting in self._queue:
                self._queue.remove(waiting)
            leads = waiting.leads
        if leads:
            self._hand_over()

    def _take_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        with self._lock:
            while self._queue:
                size += self._queue[0].payload.size
                if batch and size > self._config.flush_bytes_max:
                    break
                batch.append(self._queue.popleft())
        return batch

    def _flush_wanted(self, batch: list[_Waiting]) -> list[Appended | OchreError]:
        """Flush those that are still wanted: some may have waited for too long."""
        refused: dict[int, OchreError] = {}
        for number, waiting in enumerate(batch):
            try:
                waiting.cancel.check()
            except OchreError as error:
                refused[number] = error
        if not refused:
            return self._flush(batch)
        wanted = [waiting for number, waiting in enumerate(batch) if number not in refused]
        flushed = iter(self._flush(wanted) if wanted else [])
        return [refused.get(number) or next(flushed) for number in range(len(batch))]

    def _flush(self, batch: list[_Waiting]) -> list[Appended | OchreError]:
        """Bytes durable first, then the commit that points at them.

        Who slept past the orphan sweep finds its object swept: it writes it again, elsewhere.
        """
        outcomes = self._flush_once(batch)
        for _ in range(_SWEPT_ATTEMPTS_MAX):
            again = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Swept)]
            if not again:
                break
            try:
                repeated = self._flush_once([batch[i] for i in again])
            except OchreError as error:  # Only theirs: the others of the batch are committed.
                repeated = [type(error)(str(error), **error.detail) for _ in again]
            for i, outcome in zip(again, repeated, strict=True):
                outcomes[i] = outcome
        return outcomes

    def _flush_once(self, batch: list[_Waiting]) -> list[Appended | OchreError]:
        requests: list[AppendRequest] = []
        pieces: list[memoryview] = []
        size = 0
        object_key = ""
        for waiting in batch:
            data = waiting.payload
            if data.size <= self._config.inline_bytes_max:
                requests.append(replace(waiting.request, payload=data.to_pybytes()))
                continue
            object_key = object_key or f"fragments/{self._ids.uuid7()}"
            requests.append(
                replace(
                    waiting.request,
                    object_key=object_key,
                    byte_start=size,
                    byte_stop=size + data.size,
                )
            )
            pieces.append(memoryview(data))
            size += data.size
        if pieces:
            self._store.create(object_key, pieces)
            requests = [replace(r, object_bytes=size) if r.object_key else r for r in requests]
        return self._table.append(requests)


def _copy_of(error: BaseException) -> BaseException:
    """One exception object for each waiting thread: a shared one would mix their tracebacks."""
    if isinstance(error, OchreError):
        copy = type(error)(str(error), **error.detail)
        copy.__cause__ = error
        return copy
    text = f"{type(error).__name__}: {error}"
    if not isinstance(error, Exception):  # An interrupt: perhaps just after the commit.
        return OutcomeUnknown(f"the flush was interrupted: {text}")
    return Internal(f"the flush failed: {text}")
