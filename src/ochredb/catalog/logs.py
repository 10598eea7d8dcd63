"""Each collection's log in SQL: appends, snapshots, fragments.

One append transaction locks the `logs` row, decides by data whether the request is refused, takes
the offset range and inserts the fragment row that points at its bytes. So a committed `next_offset`
means that every fragment below it is readable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ochredb.catalog import fragment_rows, mark, repeats
from ochredb.catalog import objects as object_table
from ochredb.catalog.core import (
    BindParameter,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)
from ochredb.catalog.database import Database, Session, check_key, whole
from ochredb.catalog.fragment_rows import FragmentPlace
from ochredb.catalog.keys import Known, MetadataKeys
from ochredb.catalog.schema import (
    collections,
    fragments,
    idempotency,
    logs,
    quarantine,
)
from ochredb.catalog.statement import Statement
from ochredb.clock import Clock
from ochredb.errors import Conflict, Exhausted, InvalidArgument, NotFound, OchreError
from ochredb.hints.hot import HotFragments, NoHotFragments
from ochredb.recent import RecentOperations
from ochredb.types import Appended, PendingWork, Snapshot

_collection: BindParameter[Any] = bindparam("collection")
_SNAPSHOT = Statement(
    select(
        logs.c.collection,
        logs.c.state,
        logs.c.revision,
        logs.c.dimension,
        logs.c.version,
        logs.c.indexed_offset,
        logs.c.next_offset,
        logs.c.floor_offset,
    ).where(logs.c.collection == _collection)
)
_STATUS = Statement(
    select(
        logs.c.next_offset,
        logs.c.indexed_offset,
        logs.c.unsettled_rows,
        select(func.coalesce(func.sum(quarantine.c.stop - quarantine.c.start + 1), 0))
        .where(quarantine.c.collection == logs.c.collection)
        .scalar_subquery(),
    ).where(logs.c.collection == _collection)
)
_TAIL_SIZE = Statement(
    select(logs.c.next_offset - 1 - logs.c.indexed_offset, logs.c.tail_bytes).where(
        logs.c.collection == _collection
    )
)
_LOCK = Statement(
    select(
        logs.c.state,
        logs.c.dimension,
        logs.c.next_offset,
        logs.c.indexed_offset,
        logs.c.tail_bytes,
        logs.c.time_us,
        logs.c.revision,
    )
    .where(logs.c.collection == _collection)
    .with_for_update()
)
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
_INSERT_IDEMPOTENT = Statement(insert(idempotency))
_EXPIRE_IDEMPOTENT = Statement(
    delete(idempotency).where(idempotency.c.time_us < bindparam("cutoff_us"))
)
_RANGE = Statement(
    select(
        fragments.c.start,
        fragments.c.stop,
        fragments.c.payload,
        fragments.c.object_key,
        fragments.c.byte_start,
        fragments.c.byte_stop,
        fragments.c.checksum,
    )
    .where(
        fragments.c.collection == _collection,
        fragments.c.start >= bindparam("first"),
        fragments.c.start <= bindparam("last"),
    )
    .order_by(fragments.c.start)
    .limit(bindparam("limit"))
)
_PAGE = 200  # Collections looked at by one statement.
_pending = select(
    logs.c.collection,
    logs.c.next_offset - 1 - logs.c.indexed_offset,
    logs.c.tail_bytes,
    logs.c.time_us,
    logs.c.unsettled_rows,
)
_PENDING = Statement(
    _pending.where((logs.c.next_offset > logs.c.indexed_offset + 1) | (logs.c.unsettled_rows > 0))
)
_TAILS = Statement(
    _pending.where(
        logs.c.next_offset > logs.c.indexed_offset + 1,
        (logs.c.next_offset - 1 - logs.c.indexed_offset >= bindparam("rows_min"))
        | (logs.c.tail_bytes >= bindparam("bytes_min"))
        | (logs.c.time_us <= bindparam("quiet_since_us")),
        logs.c.collection > bindparam("after"),
    )
    .order_by(logs.c.collection)
    .limit(_PAGE)
)
_UNSETTLED = Statement(_pending.where(logs.c.unsettled_rows > 0))
_ANY = Statement(select(collections.c.id).limit(1))


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
    byte_count: int
    checksum: int
    may_be_repeat: bool = False  # An earlier attempt under this id may have been applied.


@dataclass(frozen=True, slots=True, kw_only=True)
class BacklogLimits:
    """Above these a collection's log takes no more until compaction has caught up."""

    tail_rows_max: int = 200_000
    tail_bytes_max: int = 512 << 20


