"""What is due, decided by data alone. Pure: no clock, no store, no catalog.

Flat parts have no graph and are scanned. They are merged in tiers of a factor of four, so each row
is rewritten a logarithmic number of times; when their rows together are worth a graph they are
inserted into the collection's large graph part (growing it) or become its first. So a row enters a
graph once, unless too much of a graph is dead and it is built anew.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ochredb.catalog.versions import VersionPart
from ochredb.types import PendingWork
from ochredb_compactor.config import CompactorConfig
from ochredb_compactor.memory import graph_rows

GRAPH_COMPONENTS_MIN = 640_000  # rows x dimension from which a graph beats a scan (0.1 ms).
GRAPH_ROWS_MIN = 2_000
GRAPH_PART_ROWS_MAX = 4_000_000
# Of the objects that a merge writes: one in S3 has 5 GiB at most (decision 0032).
OBJECT_BYTES_MAX = 4 << 30
# Each growth rewrites the part: under load grow by this share, and by no fewer components than a
# scan of which takes some tenths of a millisecond; when writes pause by the smaller share. Fewer
# flat rows than that stay flat, and are scanned.
GROW_SHARE = 0.25
GROW_COMPONENTS_MIN = 1_280_000
GROW_SHARE_IDLE = 0.05
# A graph with more dead labels is built anew: at once above the larger share, when writes pause
# above the smaller one, and so are flat parts, so that dead rows take a quarter of the disk that
# living ones do, at most. While records are being replaced, a new graph is soon as old as the last.
DEAD_SHARE_MAX = 0.4
DEAD_SHARE_MAX_IDLE = 0.2
TIER_PARTS = 4
TIER_FACTOR = 4
TIER_ROWS_MIN = 256


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Merge these parts into one. grow: the input whose graph takes the others' rows, or None."""

    inputs: tuple[str, ...]
    grow: str | None
    with_graph: bool


def compaction_due(
    work: PendingWork, now_us: int, config: CompactorConfig, *, busy: bool = False
) -> bool:
    """Whether a collection's tail should become a part now.

    busy: other collections are written to. A small tail costs little and can wait for a pause.
    """
    if work.tail_rows == 0:
        return False
    if work.tail_rows >= config.tail_rows_due or work.tail_bytes >= config.tail_bytes_due:
        return True
    quiet_s = (now_us - work.time_us) / 1e6
    if work.tail_rows >= config.settle_rows_due and quiet_s >= config.settle_due_s:
        return True
    small = work.tail_rows < config.settle_rows_due
    return quiet_s >= (config.busy_due_s if busy and small else config.idle_due_s)


def merge_plan(
    parts: Sequence[VersionPart], *, idle: bool, graph_rows_max: int = GRAPH_PART_ROWS_MAX
) -> MergePlan | None:
    """The next merge that is due, or None.

    idle: no write is going on, so finish what is left. graph_rows_max: a graph of as many rows
        grows no more, and none becomes larger but by the last part that is added to it.
    """
    graphs = [part for part in parts if part.manifest.has_graph]
    every_flat = [part for part in parts if not part.manifest.has_graph]
    flats = _fitting(every_flat)
    for part in graphs:
        if _dead_share(part) > (DEAD_SHARE_MAX_IDLE if idle else DEAD_SHARE_MAX):
            return MergePlan((part.manifest.id,), None, _wants_graph([part]))
    target = max(
        (
            part
            for part in graphs
            if part.manifest.graph_labels < graph_rows_max
            and _largest_bytes(part) + sum(map(_largest_bytes, flats)) <= OBJECT_BYTES_MAX
        ),
        key=lambda part: part.manifest.rows,
        default=None,
    )
    if target is None:
        if flats and _wants_graph(flats):
            return MergePlan(_ids(_first_rows(flats, graph_rows_max)), None, True)
    elif flats and _may_grow(target, flats, idle):
        joining = _first_rows(flats, graph_rows_max - target.manifest.graph_labels)
        return MergePlan(_ids([target, *joining]), target.manifest.id, True)
    for part in every_flat:
        if part.manifest.rows >= TIER_ROWS_MIN and _dead_share(part) > DEAD_SHARE_MAX:
            return MergePlan((part.manifest.id,), None, False)
    if idle and _live(flats) < (1.0 - DEAD_SHARE_MAX_IDLE) * _rows(flats):
        # Some are so dead that all together are: each row written anew is paid for by a dead one.
        return MergePlan(
            _ids([part for part in flats if _dead_share(part) > DEAD_SHARE_MAX_IDLE]), None, False
        )
    return _tier_merge(flats)


