"""The appends of one transaction: locked, decided by data, written (I2, I3, I8).

The logs of all collections are locked first, then it is looked up which requests were applied
already, then every request is decided without another look, then the rows are written. So a flush
costs a few round trips however many requests and collections it has. What is refused is refused
alone, before anything of it was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ochredb.cancel import Cancel
from ochredb.catalog import mark, repeats
from ochredb.catalog import objects as object_table
from ochredb.catalog.core import BindParameter, bindparam, insert, select, update
from ochredb.catalog.database import Database, Session, check_key
from ochredb.catalog.keys import Known, MetadataKeys
from ochredb.catalog.schema import fragments, logs
from ochredb.catalog.statement import Statement
from ochredb.errors import (
    Conflict,
    Exhausted,
    InvalidArgument,
    NotFound,
    OchreError,
    Unavailable,
)
from ochredb.types import Appended

_collection: BindParameter[Any] = bindparam("collection")
_locked = select(
    logs.c.dimension,
    logs.c.next_offset,
    logs.c.indexed_offset,
    logs.c.tail_bytes,
    logs.c.time_us,
    logs.c.revision,
).where(logs.c.collection == _collection)
_LOCK = Statement(_locked.with_for_update())
_LOCK_FREE = Statement(_locked.with_for_update(skip_locked=True))
_ADVANCE = Statement(
    update(logs)
    .where(logs.c.collection == bindparam("log"))
    .values(
        next_offset=bindparam("new_next"),
        dimension=bindparam("new_dimension"),
        tail_bytes=bindparam("new_tail_bytes"),
        time_us=bindparam("new_time"),
    )
)
_INSERT_FRAGMENT = Statement(insert(fragments))


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendRequest:
    """One request on its way into the log; `count` operations, `byte_count` encoded bytes.

    request_hash: None for a key that the server made itself (the fragment row is its record).
    """

    collection: str
    request_id: str
    request_hash: bytes | None
    count: int
    dimension: int | None
    key_types: frozenset[tuple[str, str]]
    expect_last_offset: int | None
    payload: bytes | None
    object_key: str | None
    byte_start: int | None
    byte_stop: int | None
    object_bytes: int  # Size of the whole object, shared by the requests of a flush.
    introduction: object_table.Introduction = field(default_factory=object_table.Introduction)
    byte_count: int
    checksum: int
    may_be_repeat: bool = False  # An earlier attempt under this id may have been applied.
    # Asked under the lock: who slept through its deadline finds that its name has expired.
    cancel: Cancel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BacklogLimits:
    """Above these a collection's log takes no more until compaction has caught up."""

    tail_rows_max: int = 200_000
    tail_bytes_max: int = 512 << 20


class Busy(Unavailable):
    """Another transaction holds the lock of the collection's log; nothing was decided."""


@dataclass(slots=True)
class _Log:
    """A collection's row, which is locked; it moves on with what is appended."""

    dimension: int | None
    next_offset: int
    indexed_offset: int
    tail_bytes: int
    time_us: int
    revision: int


