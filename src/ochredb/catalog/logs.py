"""Each collection's log in SQL: appends, snapshots, fragments.

One append transaction locks the `logs` row, decides by data whether the request is refused, takes
the offset range and inserts the fragment row that points at its bytes. So a committed `next_offset`
means that every fragment below it is readable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from ochredb.catalog import fragment_rows, pending, repeats
from ochredb.catalog.appends import AppendRequest, Appends, BacklogLimits
from ochredb.catalog.core import (
    BindParameter,
    bindparam,
    delete,
    func,
    select,
)
from ochredb.catalog.database import Database, Session, check_key, whole
from ochredb.catalog.fragment_rows import FragmentPlace
from ochredb.catalog.keys import MetadataKeys
from ochredb.catalog.pending import Due
from ochredb.catalog.schema import (
    collections,
    fragments,
    idempotency,
    logs,
    quarantine,
)
from ochredb.catalog.statement import Statement
from ochredb.clock import Clock
from ochredb.errors import NotFound, OchreError
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
    select(logs.c.next_offset, logs.c.time_us)
    .where(logs.c.collection == _collection)
    .with_for_update()
)
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
_ANY = Statement(select(collections.c.id).limit(1))


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

    @property
    def is_local(self) -> bool:
        """Whether only processes of this machine share the catalog."""
        return self._db.is_local

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
    def append(
        self, requests: list[AppendRequest], *, skip_locked: bool = False
    ) -> list[Appended | OchreError]:
        """Commit one flush; each request succeeds or is refused alone.

        Requests of one collection get adjacent ranges in the order given. skip_locked: those of a
        collection that another transaction has locked end in Busy instead of waiting for it.
        Raises Unavailable (none was written) or OutcomeUnknown (repeat with the same request ids).
        """
        with self._db.write("append") as session:
            appends = Appends(session, self._db, self._limits, self.keys, self._clock.now_us())
            results = appends.append(requests, skip_locked=skip_locked)
        self.keys.committed(appends.new_keys)
        return results

    def append_locked(self, session: Session, request: AppendRequest) -> Appended:
        """Append inside a transaction that already holds the collection's lock."""
        appends = Appends(session, self._db, self._limits, self.keys, self._clock.now_us())
        (result,) = appends.append([request])
        if isinstance(result, OchreError):
            raise result
        return result

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
        nothing = Appended(row[0], row[0] - 1)
        time_us = max(self._clock.now_us(), row[1])
        repeats.keep_key(session, collection, key, request_hash, nothing, time_us)
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
        """See `ochredb.catalog.pending`."""
        return pending.pending(self._db)

    def tails(
        self, rows_min: int, bytes_min: int, quiet_since_us: int, after: str = ""
    ) -> Iterator[Due]:
        """See `ochredb.catalog.pending`."""
        return pending.tails(self._db, rows_min, bytes_min, quiet_since_us, after)

    def unsettled(self) -> list[Due]:
        """See `ochredb.catalog.pending`."""
        return pending.unsettled(self._db)

    def has_collections(self) -> bool:
        with self._db.read() as session:
            return session.one(_ANY) is not None

    @whole
    def expire_idempotency(self, retention_s: float) -> None:
        """Forget client keys older than the retention."""
        cutoff = self._clock.now_us() - int(retention_s * 1e6)
        with self._db.write("expire-keys") as session:
            session.run(_EXPIRE_IDEMPOTENT, cutoff_us=cutoff)
