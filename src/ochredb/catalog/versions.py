"""Versions: which parts a collection consists of, and how a new version takes effect (I7).

A commit locks the collection's `logs` row, checks the lease's fence, and either compares the
version with the one it started from (compaction) or rebases onto the current one (merge). Losing is
`Conflict`: the work is thrown away, nothing was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ochredb.catalog import objects as object_table
from ochredb.catalog import quarantine, repeats
from ochredb.catalog.core import BindParameter, bindparam, delete, func, insert, select, update
from ochredb.catalog.database import Database, Session, whole
from ochredb.catalog.jobs import Lease, holds
from ochredb.catalog.quarantine import Quarantined
from ochredb.catalog.schema import fragments, logs, parts, references, version_parts, versions
from ochredb.catalog.statement import Statement
from ochredb.clock import Clock
from ochredb.errors import Conflict, Corrupt
from ochredb.parts import deleted as deleted_rows
from ochredb.parts.manifest import Manifest
from ochredb.storage.base import ObjectStore
from ochredb.types import Bools

_collection: BindParameter[Any] = bindparam("collection")
_PARTS = Statement(
    select(
        parts.c.manifest,
        version_parts.c.deleted,
        version_parts.c.deleted_key,
        version_parts.c.deleted_count,
        version_parts.c.part,
    )
    .select_from(version_parts.outerjoin(parts, version_parts.c.part == parts.c.id))
    .where(
        version_parts.c.collection == _collection,
        version_parts.c.version == bindparam("version"),
    )
    .order_by(version_parts.c.position)
)
_HELD = Statement(
    select(references.c.key)
    .where(
        references.c.collection == _collection,
        references.c.kind == "version",
        references.c.number == bindparam("version"),
    )
    .limit(1)
)
_LOCK = Statement(
    select(logs.c.version, logs.c.indexed_offset, logs.c.next_offset)
    .where(logs.c.collection == _collection)
    .with_for_update()
)
_COMMIT = Statement(
    update(logs)
    .where(logs.c.collection == bindparam("log"))
    .values(
        version=bindparam("new_version"),
        indexed_offset=bindparam("new_indexed"),
        floor_offset=bindparam("new_floor"),
        tail_bytes=bindparam("new_tail_bytes"),
        unsettled_rows=bindparam("new_unsettled"),
    )
)
_TAIL_BYTES = Statement(
    select(
        func.coalesce(
            func.sum(
                func.coalesce(
                    func.length(fragments.c.payload),
                    fragments.c.byte_stop - fragments.c.byte_start,
                )
            ),
            0,
        )
    ).where(fragments.c.collection == _collection, fragments.c.start > bindparam("indexed"))
)
_TRIM = Statement(
    delete(fragments).where(
        fragments.c.collection == _collection, fragments.c.stop <= bindparam("floor")
    )
)
_INSERT_VERSION = Statement(insert(versions))
_INSERT_VERSION_PART = Statement(insert(version_parts))
_INSERT_PART = Statement(insert(parts))
_version_max: BindParameter[Any] = bindparam("version_max")
_DELETE_OLD_VERSIONS = Statement(
    delete(versions).where(versions.c.collection == _collection, versions.c.version <= _version_max)
)
_OLD_PARTS = Statement(
    select(version_parts.c.part)
    .where(version_parts.c.collection == _collection, version_parts.c.version <= _version_max)
    .distinct()
)
_DELETE_OLD_VERSION_PARTS = Statement(
    delete(version_parts).where(
        version_parts.c.collection == _collection, version_parts.c.version <= _version_max
    )
)
_replaced = (
    select(versions.c.collection)
    .group_by(versions.c.collection)
    .having(
        func.count() > 1,
        (func.max(versions.c.created_us) <= bindparam("cutoff_us"))
        | (func.max(versions.c.created_us) > bindparam("ahead_us")),
    )
    .order_by(versions.c.collection)
    .limit(bindparam("limit"))
)
_REPLACED = Statement(_replaced)
_lately = select(versions.c.collection).where(versions.c.created_us > bindparam("since_us"))
_REPLACED_LATELY = Statement(_replaced.where(versions.c.collection.in_(_lately)))
_CREATED = Statement(
    select(versions.c.created_us).where(
        versions.c.collection == _collection, versions.c.version == bindparam("version")
    )
)
_PART_IS_USED = Statement(
    select(version_parts.c.part).where(version_parts.c.part == bindparam("part")).limit(1)
)
_COLLECTION_OF = Statement(select(parts.c.collection).where(parts.c.id == bindparam("part")))
_DELETE_PART = Statement(delete(parts).where(parts.c.id == bindparam("part")))

_NEVER_US = 1 << 62
_ALL_LOOKED_AT_US = 600_000_000  # A shared catalog is large: so often every collection is.


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionPart:
    """A part in a version, with the rows that are dead there.

    deleted: a serialised roaring bitmap, inline; or `deleted_key`, the object that holds it.
    """

    manifest: Manifest
    deleted: bytes | None
    deleted_key: str | None
    deleted_count: int

    @property
    def live_rows(self) -> int:
        return self.manifest.rows - self.deleted_count

    def live_mask(self, store: ObjectStore) -> Bools | None:
        """bool[rows]: which rows live; None if all do. Raises NotFound (collected), Corrupt."""
        if self.deleted_count == 0:
            return None
        data = self.deleted if self.deleted_key is None else store.get(self.deleted_key)
        if data is None:
            raise Corrupt(f"the deleted rows of part {self.manifest.id} are nowhere")
        try:
            live = deleted_rows.decode(data, self.manifest.rows)
        except Corrupt as error:
            told = f"{error} ({self.deleted_key or 'inline'}, of part {self.manifest.id})"
            raise Corrupt(told, key=self.deleted_key) from error
        if int(live.sum()) != self.live_rows:
            raise Corrupt(f"the deleted rows of part {self.manifest.id} are not as many as said")
        return live


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVersion:
    """What a commit puts in place. `new_objects`: keys and sizes that this commit introduces.

    quarantined: operations up to `indexed_offset` that are in no part.
    """

    parts: Sequence[VersionPart]
    indexed_offset: int
    new_objects: Sequence[tuple[str, int]]
    new_parts: Sequence[Manifest]
    unsettled_rows: int
    quarantined: Sequence[Quarantined] = ()


class VersionTable:
    """Blocking, thread-safe."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._db, self._clock = database, clock
        self._all_looked_at_us = -_ALL_LOOKED_AT_US  # By `_replaced`; a race asks once more.

    def parts(self, collection: str, version: int) -> list[VersionPart]:
        """The parts of a version; empty for version 0 and for one that has been forgotten."""
        with self._db.read() as session:
            return _parts(session, collection, version)

    def collection_of(self, part_id: str) -> str | None:
        """The collection whose versions name a part; None if there is none any more."""
        with self._db.read() as session:
            row = session.one(_COLLECTION_OF, part=part_id)
        return None if row is None else str(row[0])

    @whole
    def commit(
        self,
        lease: Lease,
        build: Callable[[int, int, list[VersionPart]], NewVersion],
    ) -> int:
        """Make a new version under the lock; returns its number.

        build: given the current version, indexed offset and parts, returns what shall be; it raises
            Conflict if that cannot follow from what it started with. It does no I/O.
        """
        collection = lease.collection
        with self._db.write("version") as session:
            row = session.one(_LOCK, collection=collection)
            if row is None:
                raise Conflict("the collection was dropped")
            if not holds(session, lease):
                raise Conflict("the lease was taken over")
            version, indexed = int(row[0]), int(row[1])
            new = build(version, indexed, _parts(session, collection, version))
            assert indexed <= new.indexed_offset < row[2], "a version covers what was appended"
            self._take_objects(session, collection, version - 1, new)
            self._insert(session, collection, version + 1, new)
            self._drop_up_to(session, collection, version - 1)
            self._advance(session, collection, version + 1, indexed, new)
            return version + 1

    def any_replaced(self, cutoff_us: int, ahead_us: int) -> bool:
        """Whether `release_replaced` has anything to do."""
        return bool(self._replaced(cutoff_us, ahead_us, limit=1))

    def _replaced(self, cutoff_us: int, ahead_us: int, limit: int) -> list[str]:
        """Collections with versions to be forgotten.

        A shared catalog is mostly asked only for those that have got a version lately, which an
        index finds; for all until there were none, and every ten minutes, in case that others left
        something over.
        """
        now_us = self._clock.now_us()
        wanted = {"cutoff_us": cutoff_us, "ahead_us": ahead_us, "limit": limit}
        with self._db.read() as session:
            if 0 <= now_us - self._all_looked_at_us < _ALL_LOOKED_AT_US:
                since_us = now_us - 2 * _ALL_LOOKED_AT_US
                rows = session.all(_REPLACED_LATELY, since_us=since_us, **wanted)
            else:
                rows = session.all(_REPLACED, **wanted)
                if len(rows) < limit and not self._db.is_local:
                    self._all_looked_at_us = now_us
        return [name for (name,) in rows]

    @whole
    def release_replaced(self, cutoff_us: int, limit: int, ahead_us: int = _NEVER_US) -> int:
        """Forget versions that were replaced before `cutoff_us`; returns of how many collections.

        Also those that seem to be replaced after `ahead_us`: before the clock was set back.
        One transaction for at most `limit` collections. Cost without any: a pass over the newest
        versions, a millisecond for 5,000 collections; of a shared catalog over those made lately.
        """
        found = self._replaced(cutoff_us, ahead_us, limit)
        if not found:
            return 0
        with self._db.write("release-replaced") as session:
            locked = session.each(_LOCK, [{"collection": name} for name in found])
            replaced: list[tuple[str, int]] = []
            keys: list[str] = []
            for collection, rows in zip(found, locked, strict=True):
                if not rows:
                    continue
                created = session.one(_CREATED, collection=collection, version=rows[0][0])
                if created is not None and not cutoff_us < created[0] <= ahead_us:
                    replaced.append((collection, rows[0][0] - 1))
                    keys += _kept_up_to(session, *replaced[-1])
            object_table.lock(session, keys)
            for collection, version_max in replaced:
                self._drop_up_to(session, collection, version_max)
        return len(found)

    def _take_objects(
        self, session: Session, collection: str, version_max: int, new: NewVersion
    ) -> None:
        """Introduce the new objects, and lock all others that the commit is about to touch."""
        object_table.introduce(session, new.new_objects)
        keys = [item.object_key for item in new.quarantined if item.object_key is not None]
        keys += _objects_of(new.parts)
        keys += _kept_up_to(session, collection, version_max)
        keys += object_table.held(
            session, kind="fragment", collection=collection, number_max=new.indexed_offset
        )
        object_table.lock(session, keys)

    def _insert(self, session: Session, collection: str, version: int, new: NewVersion) -> None:
        quarantine.record(session, new.quarantined, self._clock.now_us())
        for manifest in new.new_parts:
            session.later(
                _INSERT_PART, id=manifest.id, collection=collection, manifest=manifest.to_json()
            )
        session.later(
            _INSERT_VERSION,
            collection=collection,
            version=version,
            indexed_offset=new.indexed_offset,
            created_us=self._clock.now_us(),
        )
        for position, part in enumerate(new.parts):
            session.later(
                _INSERT_VERSION_PART,
                collection=collection,
                version=version,
                position=position,
                part=part.manifest.id,
                deleted=part.deleted,
                deleted_key=part.deleted_key,
                deleted_count=part.deleted_count,
            )
        keys = _objects_of(new.parts)
        object_table.refer(session, keys, kind="version", collection=collection, number=version)

    def _drop_up_to(self, session: Session, collection: str, version_max: int) -> None:
        """Forget old versions and what only they kept."""
        old = {"collection": collection, "version_max": version_max}
        were_used = [{"part": part} for (part,) in session.all(_OLD_PARTS, **old)]
        session.later(_DELETE_OLD_VERSIONS, **old)
        session.later(_DELETE_OLD_VERSION_PARTS, **old)
        are_used = session.each(_PART_IS_USED, were_used)
        pairs = zip(were_used, are_used, strict=True)
        session.run_many(_DELETE_PART, [part for part, rows in pairs if not rows])
        object_table.release(
            session,
            kind="version",
            collection=collection,
            number_max=version_max,
            now_us=self._clock.now_us(),
        )

    def _advance(
        self, session: Session, collection: str, version: int, indexed: int, new: NewVersion
    ) -> None:
        """Move the log's row on, and trim the log below the new indexed offset."""
        if new.indexed_offset > indexed:
            repeats.keep_names(session, collection, new.indexed_offset, self._clock.now_us())
            session.later(_TRIM, collection=collection, floor=new.indexed_offset)
            object_table.release(
                session,
                kind="fragment",
                collection=collection,
                number_max=new.indexed_offset,
                now_us=self._clock.now_us(),
            )
        row = session.one(_TAIL_BYTES, collection=collection, indexed=new.indexed_offset)
        session.later(
            _COMMIT,
            log=collection,
            new_version=version,
            new_indexed=new.indexed_offset,
            new_floor=new.indexed_offset,
            new_tail_bytes=int(row[0]) if row else 0,
            new_unsettled=new.unsettled_rows,
        )


def _objects_of(version_parts: Sequence[VersionPart]) -> list[str]:
    """The keys of all objects that these parts consist of."""
    keys = [item.key for part in version_parts for item in part.manifest.objects]
    return keys + [part.deleted_key for part in version_parts if part.deleted_key is not None]


def _kept_up_to(session: Session, collection: str, version_max: int) -> list[str]:
    """The keys of the objects that old versions keep."""
    return object_table.held(session, kind="version", collection=collection, number_max=version_max)


def _parts(session: Session, collection: str, version: int) -> list[VersionPart]:
    """Raises Corrupt if a damaged index of the catalog hides one of them."""
    found = []
    rows = session.all(_PARTS, collection=collection, version=version)
    if not rows and session.one(_HELD, collection=collection, version=version) is not None:
        raise Corrupt(f"version {version} of collection {collection} keeps objects without parts")
    for manifest, deleted, deleted_key, count, part in rows:
        if manifest is None:
            raise Corrupt(f"part {part} of collection {collection} is not in the catalog")
        found.append(
            VersionPart(
                manifest=Manifest.from_json(manifest),
                deleted=deleted,
                deleted_key=deleted_key,
                deleted_count=count,
            )
        )
    return found
