"""Merging: several parts into one, committed by rebase.

A merge may take long, so it does not compare the version it started from: under the lock it
requires its input parts to be there still, translates rows that were deleted meanwhile through the
map from input rows to output rows, and swaps. So it never blocks compactions and never resurrects
a delete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import hnswlib
import numpy as np
from numpy.typing import NDArray

from ochredb.catalog.jobs import Lease
from ochredb.catalog.versions import NewVersion, VersionPart
from ochredb.configuration import IndexSettings, index_settings
from ochredb.errors import Conflict, Corrupt
from ochredb.hints.base import Hint, HintKind
from ochredb.parts import deleted as deleted_rows
from ochredb.parts import graph as graphs
from ochredb.parts.calibration import Calibration, calibration_of
from ochredb.parts.density import built, neighbors_for
from ochredb.parts.graph_links import GraphLinks
from ochredb.parts.manifest import Manifest
from ochredb.parts.reader import Part
from ochredb.parts.writer import GraphSections, PartRows, write_part
from ochredb.priority import at_lowest_priority
from ochredb.types import Bools
from ochredb_compactor.garbage import discarding
from ochredb_compactor.gather import rows_of_parts
from ochredb_compactor.scheduler import MergePlan, unsettled_rows
from ochredb_compactor.world import World

log = logging.getLogger("ochredb.compactor")

_COMMIT_ATTEMPTS_MAX = 10


def merge(
    world: World,
    lease: Lease,
    plan: MergePlan,
    step: Callable[[], None],
    *,
    settles: bool = False,
) -> str | None:
    """Carry out `plan`; returns the new part's id, None if no row lives.

    Raises Conflict if an input is gone.

    settles: writes pause, so this graph will stay for a while: it is calibrated more thoroughly.
    """
    collection = lease.collection
    snapshot = world.logs.snapshot(collection)
    settings = index_settings(world.namespace.get_collection_by_id(collection).configuration)
    wanted = set(plan.inputs)
    inputs = [
        item
        for item in world.versions.parts(collection, snapshot.version)
        if item.manifest.id in wanted
    ]
    if len(inputs) != len(wanted):
        raise Conflict("an input of the merge is gone")
    masks = [item.live_mask(world.store) for item in inputs]
    parts = [world.parts.open(item.manifest, settings) for item in inputs]
    rows = [
        np.arange(len(part)) if mask is None else np.flatnonzero(mask)
        for part, mask in zip(parts, masks, strict=True)
    ]
    if not any(len(kept) for kept in rows):
        _commit(world, lease, inputs, masks, None, [], [])
        return None
    merged, maps = rows_of_parts(world.store, list(zip(parts, rows, strict=True)), step)
    grown = None
    if plan.grow is not None:
        grown = [item.manifest.id for item in inputs].index(plan.grow)

    def make_graph() -> _Made:
        return _graph(world, merged, parts, maps, grown, settings, settles, step)

    return _publish(
        world, lease, inputs, masks, merged, maps, settings,
        make_graph if plan.with_graph else None, step,
    )  # fmt: skip


def replace_rows(
    world: World,
    lease: Lease,
    part: VersionPart,
    kept: Bools,
    rows: PartRows | None,
    step: Callable[[], None],
) -> None:
    """Put a new part with some living rows in the place of one that lost others.

    kept: bool[n], the rows that live and are whole; rows: these, None if there are none.
    Raises Conflict if the part is gone.
    """
    if rows is None:
        _commit(world, lease, [part], [kept], None, [], [])
        return
    collection = world.namespace.get_collection_by_id(lease.collection)
    settings = index_settings(collection.configuration)
    mapping = np.full(len(kept), -1, np.int64)
    mapping[kept] = np.arange(len(rows.seqs))

    def make_graph() -> _Made:
        return _graph(world, rows, [], [], None, settings, True, step)

    with_graph = make_graph if part.manifest.has_graph else None
    _publish(world, lease, [part], [kept], rows, [mapping], settings, with_graph, step)


_Made = tuple[GraphSections, hnswlib.Index, Calibration]


def _publish(
    world: World,
    lease: Lease,
    inputs: Sequence[VersionPart],
    masks: Sequence[Bools | None],
    merged: PartRows,
    maps: Sequence[NDArray[np.int64]],
    settings: IndexSettings,
    make_graph: Callable[[], _Made] | None,
    step: Callable[[], None],
) -> str:
    """Write the part, let readers open it, commit; returns its id."""
    graph, index, calibrated = None, None, Calibration()
    if make_graph is not None:
        graph, index, calibrated = make_graph()
    part_id = world.ids.uuid7()
    manifest = replace(
        write_part(world.store, part_id, merged, graph, step),
        graph_recall=calibrated.curve,
        graph_recall_labels=calibrated.labels,
        graph_recall_queries=calibrated.queries,
    )
    objects = [(item.key, item.size) for item in manifest.objects]
    with discarding(world, objects, before_commit=True):
        new_part = world.parts.open(manifest, settings)
        if graph is not None:
            new_part.adopt_graph(index, graph.rows)
        # Who reads the collection keeps the part from now.
        world.before_commit(lease.collection, manifest)
    del new_part, index
    with discarding(world, objects):
        _commit(world, lease, inputs, masks, manifest, maps, objects)
    return part_id


def _graph(
    world: World,
    merged: PartRows,
    parts: Sequence[Part],
    maps: Sequence[NDArray[np.int64]],
    grown: int | None,
    settings: IndexSettings,
    settles: bool,
    step: Callable[[], None],
) -> _Made:
    """A graph over the merged rows: new, or the grown part's with the other rows inserted."""
    threads = world.config.graph_threads
    if not settles:  # Others are at work: leave them half of the processors, and of the caches.
        threads = max(1, threads // 2)
    rows: NDArray[np.int32] | None = None
    before, labels = Calibration(), len(merged.seqs)
    old = max(parts, key=lambda part: part.manifest.graph_labels, default=None)
    known = Calibration() if old is None else _calibration(old)
    index = None
    if grown is not None:
        try:
            rows, index = _grown(world, merged, parts[grown], maps[grown], settings, threads, step)
        except Corrupt as error:
            log.error("a damaged graph is built anew: %s", error)
        else:
            labels, before = len(rows), _calibration(parts[grown])
    if index is None:
        world.counters.graph_insertions += labels
        present = 0 if old is None else old.manifest.graph_neighbors
        index = built(merged.vectors, settings, known, present=present, threads=threads, step=step)
    calibrated = at_lowest_priority(
        partial(
            calibration_of, index, merged.vectors, rows, settings.space,
            before=before, settles=settles, seed=labels, threads=threads, step=step,
        )
    )  # fmt: skip
    links = GraphLinks.of(index, merged.vectors, rows)
    return GraphSections(links=links, rows=rows), index, calibrated


def _grown(
    world: World,
    merged: PartRows,
    part: Part,
    mapping: NDArray[np.int64],
    settings: IndexSettings,
    threads: int,
    step: Callable[[], None],
) -> tuple[NDArray[np.int32], hnswlib.Index]:
    """The part's graph with the rows inserted that are not of it, and the row of each label.

    mapping: int64[n], the new row of each row of the part, -1 if it is dead.
    """
    labels = part.manifest.graph_labels
    old_rows = part.graph_rows
    # Where each old label's record is now: label -> old row -> new row, -1 once dead.
    if old_rows is None:
        kept = mapping[:labels]
    else:
        kept = np.where(old_rows >= 0, mapping[old_rows], -1)
    is_new = np.ones(len(merged.seqs), np.bool_)
    is_new[mapping[mapping >= 0]] = False
    inserted = np.flatnonzero(is_new)
    world.counters.graph_insertions += len(inserted)
    neighbors = neighbors_for(
        settings, _calibration(part), labels + len(inserted), present=part.graph_neighbors
    )
    # Not the index that others search: inserting and searching at once is not safe.
    index = graphs.inserted(
        merged.vectors[inserted],
        settings,
        threads=threads,
        step=step,
        into=part.graph_index(room=len(inserted), max_neighbors=neighbors),
    )
    return np.concatenate([kept, inserted]).astype(np.int32), index


def _calibration(part: Part) -> Calibration:
    """Of the graph that a part has; empty if it has none."""
    known = part.manifest
    return Calibration(known.graph_recall, known.graph_recall_labels, known.graph_recall_queries)


def _commit(
    world: World,
    lease: Lease,
    inputs: Sequence[VersionPart],
    masks: Sequence[Bools | None],
    manifest: Manifest | None,
    maps: Sequence[NDArray[np.int64]],
    objects: Sequence[tuple[str, int]],
) -> None:
    bitmaps: dict[str, bytes] = {}

    def build(_version: int, indexed: int, current: Sequence[VersionPart]) -> NewVersion:
        now = {item.manifest.id: item for item in current}
        started = [item.manifest.id for item in inputs]
        if any(part_id not in now for part_id in started):
            raise Conflict("an input of the merge was replaced meanwhile")
        parts = [item for item in current if item.manifest.id not in started]
        used = False
        if manifest is not None:
            died = _died_meanwhile(inputs, masks, now, maps, bitmaps)
            used = len(died) < manifest.rows  # Else everything in it is dead: leave it an orphan.
            if used:
                parts.append(_with_deleted(manifest, died))
        return NewVersion(
            parts=parts,
            indexed_offset=indexed,
            new_objects=objects if used else [],
            new_parts=[manifest] if used and manifest is not None else [],
            unsettled_rows=unsettled_rows(parts, world.config),
        )

    for _ in range(_COMMIT_ATTEMPTS_MAX):
        try:
            version = world.versions.commit(lease, build)
        except _Unread as unread:  # Nothing is read from the store inside a transaction.
            bitmaps[unread.key] = world.store.get(unread.key)
        else:
            world.hints.publish(Hint(HintKind.VERSION, lease.collection, version))
            return
    raise Conflict("rows of the merge's inputs die faster than it can follow")


class _Unread(Conflict):
    """The current version names a bitmap of deleted rows that has to be fetched first."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} has not been read yet")
        self.key = key


def _died_meanwhile(
    inputs: Sequence[VersionPart],
    masks: Sequence[Bools | None],
    now: dict[str, VersionPart],
    maps: Sequence[NDArray[np.int64]],
    bitmaps: dict[str, bytes],
) -> NDArray[np.int64]:
    """Output rows whose records were deleted or replaced since the merge began.

    bitmaps: content of the objects `deleted/...` read so far. Raises _Unread for another one.
    """
    died = [np.empty(0, np.int64)]
    for item, mask, mapping in zip(inputs, masks, maps, strict=True):
        latest = now[item.manifest.id]
        if latest.deleted_count == item.deleted_count:
            continue  # Rows never come back to life: an equal count is an equal set.
        data = latest.deleted
        if latest.deleted_key is not None:
            data = bitmaps.get(latest.deleted_key)
            if data is None:
                raise _Unread(latest.deleted_key)
        assert data is not None, "more rows are dead than when the merge began"
        live_now = deleted_rows.decode(data, latest.manifest.rows)
        gone = ~live_now if mask is None else mask & ~live_now
        died.append(mapping[gone])
    return np.sort(np.concatenate(died))


def _with_deleted(manifest: Manifest, died: NDArray[np.int64]) -> VersionPart:
    return VersionPart(
        manifest=manifest,
        # Inline whatever its size: nothing is written to the store inside a transaction.
        deleted=deleted_rows.encode(died) if len(died) else None,
        deleted_key=None,
        deleted_count=len(died),
    )
