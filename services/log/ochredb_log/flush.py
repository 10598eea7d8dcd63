"""One flush: large payloads to one object, then one transaction that points at them (I1, I3)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pyarrow as pa

from ochredb.cancel import Cancel
from ochredb.catalog.logs import AppendRequest, LogTable
from ochredb.catalog.objects import Swept
from ochredb.crash_points import reach
from ochredb.errors import Internal, OchreError, OutcomeUnknown, OutOfMemory, StorageFull
from ochredb.ids import IdSource
from ochredb.storage.base import ObjectStore
from ochredb.storage.space import Reserve
from ochredb.types import Appended, Op, Operations
from ochredb_log.config import LogConfig

_SWEPT_ATTEMPTS_MAX = 3

Delivery = Callable[[Appended | BaseException], None]


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue. `outcome` is set before `done`."""

    request: AppendRequest
    operations: Operations
    payload: pa.Buffer
    cancel: Cancel
    # The name is looked up when it is called: a simulation has events of its own.
    done: threading.Event = field(default_factory=lambda: threading.Event())
    leads: bool = False
    outcome: Appended | BaseException | None = None
    deliver: Delivery | None = None  # Of a submitted request, for which no thread waits.
    unknown: OutcomeUnknown | None = None  # What the first attempt of a submitted request ended in.


class Flusher:
    """Writes batches; says of each request what became of it."""

    def __init__(
        self,
        table: LogTable,
        store: ObjectStore,
        ids: IdSource,
        config: LogConfig,
        reserve: Reserve,
    ) -> None:
        self._table, self._store, self._ids, self._config = table, store, ids, config
        self._reserve = reserve

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

    def _flush_once(self, batch: list[Waiting]) -> list[Appended | OchreError]:
        try:
            requests = self._stored(batch)
        except MemoryError as error:
            raise OutOfMemory("not enough memory to write this now; retry later") from error
        return self._table.append(requests)

    def _stored(self, batch: list[Waiting]) -> list[AppendRequest]:
        """The requests with their payloads, of which the large ones are now in the store."""
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
            reach("flush.object-created")
            requests = [replace(r, object_bytes=size) if r.object_key else r for r in requests]
        return requests


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
