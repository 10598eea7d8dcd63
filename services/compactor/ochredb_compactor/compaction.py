"""Compaction: fold a collection's tail into a new part."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from ochredb.catalog.jobs import Lease
from ochredb.catalog.quarantine import Quarantined
from ochredb.catalog.versions import NewVersion, VersionPart
from ochredb.checksum import signed, xxh3
from ochredb.configuration import index_settings
from ochredb.crash_points import reach
from ochredb.errors import Conflict
from ochredb.hints.base import Hint, HintKind
from ochredb.materialise import Fold
from ochredb.parts import deleted as deleted_rows
from ochredb.parts.manifest import Manifest
from ochredb.parts.writer import write_part
from ochredb.poison import Admitted, Poison
from ochredb.replay import read_fragments
from ochredb.segment import SegmentView
from ochredb.types import Operations
from ochredb_compactor.config import CompactorConfig
from ochredb_compactor.garbage import discarding
from ochredb_compactor.gather import rows_of_tail
from ochredb_compactor.scheduler import unsettled_rows
from ochredb_compactor.world import World

log = logging.getLogger("ochredb.compactor")

_QUARANTINE_INLINE_BYTES_MAX = 64 << 10


def compact(world: World, lease: Lease, step: Callable[[], None]) -> int | None:
    """Fold the log, or as much of it as memory is meant for; returns the new version.

    Returns None if nothing was there.
    Raises Conflict if somebody else changed the version meanwhile (I7); what was written is then
    deleted.
    """
    collection = lease.collection
    snapshot = world.logs.snapshot(collection)
    if snapshot.indexed_offset == snapshot.last_offset:
        return None
    settings = index_settings(world.namespace.get_collection_by_id(collection).configuration)
    current = world.versions.parts(collection, snapshot.version)
    base = [
        SegmentView(
            world.parts.open(item.manifest, settings),
            item.live_mask(world.store),
            item.live_rows,
            item.manifest.id,
        )
        for item in current
    ]
    fold = Fold(snapshot.version, snapshot.indexed_offset, base)
    poison: list[Poison] = []
    fragments = read_fragments(
        world.logs,
        world.store,
        collection,
        snapshot.indexed_offset + 1,
        snapshot.last_offset,
        snapshot.dimension,
        poison.append,
    )
    for _ in fold.apply_all(_some(fragments, world.config)):
        step()
    objects: list[tuple[str, int]] = []
    with discarding(world, objects, before_commit=True):
        quarantined = [_quarantined(world, collection, item, objects) for item in poison]
        parts = _older_parts(world, current, fold.base, objects)
        new_part = _new_part(world, fold, step)
        if new_part is not None:
            objects += [(item.key, item.size) for item in new_part.objects]
            parts.append(
                VersionPart(manifest=new_part, deleted=None, deleted_key=None, deleted_count=0)
            )
            world.before_commit(collection, new_part)

    def build(version: int, _indexed: int, _parts: Sequence[VersionPart]) -> NewVersion:
        if version != snapshot.version:
            raise Conflict(f"version {version} replaced {snapshot.version} meanwhile")
        return NewVersion(
            parts=parts,
            indexed_offset=fold.last_offset,
            new_objects=objects,
            new_parts=[] if new_part is None else [new_part],
            unsettled_rows=unsettled_rows(parts, world.config),
            quarantined=quarantined,
        )

    with discarding(world, objects):
        version = world.versions.commit(lease, build)
    world.hints.publish(Hint(HintKind.VERSION, collection, version))
    for item in poison:
        log.error(
            "collection %s: operations %d to %d cannot be folded and are in quarantine: %s",
            collection, item.start, item.stop, item.reason,
        )  # fmt: skip
    return version


def _quarantined(
    world: World, collection: str, item: Poison, objects: list[tuple[str, int]]
) -> Quarantined:
    """The row of it; many bytes become an object, added to `objects`."""
    key = None
    if len(item.data) > _QUARANTINE_INLINE_BYTES_MAX:
        key = f"fragments/{world.ids.uuid7()}"
        world.store.create(key, item.data)
        reach("quarantine.object-created")
        objects.append((key, len(item.data)))
    return Quarantined(
        collection=collection,
        start=item.start,
        stop=item.stop,
        reason=item.reason,
        payload=item.data if key is None else None,
        object_key=key,
        checksum=signed(xxh3(item.data)),
    )


def _some(
    fragments: Iterable[Admitted], config: CompactorConfig
) -> Iterator[tuple[int, Operations]]:
    """The first fragments, at least one, until there is enough for one compaction."""
    rows = size_bytes = 0
    for runs in fragments:
        for first, operations in runs:
            yield first, operations
            rows += len(operations)
            size_bytes += _size_bytes(operations)
        if rows >= config.fold_rows_max or size_bytes >= config.fold_bytes_max:
            return


def _size_bytes(operations: Operations) -> int:
    """Bytes of vectors, documents and metadata, about. Cost: 50 ns per operation."""
    size = 0 if operations.embeddings is None else operations.embeddings.nbytes
    for column in (operations.documents, operations.metadatas):
        if column is not None:
            size += sum(map(len, filter(None, column)))
    return size


def _new_part(world: World, fold: Fold, step: Callable[[], None]) -> Manifest | None:
    chunks = fold.tail_live_rows()
    if not chunks:
        return None
    rows = rows_of_tail(chunks)
    step()
    return write_part(world.store, world.ids.uuid7(), rows, None, step)


def _older_parts(
    world: World,
    current: Sequence[VersionPart],
    folded: Sequence[SegmentView],
    objects: list[tuple[str, int]],
) -> list[VersionPart]:
    """The parts of the version before, with the rows that the tail replaced or deleted marked dead.

    A part without a living row is left out. Large bitmaps are written as objects, added to
    `objects`.
    """
    parts = []
    for item, view in zip(current, folded, strict=True):
        if view.live_count == 0:
            continue
        if view.live_count == item.live_rows:
            parts.append(item)
            continue
        assert view.live is not None
        data = deleted_rows.encode(np.flatnonzero(~view.live))
        key = None
        if len(data) > deleted_rows.INLINE_BYTES_MAX:
            key = f"deleted/{world.ids.uuid7()}"
            world.store.create(key, data)
            reach("deleted-rows.created")
            objects.append((key, len(data)))
        parts.append(
            VersionPart(
                manifest=item.manifest,
                deleted=data if key is None else None,
                deleted_key=key,
                deleted_count=item.manifest.rows - view.live_count,
            )
        )
    return parts
