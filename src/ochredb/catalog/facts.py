"""What must be true between the rows of a catalog, whatever happened to the store.

SQLite checks its own pages, not what they say: a flipped bit in a number or a text is a valid row.
These facts find what contradicts something else. Read on a copy, in pages: a catalog may be large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ochredb.catalog.core import bindparam, exists, select
from ochredb.catalog.database import Session
from ochredb.catalog.fragment_rows import fragment_problems
from ochredb.catalog.schema import (
    FORMAT_VERSION,
    collections,
    databases,
    fragments,
    idempotency,
    logs,
    objects,
    parts,
    quarantine,
    references,
    store,
    tenants,
    version_parts,
    versions,
)
from ochredb.catalog.statement import Statement
from ochredb.checksum import signed, xxh3
from ochredb.errors import Corrupt
from ochredb.parts import deleted as deleted_rows
from ochredb.parts.manifest import Manifest

CATALOG = "catalog"
LOG = "log"  # Where requests lie that are small enough for the catalog.
_VECTOR_ITEM_BYTES = 4
_UNSIGNED = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A fact that does not hold. collection: the id of the one that it is about, if it is one.

    in_payload: it is the bytes of a request that lie in the catalog, not the catalog's own facts.
    """

    problem: str
    collection: str | None = None
    in_payload: bool = False


@dataclass(frozen=True, slots=True)
class SetAside:
    """Operations start..stop (offsets, both included) that could not be folded, and why."""

    collection: str
    start: int
    stop: int
    reason: str


