"""Durable, ordered appends: requests are encoded, put in line, and committed in groups (I1, I2).

A catalog of this machine has one flush at a time, one that others share a few: offsets are taken at
the commit, so it does not matter which comes first. A collection that another process has locked
is skipped: its requests get a flush that waits for the lock and keeps nobody else. See `line.py`,
`group_commit.py`, `flush.py`.

Unknown outcome: if the commit's own result is lost, the caller gets OutcomeUnknown and may repeat
with the same idempotency key; the repeat takes the row lock before it looks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa

from ochredb.cancel import Cancel
from ochredb.catalog.appends import AppendRequest
from ochredb.catalog.database import Database, whole
from ochredb.catalog.logs import LogTable
from ochredb.catalog.namespace import LOCK_LOG
from ochredb.catalog.repeats import named
from ochredb.checksum import signed, xxh3
from ochredb.errors import (
    Exhausted,
    NotFound,
    OutcomeUnknown,
)
from ochredb.fragment import check, encode
from ochredb.ids import IdSource
from ochredb.recent import own_copy
from ochredb.storage.base import ObjectStore
from ochredb.storage.space import Reserve
from ochredb.types import Appended, Op, Operations
from ochredb_log.config import LogConfig
from ochredb_log.flush import Flusher
from ochredb_log.group_commit import CLOSE_WAIT_S, NOT_LOOKED_AT, GroupCommit
from ochredb_log.line import Delivery, Line, Waiting

log = logging.getLogger("ochredb.log")

_MAKE_ROOM_ATTEMPTS_MAX = 10


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
        self._db, self._table = database, table
        is_local = database.is_local
        self._inline_bytes_max = config.inline_bytes(is_local)
        self._ids = ids
        self._on_append, self._make_room = on_append, make_room
        line = Line(
            flushes_max=1 if is_local else config.flushes_max,
            flush_bytes_max=config.flush_bytes_max,
            requests_max=config.queue_requests_max,
        )
        flusher = Flusher(table, store, ids, self._reserve, waits_for_locks=is_local)
        self._commits = GroupCommit(flusher, table, line, self._tell_appended)

    def close(self, timeout_s: float = CLOSE_WAIT_S) -> None:
        """Take nothing more, flush what was taken, let the log's own threads end.

        What still waits after `timeout_s`, behind a disk that does not answer, is refused.
        """
        self._commits.close(timeout_s)

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
        self._commits.submit(self._waiting(request, kept, payload, cancel, deliver))

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

    @whole
    def _append_evaluated(
        self,
        collection_id: str,
        evaluate: Callable[[], Operations],
        key: str | None,
        request_hash: bytes | None,
        request_id: str | None,
    ) -> Appended:
        with self._db.write("append-evaluated") as session:
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

    def repeated(
        self, collection_id: str, key: str, request_hash: bytes, *, cancel: Cancel
    ) -> Appended | None:
        """See `ochredb.peers.Log.repeated`."""
        cancel.check()
        return self._table.repeated(collection_id, key, request_hash)

    def record_nothing(
        self, collection_id: str, key: str, request_hash: bytes, *, cancel: Cancel
    ) -> Appended:
        """See `ochredb.peers.Log.record_nothing`."""
        cancel.check()
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
            key, request_hash = request_id or self._ids.uuid7(), None
            # On the way to a catalog elsewhere an answer may be lost for as long as a fold takes.
            if request_id is not None or not self._db.is_local:
                key = named(key)
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
            return self._commits.append(self._waiting(request, operations, payload, cancel))
        except OutcomeUnknown as unknown:
            again = replace(request, may_be_repeat=True)
            try:
                return self._commits.append(self._waiting(again, operations, payload, cancel))
            except NOT_LOOKED_AT:
                raise unknown from None  # Nobody knows yet.

    def _waiting(
        self,
        request: AppendRequest,
        operations: Operations,
        payload: pa.Buffer,
        cancel: Cancel,
        deliver: Delivery | None = None,
    ) -> Waiting:
        is_large = payload.size > self._inline_bytes_max
        return Waiting(request, operations, payload, cancel, is_large, deliver=deliver)

    def _tell_appended(self, collection_id: str, last_offset: int) -> None:
        """What listeners fail with is no matter of the write, which is durable."""
        try:
            self._on_append(collection_id, last_offset)
        except Exception:
            log.exception("a listener of writes to collection %s failed", collection_id)
