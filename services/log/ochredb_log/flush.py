"""One flush: large payloads to one object, then one transaction that points at them (I1, I3)."""

from __future__ import annotations

from dataclasses import replace

from ochredb.catalog.appends import AppendRequest
from ochredb.catalog.logs import LogTable
from ochredb.catalog.objects import Introduction, Swept
from ochredb.crash_points import reach
from ochredb.errors import (
    Internal,
    OchreError,
    OutcomeUnknown,
    OutOfMemory,
    StorageFull,
    Unavailable,
)
from ochredb.ids import IdSource
from ochredb.storage.base import ObjectStore
from ochredb.storage.space import Reserve
from ochredb.types import Appended, Op
from ochredb_log.line import Waiting

_SWEPT_ATTEMPTS_MAX = 3


class Flusher:
    """Writes batches; says of each request what became of it."""

    def __init__(
        self,
        table: LogTable,
        store: ObjectStore,
        ids: IdSource,
        reserve: Reserve,
        *,
        waits_for_locks: bool,
    ) -> None:
        """waits_for_locks: else a request whose collection is locked elsewhere ends in Busy."""
        self._table, self._store, self._ids, self._reserve = table, store, ids, reserve
        self._waits_for_locks = waits_for_locks

    def flush(self, batch: list[Waiting]) -> list[Appended | OchreError]:
        """Flush; on a full disk the deletes alone, into the space that was kept back for them."""
        try:
            return self._flush_all(batch)
        except StorageFull as full:
            deletes = [waiting for waiting in batch if waiting.operations.op is Op.DELETE]
            if not deletes:
                raise
            flushed = iter(self._reserve.freeing(lambda: self._flush_all(deletes)))
            refusals = (StorageFull(str(full), **full.detail) for _ in batch)
            return [
                next(flushed) if waiting.operations.op is Op.DELETE else next(refusals)
                for waiting in batch
            ]

    def _flush_all(self, batch: list[Waiting]) -> list[Appended | OchreError]:
        """Bytes durable first, then the commit that points at them.

        Who slept past the orphan sweep finds its object swept: it writes it again, elsewhere. So
        does who was kept waiting while the others in its object were folded and it was collected.
        """
        outcomes = self._flush_once(batch)
        for _ in range(_SWEPT_ATTEMPTS_MAX):
            again = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Swept)]
            if not again:
                break
            for i in again:
                batch[i].stored = None
            try:
                repeated = self._flush_once([batch[i] for i in again])
            except OchreError as error:  # Only theirs: the others of the batch are committed.
                repeated = [type(error)(str(error), **error.detail) for _ in again]
            for i, outcome in zip(again, repeated, strict=True):
                outcomes[i] = outcome
        # To the writer a swept object is no conflict: nobody changed what it looked at.
        return [_never_kept(one) if isinstance(one, Swept) else one for one in outcomes]

    def _flush_once(self, batch: list[Waiting]) -> list[Appended | OchreError]:
        try:
            requests = self._stored(batch)
        except MemoryError as error:
            raise OutOfMemory("not enough memory to write this now; retry later") from error
        if self._waits_for_locks or any(waiting.alone for waiting in batch):
            return self._table.append(requests)
        return self._table.append(requests, skip_locked=True)

    def _stored(self, batch: list[Waiting]) -> list[AppendRequest]:
        """The requests with their payloads, of which the large ones are now in the store."""
        stored: list[AppendRequest] = []
        pieces: list[memoryview] = []
        size = 0
        object_key, introduction = "", Introduction()
        for waiting in batch:
            request, data = waiting.stored, waiting.payload
            if request is None and not waiting.is_large:
                request = replace(waiting.request, payload=data.to_pybytes(), cancel=waiting.cancel)
            elif request is None:
                object_key = object_key or f"fragments/{self._ids.uuid7()}"
                request = replace(
                    waiting.request,
                    object_key=object_key,
                    byte_start=size,
                    byte_stop=size + data.size,
                    introduction=introduction,
                    cancel=waiting.cancel,
                )
                pieces.append(memoryview(data))
                size += data.size
            stored.append(request)
        if pieces:
            self._store.create(object_key, pieces)
            reach("flush.object-created")
            stored = [
                replace(request, object_bytes=size) if request.object_key == object_key else request
                for request in stored
            ]
        for waiting, request in zip(batch, stored, strict=True):
            waiting.stored = request
        return stored


def _never_kept(swept: Swept) -> Unavailable:
    return Unavailable(
        f"each time it was to be committed, its object had been swept: nothing was changed; retry"
        f" later, and compare the clocks of the store and the catalog ({swept})"
    )


def copy_of(error: BaseException) -> BaseException:
    """One exception object for each waiting thread: a shared one would mix their tracebacks."""
    if isinstance(error, OchreError):
        copy = type(error)(str(error), **error.detail)
        copy.__cause__ = error
        return copy
    text = f"{type(error).__name__}: {error}"
    # An interrupt, or no memory: perhaps just after the commit.
    if not isinstance(error, Exception) or isinstance(error, MemoryError):
        return OutcomeUnknown(f"the flush was interrupted: {text}")
    return Internal(f"the flush failed: {text}")