# Each finds rows that must not be there; a row is (collection or None, what it is about).
_MUST_BE_EMPTY: tuple[tuple[str, Statement], ...] = (
    (
        "database {1} belongs to a tenant that does not exist",
        Statement(
            select(databases.c.id, databases.c.name).where(
                ~exists().where(tenants.c.name == databases.c.tenant)
            )
        ),
    ),
    (
        "it belongs to a database that does not exist",
        Statement(
            select(collections.c.id, collections.c.name).where(
                ~exists().where(databases.c.id == collections.c.database_id)
            )
        ),
    ),
    (
        "it has no log",
        Statement(
            select(collections.c.id, collections.c.name).where(
                ~exists().where(logs.c.collection == collections.c.id)
            )
        ),
    ),
    (
        "there is a log of a collection that does not exist",
        Statement(
            select(logs.c.collection, logs.c.version).where(
                ~exists().where(collections.c.id == logs.c.collection)
            )
        ),
    ),
    (
        "the offsets of its log contradict one another (next {1})",
        Statement(
            select(logs.c.collection, logs.c.next_offset).where(
                (logs.c.indexed_offset >= logs.c.next_offset)
                | (logs.c.indexed_offset < 0)
                | (logs.c.floor_offset > logs.c.indexed_offset)
                | (logs.c.state != "live")
            )
        ),
    ),
    (
        "its version {1}, at its indexed offset, does not exist",
        Statement(
            select(logs.c.collection, logs.c.version).where(
                (logs.c.version != 0) | (logs.c.indexed_offset != 0),
                ~exists().where(
                    versions.c.collection == logs.c.collection,
                    versions.c.version == logs.c.version,
                    versions.c.indexed_offset == logs.c.indexed_offset,
                ),
            )
        ),
    ),
    (
        "version {1} is newer than the collection",
        Statement(
            select(versions.c.collection, versions.c.version).where(
                ~exists().where(
                    logs.c.collection == versions.c.collection,
                    logs.c.version >= versions.c.version,
                )
            )
        ),
    ),
    (
        "part {1} of a version does not exist",
        Statement(
            select(version_parts.c.collection, version_parts.c.part).where(
                ~exists().where(
                    parts.c.id == version_parts.c.part,
                    parts.c.collection == version_parts.c.collection,
                )
            )
        ),
    ),
    (
        "version {1} has parts, and does not exist",
        Statement(
            select(version_parts.c.collection, version_parts.c.version).where(
                ~exists().where(
                    versions.c.collection == version_parts.c.collection,
                    versions.c.version == version_parts.c.version,
                )
            )
        ),
    ),
    (
        "part {1} is in no version",
        Statement(
            select(parts.c.collection, parts.c.id).where(
                ~exists().where(version_parts.c.part == parts.c.id)
            )
        ),
    ),
    (
        "object {1} is referred to, and is not known or being deleted",
        Statement(
            select(references.c.collection, references.c.key).where(
                ~exists().where(objects.c.key == references.c.key, objects.c.state == "live")
            )
        ),
    ),
    (
        "object {1} is kept by a version that does not exist",
        Statement(
            select(references.c.collection, references.c.key).where(
                references.c.kind == "version",
                ~exists().where(
                    versions.c.collection == references.c.collection,
                    versions.c.version == references.c.number,
                ),
            )
        ),
    ),
    (
        "object {1} is kept by a fragment that does not exist",
        Statement(
            select(references.c.collection, references.c.key).where(
                references.c.kind == "fragment",
                ~exists().where(
                    fragments.c.collection == references.c.collection,
                    fragments.c.start == references.c.number,
                    fragments.c.object_key == references.c.key,
                ),
            )
        ),
    ),
    (
        "object {1} is kept by what is no more in quarantine",
        Statement(
            select(references.c.collection, references.c.key).where(
                references.c.kind == "quarantine",
                ~exists().where(
                    quarantine.c.collection == references.c.collection,
                    quarantine.c.start == references.c.number,
                    quarantine.c.object_key == references.c.key,
                ),
            )
        ),
    ),
    (
        "the quarantined operation {1} lies in an object that it does not keep",
        Statement(
            select(quarantine.c.collection, quarantine.c.start).where(
                quarantine.c.object_key.is_not(None),
                ~exists().where(
                    references.c.kind == "quarantine",
                    references.c.collection == quarantine.c.collection,
                    references.c.number == quarantine.c.start,
                    references.c.key == quarantine.c.object_key,
                ),
            )
        ),
    ),
    (
        "the fragment at offset {1} lies in an object that it does not keep",
        Statement(
            select(fragments.c.collection, fragments.c.start).where(
                fragments.c.object_key.is_not(None),
                ~exists().where(
                    references.c.kind == "fragment",
                    references.c.collection == fragments.c.collection,
                    references.c.number == fragments.c.start,
                    references.c.key == fragments.c.object_key,
                ),
            )
        ),
    ),
    (
        "an object is kept by {1}, which is no kind of holder",
        Statement(
            select(references.c.collection, references.c.kind).where(
                (references.c.kind != "version")
                & (references.c.kind != "fragment")
                & (references.c.kind != "quarantine")
                & (references.c.kind != "pin")
            )
        ),
    ),
    (
        "the idempotency key {1} has offsets that contradict one another",
        Statement(
            select(idempotency.c.collection, idempotency.c.key).where(
                (idempotency.c.first_offset > idempotency.c.last_offset + 1)
                | ~exists().where(
                    logs.c.collection == idempotency.c.collection,
                    logs.c.next_offset > idempotency.c.last_offset,
                )
            )
        ),
    ),
)
_STORE = Statement(select(store.c.store_id, store.c.format_version))
_PARTS = Statement(select(parts.c.id, parts.c.collection, parts.c.manifest).order_by(parts.c.id))
_DIMENSIONS = Statement(select(logs.c.collection, logs.c.dimension, logs.c.next_offset))
_VERSION_PARTS = Statement(
    select(
        version_parts.c.collection,
        version_parts.c.version,
        version_parts.c.position,
        version_parts.c.part,
        version_parts.c.deleted,
        version_parts.c.deleted_key,
        version_parts.c.deleted_count,
    ).order_by(version_parts.c.collection, version_parts.c.version, version_parts.c.position)
)
_HELD = Statement(
    select(references.c.key, references.c.collection, references.c.number).where(
        references.c.kind == "version"
    )
)
_is_needed = exists().where(
    references.c.key == objects.c.key,
    (references.c.kind == "fragment")
    | (references.c.kind == "quarantine")
    | exists().where(
        references.c.kind == "version",
        logs.c.collection == references.c.collection,
        logs.c.version == references.c.number,
    ),
)
_OBJECTS = Statement(
    select(objects.c.key, objects.c.size)
    .where(objects.c.state == "live", _is_needed)
    .order_by(objects.c.key)
)
_HOLDERS = Statement(
    select(references.c.key, references.c.collection).where(references.c.kind != "pin").distinct()
)
_NAMES = Statement(
    select(collections.c.id, databases.c.tenant, databases.c.name, collections.c.name).join(
        databases, databases.c.id == collections.c.database_id
    )
)
_QUARANTINE = Statement(
    select(
        quarantine.c.collection, quarantine.c.start, quarantine.c.stop, quarantine.c.reason
    ).order_by(quarantine.c.collection, quarantine.c.start)
)
_SET_ASIDE = Statement(
    select(quarantine.c.collection, quarantine.c.start).where(quarantine.c.payload.is_not(None))
)
_SET_ASIDE_PAYLOAD = Statement(
    select(quarantine.c.payload, quarantine.c.checksum).where(
        quarantine.c.collection == bindparam("collection"),
        quarantine.c.start == bindparam("start"),
    )
)
_SET_ASIDE_OBJECTS = Statement(
    select(quarantine.c.object_key, quarantine.c.checksum).where(
        quarantine.c.object_key.is_not(None)
    )
)


def contradictions(session: Session) -> Iterator[Contradiction]:
    """Every fact that does not hold. Cost: a pass over the catalog, inline payloads included."""
    found = session.all(_STORE)
    if len(found) != 1 or found[0][1] != FORMAT_VERSION:
        yield Contradiction("it does not say which store it belongs to")
    for text, statement in _MUST_BE_EMPTY:
        for row in session.all(statement):
            yield Contradiction(text.format(*row), row[0])
    logs_known = {row[0]: row[1:] for row in session.all(_DIMENSIONS)}
    manifests: dict[str, Manifest] = {}
    sizes: dict[str, int] = dict(held_objects(session))
    for part_id, collection, text in session.all(_PARTS):
        dimension, next_offset = logs_known.get(collection, (None, 0))
        try:
            manifest = manifests[part_id] = Manifest.from_json(text)
        except Corrupt as error:
            yield Contradiction(f"part {part_id}: {error}", collection)
            continue
        for problem in _manifest_problems(manifest, part_id, dimension, next_offset):
            yield Contradiction(f"part {part_id}: {problem}", collection)
        for info in manifest.objects:
            if sizes.get(info.key, info.size) != info.size:
                yield Contradiction(f"object {info.key} has two sizes", collection)
    yield from _version_problems(session, manifests)
    yield from (Contradiction(*row) for row in fragment_problems(session))
    yield from _set_aside_problems(session)


