"""Compaction: fold a collection's tail into a new part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ochredb.catalog.jobs import Lease
from ochredb.catalog.versions import NewVersion, VersionPart
from ochredb.configuration import index_settings
from ochredb.errors import Conflict
from ochredb.materialise import Fold
from ochredb.parts import deleted as deleted_rows
from ochredb.parts.manifest import Manifest
from ochredb.parts.writer import write_part
from ochredb.replay import read_operations
from ochredb.segment import SegmentView
from ochredb_compactor.gather import rows_of_tail
from ochredb_compactor.scheduler import unsettled_rows
from ochredb_compactor.world import World


def compact(world: World, lease: Lease, step: Callable[[], None]) -> int | None:
    """Fold everything that is in the log now; returns the new version, None if nothing was there.

    Raises Conflict if somebody else changed the version meanwhile (I7); the parts written are then
    orphans and are swept.
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
    for first, operations in read_operations(
        world.logs, world.store, collection, snapshot.indexed_offset + 1, snapshot.last_offset
    ):
        fold.apply(first, operations)
        step()
    objects: list[tuple[str, int]] = []
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
            indexed_offset=snapshot.last_offset,
            new_objects=objects,
            new_parts=[] if new_part is None else [new_part],
            unsettled_rows=unsettled_rows(parts),
        )

    return world.versions.commit(lease, build)


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