def rewrite_plan(
    parts: Sequence[VersionPart], dead_share_max: float, clean: Collection[str]
) -> MergePlan | None:
    """Write a part anew, alone, of which more than this share is dead; None if there is none.

    clean: ids of parts in which only rows may be dead that died too late to matter.
    """
    for part in parts:
        if part.manifest.id not in clean and _dead_share(part) > dead_share_max:
            wants_graph = part.live_rows > 0 and _wants_graph([part])
            return MergePlan((part.manifest.id,), None, wants_graph)
    return None


def rebuild_plan(parts: Sequence[VersionPart], part_id: str) -> MergePlan | None:
    """The merge that writes one part anew, indexes and all; None if it is not there any more."""
    for part in parts:
        if part.manifest.id == part_id:
            return MergePlan((part_id,), None, part.manifest.has_graph)
    return None


def graph_rows_max(parts: Sequence[VersionPart], config: CompactorConfig) -> int:
    """How many rows a graph over these parts may have: as many as the process has memory for."""
    if config.memory_bytes is None or not parts:
        return GRAPH_PART_ROWS_MAX
    return min(GRAPH_PART_ROWS_MAX, graph_rows(config.memory_bytes, parts[0].manifest.dimension))


def unsettled_rows(parts: Sequence[VersionPart], config: CompactorConfig) -> int:
    """Rows of parts that a merge is still to work on once writes pause; 0 = settled."""
    plan = merge_plan(parts, idle=True, graph_rows_max=graph_rows_max(parts, config))
    if plan is None:
        return 0
    return sum(
        part.live_rows
        for part in parts
        if part.manifest.id in plan.inputs and part.manifest.id != plan.grow
    )


def _tier_merge(flats: Sequence[VersionPart]) -> MergePlan | None:
    tiers: dict[int, list[VersionPart]] = {}
    for part in flats:
        tier, rows = 0, part.live_rows
        while rows > TIER_ROWS_MIN:
            tier, rows = tier + 1, rows // TIER_FACTOR
        tiers.setdefault(tier, []).append(part)
    for _, members in sorted(tiers.items()):
        if len(members) >= TIER_PARTS:
            return MergePlan(_ids(members), None, False)
    return None


def _may_grow(target: VersionPart, flats: Sequence[VersionPart], idle: bool) -> bool:
    """Whether the rows of `flats` should join the graph of `target` now.

    When idle also rows that would not be worth a graph of their own: they are scanned each time.
    """
    rows = _live(flats)
    if idle:
        return rows >= GROW_SHARE_IDLE * target.live_rows
    enough = rows * target.manifest.dimension >= GROW_COMPONENTS_MIN
    return enough and rows >= GROW_SHARE * target.live_rows


def _fitting(parts: Sequence[VersionPart]) -> list[VersionPart]:
    """Those that one part can hold: of many that are too large together, the smaller ones."""
    left = OBJECT_BYTES_MAX
    chosen = set()
    for part in sorted(parts, key=_largest_bytes):
        left -= _largest_bytes(part)
        if left >= 0:
            chosen.add(part.manifest.id)
    return [part for part in parts if part.manifest.id in chosen]


def _largest_bytes(part: VersionPart) -> int:
    """Of its objects. No object of a part merged of several is larger than these together."""
    return max((item.size for item in part.manifest.objects), default=0)


def _wants_graph(parts: Sequence[VersionPart]) -> bool:
    rows = _live(parts)
    return rows >= GRAPH_ROWS_MIN and rows * parts[0].manifest.dimension >= GRAPH_COMPONENTS_MIN


def _dead_share(part: VersionPart) -> float:
    """Of a graph the labels count: rows that died before the last growth are still in it."""
    total = max(part.manifest.rows, part.manifest.graph_labels)
    return 1.0 - part.live_rows / total


def _live(parts: Sequence[VersionPart]) -> int:
    return sum(part.live_rows for part in parts)


def _first_rows(flats: Sequence[VersionPart], rows_max: int) -> Sequence[VersionPart]:
    """The first parts, at least one, until they have so many rows."""
    rows = 0
    for number, part in enumerate(flats, 1):
        rows += part.live_rows
        if rows >= rows_max:
            return flats[:number]
    return flats


def _rows(parts: Sequence[VersionPart]) -> int:
    return sum(part.manifest.rows for part in parts)


def _ids(parts: Sequence[VersionPart]) -> tuple[str, ...]:
    return tuple(part.manifest.id for part in parts)