class LogTable:
    """Blocking, thread-safe."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        limits: BacklogLimits,
        *,
        hot: HotFragments | None = None,
    ) -> None:
        """hot: where bytes of fragments may be found sooner than in the object store."""
        self._db, self._clock, self._limits = database, clock, limits
        self.hot = hot or NoHotFragments()
        self.keys = MetadataKeys(database)
        self.recent = RecentOperations()

    def snapshot(self, collection: str) -> Snapshot:
        """One single-row statement (about 5 microseconds on SQLite). Raises NotFound."""
        with self._db.read() as session:
            row = session.one(_SNAPSHOT, collection=collection)
        if row is None:
            raise NotFound(f"Collection [{collection}] does not exist.")
        return Snapshot(
            collection_id=collection,
            state=row[1],
            revision=row[2],
            dimension=row[3],
            version=row[4],
            indexed_offset=row[5],
            next_offset=row[6],
            floor_offset=row[7],
        )

    def reading(self) -> AbstractContextManager[Session]:
        """Held around reads that take other locks meanwhile.

        A catalog in memory is one connection under one lock. `append_evaluated` reads while it
        holds it, so whoever else takes another lock and reads must take this one first.
        """
        return self._db.read()

    def status(self, collection: str) -> tuple[int, int, int, int]:
        """(last offset, indexed offset, rows in parts that wait for a merge, in quarantine).

        Raises NotFound.
        """
        with self._db.read() as session:
            row = session.one(_STATUS, collection=collection)
        if row is None:
            raise NotFound(f"Collection [{collection}] does not exist.")
        return row[0] - 1, row[1], row[2], int(row[3])

    @whole
    def append(self, requests: list[AppendRequest]) -> list[Appended | OchreError]:
        """Commit one flush; each request succeeds or is refused alone.

        Requests of one collection get adjacent ranges in the order given. Raises Unavailable (none
        was written) or OutcomeUnknown (repeat with the same request ids).
        """
        results: list[Appended | OchreError | None] = [None] * len(requests)
        # Whoever locks several logs does so by collection; the sort keeps a collection's order.
        order = sorted(range(len(requests)), key=lambda i: requests[i].collection)
        with self._db.write("append") as session:
            now = self._clock.now_us()
            introduced: set[str] = set()
            inserted: list[Known] = []
            names = sorted({request.collection for request in requests})
            if len(names) > 1:  # All logs before any object.
                session.each(_LOCK, [{"collection": name} for name in names])
            for i in order:
                try:
                    results[i] = self._append_one(session, requests[i], now, introduced, inserted)
                except OchreError as refusal:
                    results[i] = refusal
        self.keys.committed(inserted)
        return [result for result in results if result is not None]

    def append_locked(self, session: Session, request: AppendRequest) -> Appended:
        """Append inside a transaction that already holds the collection's lock."""
        return self._append_one(session, request, self._clock.now_us(), set(), [])

    def _append_one(
        self,
        session: Session,
        request: AppendRequest,
        now: int,
        introduced: set[str],
        inserted: list[Known],
    ) -> Appended:
        """Every refusal is decided before the first row is written.

        introduced, inserted: keys of objects and of metadata that this transaction has written.
        """
        row = session.one(_LOCK, collection=request.collection)
        if row is None:
            raise NotFound(f"Collection [{request.collection}] does not exist.")
        _, dimension, next_offset, indexed_offset, tail_bytes, time_us, revision = row
        if self._db.key_bytes_max is not None:
            check_key(self._db, "Idempotency-Key", request.request_id)
            for key, _ in request.key_types:
                check_key(self._db, "metadata key", key)
        repeated = self._repeated(session, request)
        if repeated is not None:
            return repeated
        if request.dimension is not None and dimension not in (None, request.dimension):
            raise dimension_error(dimension, request.dimension)
        if request.expect_last_offset not in (None, next_offset - 1):
            raise Conflict(
                f"the collection changed: expected last offset {request.expect_last_offset}, "
                f"found {next_offset - 1}"
            )
        # Into an empty tail goes whatever it is, or a large request could never be taken.
        pending = next_offset - 1 - indexed_offset
        if pending > 0 and pending + request.count > self._limits.tail_rows_max:
            raise Exhausted(
                f"the collection has {next_offset - 1 - indexed_offset} operations that are not "
                f"yet indexed (limit {self._limits.tail_rows_max})"
            )
        if tail_bytes + request.byte_count > self._limits.tail_bytes_max and tail_bytes > 0:
            raise Exhausted(
                f"the collection has {tail_bytes} bytes of operations that are not yet indexed "
                f"(limit {self._limits.tail_bytes_max})"
            )
        first, last = next_offset, next_offset + request.count - 1
        if request.object_key is not None:
            if request.object_key not in introduced:
                object_table.introduce(session, [(request.object_key, request.object_bytes)])
                introduced.add(request.object_key)
            object_table.refer(
                session,
                [request.object_key],
                kind="fragment",
                collection=request.collection,
                number=first,
            )
        log_time = max(now, time_us)
        session.later(
            _INSERT_FRAGMENT,
            collection=request.collection,
            start=first,
            stop=last,
            # A client's key may outlive its row in `idempotency` here, and must not collide then.
            request_id=request.request_id
            if request.request_hash is None
            else f"{first}/{request.request_id}",
            payload=request.payload,
            object_key=request.object_key,
            byte_start=request.byte_start,
            byte_stop=request.byte_stop,
            checksum=request.checksum,
            time_us=log_time,
        )
        session.later(
            _ADVANCE,
            log=request.collection,
            new_next=last + 1,
            new_dimension=request.dimension if dimension is None else dimension,
            new_tail_bytes=tail_bytes + request.byte_count,
            new_time=log_time,
        )
        mark.acknowledge(session, request.collection, last + 1)
        inserted += self.keys.insert(session, request.collection, revision, request.key_types)
        if request.request_hash is not None:
            session.later(
                _INSERT_IDEMPOTENT,
                collection=request.collection,
                key=request.request_id,
                request_hash=request.request_hash,
                first_offset=first,
                last_offset=last,
                time_us=log_time,
            )
        return Appended(first, last)

    def _repeated(self, session: Session, request: AppendRequest) -> Appended | None:
        """The first answer, if this key was already applied (looked up under the lock)."""
        if request.request_hash is not None:
            return repeats.by_key(
                session, request.collection, request.request_id, request.request_hash
            )
        if not request.may_be_repeat:
            return None
        return repeats.by_name(session, request.collection, request.request_id)

    def repeated(self, collection: str, key: str, request_hash: bytes) -> Appended | None:
        """The first answer to a client's key, looked up without the lock. Raises Unprocessable."""
        with self._db.read() as session:
            return repeats.by_key(session, collection, key, request_hash)

    def repeated_locked(
        self,
        session: Session,
        collection: str,
        key: str | None,
        request_hash: bytes | None,
        request_id: str | None,
    ) -> Appended | None:
        """The first answer to a client's key or a caller's name, under the lock of the log."""
        if key is not None and request_hash is not None:
            return repeats.by_key(session, collection, key, request_hash)
        if request_id is None:
            return None
        return repeats.by_name(session, collection, repeats.named(request_id))

    @whole
    def record_nothing(self, collection: str, key: str, request_hash: bytes) -> Appended:
        """Bind a client's key to a request that found nothing to do: an empty range of offsets.

        Returns the first answer to the key. Raises NotFound (collection), Unprocessable (the key
        belongs to another request).
        """
        with self._db.write("record-nothing") as session:
            return self.record_nothing_locked(session, collection, key, request_hash)

    def record_nothing_locked(
        self, session: Session, collection: str, key: str, request_hash: bytes
    ) -> Appended:
        """The same inside a transaction."""
        row = session.one(_LOCK, collection=collection)
        if row is None:
            raise NotFound(f"Collection [{collection}] does not exist.")
        first = repeats.by_key(session, collection, key, request_hash)
        if first is not None:
            return first
        check_key(self._db, "Idempotency-Key", key)
        nothing = Appended(row[2], row[2] - 1)
        session.later(
            _INSERT_IDEMPOTENT,
            collection=collection,
            key=key,
            request_hash=request_hash,
            first_offset=nothing.first_offset,
            last_offset=nothing.last_offset,
            time_us=max(self._clock.now_us(), row[5]),
        )
        return nothing

    def tail_size(self, collection: str) -> tuple[int, int]:
        """(operations, encoded bytes) that are not yet in parts. Raises NotFound."""
        with self._db.read() as session:
            row = session.one(_TAIL_SIZE, collection=collection)
        if row is None:
            raise NotFound(f"Collection [{collection}] does not exist.")
        return row[0], row[1]

    def fragments(self, collection: str, first: int, last: int, limit: int) -> list[FragmentPlace]:
        """The first fragments that start within [first, last]; the caller checks for holes."""
        with self._db.read() as session:
            rows = session.all(_RANGE, collection=collection, first=first, last=last, limit=limit)
        return [
            FragmentPlace(
                start=start,
                stop=stop,
                payload=payload,
                object_key=key,
                byte_start=byte_start,
                byte_stop=byte_stop,
                checksum=checksum,
            )
            for start, stop, payload, key, byte_start, byte_stop, checksum in rows
        ]

    @whole
    def replace_fragment(
        self, collection: str, place: FragmentPlace, payload: bytes, checksum: int
    ) -> None:
        """Put an inline payload in the place of damaged bytes. Raises Conflict if it was folded.

        payload: a fragment of as many operations; checksum: xxh3-64 of it, signed.
        """
        with self._db.write("replace-fragment") as session:
            fragment_rows.replace(
                session, collection, place, payload, checksum, self._clock.now_us()
            )

    def pending(self) -> list[PendingWork]:
        """Every collection that compaction or merging could do something for."""
        with self._db.read() as session:
            return [PendingWork(*row) for row in session.all(_PENDING)]

    def tails(self, rows_min: int, bytes_min: int, quiet_since_us: int) -> Iterator[PendingWork]:
        """Collections with a tail of some size, or without writes for some time.

        In short statements. Cost: a pass over the rows of all collections, 0.2 ms per thousand.
        """
        after: str | None = ""
        while after is not None:
            with self._db.read() as session:
                rows = session.all(
                    _TAILS,
                    rows_min=rows_min,
                    bytes_min=bytes_min,
                    quiet_since_us=quiet_since_us,
                    after=after,
                )
            yield from (PendingWork(*row) for row in rows)
            after = rows[-1][0] if len(rows) == _PAGE else None

    def unsettled(self) -> list[PendingWork]:
        """Collections whose parts wait for a merge. Cost: as `tails`."""
        with self._db.read() as session:
            return [PendingWork(*row) for row in session.all(_UNSETTLED)]

    def has_collections(self) -> bool:
        with self._db.read() as session:
            return session.one(_ANY) is not None

    @whole
    def expire_idempotency(self, retention_s: float) -> None:
        """Forget client keys older than the retention."""
        cutoff = self._clock.now_us() - int(retention_s * 1e6)
        with self._db.write("expire-keys") as session:
            session.run(_EXPIRE_IDEMPOTENT, cutoff_us=cutoff)


def dimension_error(expected: int, got: int) -> InvalidArgument:
    """The contract's message; official clients match its text."""
    return InvalidArgument(
        f"Collection expecting embedding with dimension of {expected}, got {got}"
    )