def held_objects(session: Session) -> list[tuple[str, int]]:
    """Keys and sizes of what newest versions and fragments refer to, by key."""
    return [(key, size) for key, size in session.all(_OBJECTS)]


def holders(session: Session) -> dict[str, list[str]]:
    """The ids of the collections that keep each object."""
    found: dict[str, list[str]] = {}
    for key, collection in session.all(_HOLDERS):
        found.setdefault(key, []).append(collection)
    return found


def full_names(session: Session) -> dict[str, str]:
    """By collection id, `tenant/database/name`."""
    return {row[0]: "/".join(row[1:]) for row in session.all(_NAMES)}


def set_aside(session: Session) -> list[SetAside]:
    """What is in quarantine, by collection and offset."""
    return [SetAside(*row) for row in session.all(_QUARANTINE)]


def set_aside_objects(session: Session) -> dict[str, int]:
    """Keys of objects that hold quarantined operations, and their checksums, unsigned."""
    return {key: value & _UNSIGNED for key, value in session.all(_SET_ASIDE_OBJECTS)}


def _set_aside_problems(session: Session) -> Iterator[Contradiction]:
    for collection, start in session.all(_SET_ASIDE):
        row = session.one(_SET_ASIDE_PAYLOAD, collection=collection, start=start)
        if row is not None and signed(xxh3(row[0])) != row[1]:
            problem = f"the quarantined operation {start} fails its checksum"
            yield Contradiction(problem, collection, in_payload=True)


def _manifest_problems(
    manifest: Manifest, part_id: str, dimension: int | None, next_offset: int
) -> Iterator[str]:
    if manifest.id != part_id:
        yield f"its manifest is that of part {manifest.id}"
    if manifest.dimension != dimension:
        yield f"it has {manifest.dimension} dimensions, the collection has {dimension}"
    if not 1 <= manifest.seq_min <= manifest.seq_max < next_offset:
        yield "its records are not from the collection's log"
    if any(not info.key.startswith(f"parts/{part_id}/") for info in manifest.objects):
        yield "it names an object of another part"
    for name, place in manifest.sections.items():
        inside = 0 <= place.object < len(manifest.objects)
        if not inside or not (
            0 <= place.start <= place.stop <= manifest.objects[place.object].size
        ):
            yield f"section {name} lies outside of its object"
    for name, row_bytes in (
        ("vectors", manifest.dimension * _VECTOR_ITEM_BYTES),
        ("norms", _VECTOR_ITEM_BYTES),
    ):
        section = manifest.sections.get(name)
        if section is None:
            yield f"it has no section {name}"
        elif section.stop - section.start != manifest.rows * row_bytes:
            yield f"section {name} has not the size of {manifest.rows} rows"
    if "records" not in manifest.sections:
        yield "it has no section records"
    if manifest.has_graph != any(name.split("/")[0] == "graph" for name in manifest.sections):
        yield "it has labels without a graph, or a graph without labels"


def _version_problems(session: Session, manifests: dict[str, Manifest]) -> Iterator[Contradiction]:
    held = set(session.all(_HELD))
    expected: set[tuple[Any, ...]] = set()
    before: tuple[Any, Any] | None = None
    position = 0
    for collection, version, place, part, data, deleted_key, count in session.all(_VERSION_PARTS):
        position = position + 1 if (collection, version) == before else 0
        before = collection, version
        if place != position:
            yield Contradiction(f"the parts of version {version} are not numbered", collection)
        manifest = manifests.get(part)
        keys = [] if manifest is None else [info.key for info in manifest.objects]
        expected.update(
            (key, collection, version)
            for key in [*keys, *([] if deleted_key is None else [deleted_key])]
        )
        if manifest is None:
            continue
        problem = None
        if data is not None:
            try:
                dead = manifest.rows - int(deleted_rows.decode(data, manifest.rows).sum())
                problem = None if dead == count else f"{dead} rows are deleted instead of {count}"
            except Corrupt as error:
                problem = str(error)
        elif not 0 <= count < manifest.rows or (count == 0) != (deleted_key is None):
            problem = f"{count} rows are said to be deleted"
        if problem is not None:
            yield Contradiction(f"part {part} in version {version}: {problem}", collection)
    for key, collection, version in sorted(expected - held):
        yield Contradiction(f"object {key} is not kept by version {version}", collection)
    for key, collection, version in sorted(held - expected):
        yield Contradiction(f"object {key} is kept by version {version} for nothing", collection)