class Appends:
    """For one transaction. new_keys: metadata keys that it inserts, for when it has committed."""

    def __init__(
        self,
        session: Session,
        database: Database,
        limits: BacklogLimits,
        keys: MetadataKeys,
        now_us: int,
    ) -> None:
        self._session, self._database, self._limits = session, database, limits
        self._keys, self._now_us = keys, now_us
        self.new_keys: list[Known] = []

    def append(
        self, requests: Sequence[AppendRequest], *, skip_locked: bool = False
    ) -> list[Appended | OchreError]:
        """What becomes of each request. See `LogTable.append`."""
        found = self._lock({request.collection for request in requests}, skip_locked)
        earlier = self._applied(requests, found)
        swept: dict[str, object_table.Swept] = {}
        while True:
            after = {name: replace(log) for name, log in found.items() if log is not None}
            results = self._decided(requests, found, after, earlier, swept, skip_locked)
            lost = self._introduce(requests, results)
            if not lost:
                break
            swept |= lost  # Those requests come to nothing: the offsets are given to others.
        self._write(requests, results, found, after)
        return results

    def _lock(self, names: set[str], skip_locked: bool) -> dict[str, _Log | None]:
        """All of them in order, before any object: who locks several does so by collection."""
        ordered = sorted(names)
        statement = _LOCK_FREE if skip_locked else _LOCK
        rows = self._session.each(statement, [{"collection": name} for name in ordered])
        return {
            name: _Log(*row[0]) if row else None for name, row in zip(ordered, rows, strict=True)
        }

    def _applied(
        self, requests: Sequence[AppendRequest], found: dict[str, _Log | None]
    ) -> list[Appended | OchreError | None]:
        """The first answers of those that were applied already, looked up under the lock."""
        locked = [number for number, one in enumerate(requests) if found[one.collection]]
        answers: list[Appended | OchreError | None] = [None] * len(requests)
        with_key = [number for number in locked if requests[number].request_hash is not None]
        named = [
            number for number in locked
            if requests[number].request_hash is None and requests[number].may_be_repeat
        ]  # fmt: skip
        for numbers, look in ((with_key, repeats.by_keys), (named, repeats.by_names)):
            if numbers:
                wanted = [(requests[n].collection, requests[n].request_id) for n in numbers]
                for number, first in zip(numbers, look(self._session, wanted), strict=True):
                    if first is not None:
                        one = requests[number]
                        answers[number] = repeats.answer(first, one.request_id, one.request_hash)
        return answers

    def _decided(
        self,
        requests: Sequence[AppendRequest],
        found: dict[str, _Log | None],
        after: dict[str, _Log],
        earlier: Sequence[Appended | OchreError | None],
        swept: dict[str, object_table.Swept],
        skip_locked: bool,
    ) -> list[Appended | OchreError]:
        """By data alone. after: moves on with what is appended."""
        results: list[Appended | OchreError] = []
        here: dict[tuple[str, str, bool], repeats.Found] = {}  # Applied by this flush.
        for request, answer in zip(requests, earlier, strict=True):
            name = (request.collection, request.request_id, request.request_hash is None)
            if found[request.collection] is None:
                results.append(_absent(request.collection, skip_locked))
            elif answer is not None:
                results.append(answer)
            elif name in here:
                results.append(repeats.answer(here[name], request.request_id, request.request_hash))
            elif request.object_key in swept:
                results.append(object_table.Swept(str(swept[request.object_key])))
            else:
                log = after[request.collection]
                refusal = self._refusal(request, log)
                if refusal is not None:
                    results.append(refusal)
                    continue
                appended = Appended(log.next_offset, log.next_offset + request.count - 1)
                log.next_offset += request.count
                log.tail_bytes += request.byte_count
                log.time_us = max(log.time_us, self._now_us)
                if log.dimension is None:
                    log.dimension = request.dimension
                here[name] = (request.request_hash, appended)
                results.append(appended)
        return results

    def _refusal(self, request: AppendRequest, log: _Log) -> OchreError | None:
        try:
            if request.cancel is not None:
                request.cancel.check()
            if self._database.key_bytes_max is not None:
                check_key(self._database, "Idempotency-Key", request.request_id)
                for key, _ in request.key_types:
                    check_key(self._database, "metadata key", key)
        except OchreError as error:
            return error
        if request.dimension is not None and log.dimension not in (None, request.dimension):
            assert log.dimension is not None
            return dimension_error(log.dimension, request.dimension)
        if request.expect_last_offset not in (None, log.next_offset - 1):
            return Conflict(
                f"the collection changed: expected last offset {request.expect_last_offset}, "
                f"found {log.next_offset - 1}"
            )
        # Into an empty tail goes whatever it is, or a large request could never be taken.
        pending = log.next_offset - 1 - log.indexed_offset
        if pending > 0 and pending + request.count > self._limits.tail_rows_max:
            return Exhausted(
                f"the collection has {pending} operations that are not "
                f"yet indexed (limit {self._limits.tail_rows_max})"
            )
        if log.tail_bytes > 0:
            if log.tail_bytes + request.byte_count > self._limits.tail_bytes_max:
                return Exhausted(
                    f"the collection has {log.tail_bytes} bytes of operations that are not yet "
                    f"indexed (limit {self._limits.tail_bytes_max})"
                )
        return None

    def _introduce(
        self, requests: Sequence[AppendRequest], results: Sequence[Appended | OchreError]
    ) -> dict[str, object_table.Swept]:
        """Insert the rows of the objects of what was taken; those that are gone instead."""
        first = {
            request.object_key: request
            for request, result in zip(requests, results, strict=True)
            if request.object_key is not None and _is_new(result)
        }
        swept: dict[str, object_table.Swept] = {}
        for key, request in sorted(first.items()):
            try:
                object_table.introduce_shared(
                    self._session, key, request.object_bytes, request.introduction
                )
            except object_table.Swept as error:
                swept[key] = error
        return swept

    def _write(
        self,
        requests: Sequence[AppendRequest],
        results: Sequence[Appended | OchreError],
        found: dict[str, _Log | None],
        after: dict[str, _Log],
    ) -> None:
        session = self._session
        held: list[tuple[str, str, int]] = []
        for request, result in zip(requests, results, strict=True):
            if not isinstance(result, Appended) or result.repeated:
                continue
            log = after[request.collection]
            first = result.first_offset
            if request.object_key is not None:
                held.append((request.object_key, request.collection, first))
            session.later(
                _INSERT_FRAGMENT,
                collection=request.collection,
                start=first,
                stop=result.last_offset,
                # A client's key may outlive its row in `idempotency` here, and must not collide.
                request_id=request.request_id
                if request.request_hash is None
                else f"{first}/{request.request_id}",
                payload=request.payload,
                object_key=request.object_key,
                byte_start=request.byte_start,
                byte_stop=request.byte_stop,
                checksum=request.checksum,
                time_us=log.time_us,
            )
            self.new_keys += self._keys.insert(
                session, request.collection, log.revision, request.key_types
            )
            if request.request_hash is not None:
                repeats.keep_key(
                    session,
                    request.collection,
                    request.request_id,
                    request.request_hash,
                    result,
                    log.time_us,
                )
        object_table.refer_fragments(session, held)
        for name, log in after.items():
            if log != found[name]:
                session.later(
                    _ADVANCE,
                    log=name,
                    new_next=log.next_offset,
                    new_dimension=log.dimension,
                    new_tail_bytes=log.tail_bytes,
                    new_time=log.time_us,
                )
                mark.acknowledge(session, name, log.next_offset)


def _is_new(result: Appended | OchreError) -> bool:
    return isinstance(result, Appended) and not result.repeated


def _absent(collection: str, skip_locked: bool) -> OchreError:
    if skip_locked:
        return Busy(f"the log of collection {collection} is locked, or not there")
    return NotFound(f"Collection [{collection}] does not exist.")


def dimension_error(expected: int, got: int) -> InvalidArgument:
    """The contract's message; official clients match its text."""
    return InvalidArgument(
        f"Collection expecting embedding with dimension of {expected}, got {got}"
    )
