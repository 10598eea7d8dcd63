"""What is due when: bounded tiers, and every row into a graph once."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from ochredb.catalog.versions import VersionPart
from ochredb.parts.manifest import Manifest, ObjectInfo
from ochredb.types import PendingWork
from ochredb_compactor.config import CompactorConfig
from ochredb_compactor.scheduler import (
    GRAPH_COMPONENTS_MIN,
    GRAPH_PART_ROWS_MAX,
    OBJECT_BYTES_MAX,
    MergePlan,
    compaction_due,
    merge_plan,
    unsettled_rows,
)

from .kernel import ManualClock, add_rows, make_collection, running_node

DIMENSION = 128


def _part(
    name: str, rows: int, *, labels: int = 0, dead: int = 0, row_bytes: int = 0
) -> VersionPart:
    manifest = Manifest(
        id=name,
        rows=rows,
        dimension=DIMENSION,
        graph_labels=labels,
        seq_min=1,
        seq_max=rows,
        objects=(ObjectInfo(name, rows * row_bytes, 0), ObjectInfo(f"{name}/small", 8, 0)),
        sections={},
    )
    return VersionPart(manifest=manifest, deleted=None, deleted_key=None, deleted_count=dead)


@dataclass
class Collection:
    """Parts under the scheduler, and what its merges cost."""

    parts: list[VersionPart] = field(default_factory=list)
    insertions: int = 0
    rewritten_rows: int = 0
    graph_rewrites: int = 0
    names: int = 0
    row_bytes: int = 0

    def arrive(self, rows: int) -> None:
        self.parts.append(_part(self._name(), rows, row_bytes=self.row_bytes))

    def _name(self) -> str:
        self.names += 1
        return f"p{self.names}"

    def carry_out(self, plan: MergePlan) -> None:
        inputs = [part for part in self.parts if part.manifest.id in plan.inputs]
        assert len(inputs) == len(plan.inputs)
        live = sum(part.live_rows for part in inputs)
        labels = 0
        if plan.with_graph:
            grown = [part for part in inputs if part.manifest.id == plan.grow]
            old = grown[0] if grown else None
            new = live if old is None else live - old.live_rows
            labels = new if old is None else old.manifest.graph_labels + new
            self.insertions += new
            self.graph_rewrites += 1
        self.rewritten_rows += live
        self.parts = [part for part in self.parts if part not in inputs]
        if live:
            self.parts.append(_part(self._name(), live, labels=labels, row_bytes=self.row_bytes))

    def settle(self, *, idle: bool) -> None:
        for _ in range(100):
            plan = merge_plan(self.parts, idle=idle)
            if plan is None:
                return
            self.carry_out(plan)
        pytest.fail("merging does not end")


@pytest.mark.parametrize("step", [500, 4_000, 10_000])
def test_100_000_rows_enter_a_graph_once_each_and_are_rewritten_a_few_times(step: int) -> None:
    collection, total = Collection(), 100_000
    parts_max = 0
    for _ in range(0, total, step):
        collection.arrive(step)
        collection.settle(idle=False)
        parts_max = max(parts_max, len(collection.parts))
    assert parts_max <= 10
    collection.settle(idle=True)
    assert unsettled_rows(collection.parts, CompactorConfig()) == 0
    flat_rows = sum(part.live_rows for part in collection.parts if not part.manifest.has_graph)
    assert flat_rows * DIMENSION < GRAPH_COMPONENTS_MIN, "only what a scan does better"
    assert sum(part.manifest.has_graph for part in collection.parts) == 1
    assert collection.insertions <= 1.0 * total
    assert collection.rewritten_rows <= 8.0 * total, collection.rewritten_rows / total
    assert collection.graph_rewrites <= 20


def test_a_trickle_with_pauses_still_inserts_each_row_once() -> None:
    """The worst case for growing: the writer pauses after every part."""
    collection = Collection()
    for _ in range(60):
        collection.arrive(300)
        collection.settle(idle=True)
    assert collection.insertions <= 60 * 300
    assert len(collection.parts) <= 8


def test_small_parts_are_merged_in_tiers_and_stay_few() -> None:
    collection = Collection()
    for number in range(400):
        collection.arrive(1)
        collection.settle(idle=number % 7 == 0)
        assert len(collection.parts) <= 8
    assert collection.insertions == 0
    assert collection.rewritten_rows <= 400 * 400


def test_a_graph_with_too_many_dead_rows_is_built_anew_or_given_up() -> None:
    assert merge_plan([_part("a", 10_000, labels=10_000, dead=1_900)], idle=True) is None
    assert merge_plan([_part("a", 10_000, labels=10_000, dead=2_100)], idle=True) == MergePlan(
        ("a",), None, True
    )
    # While writes go on, a new graph would soon be as old: wait for more.
    assert merge_plan([_part("a", 10_000, labels=10_000, dead=3_900)], idle=False) is None
    assert merge_plan([_part("a", 10_000, labels=10_000, dead=4_100)], idle=False) == MergePlan(
        ("a",), None, True
    )
    assert merge_plan([_part("a", 10_000, labels=10_000, dead=9_000)], idle=False) == MergePlan(
        ("a",), None, False
    )
    # Rows that died before the last growth are labels without rows.
    assert merge_plan([_part("a", 8_000, labels=10_100)], idle=True) == MergePlan(
        ("a",), None, True
    )


def test_growing_waits_for_a_quarter_under_load_and_for_nothing_when_idle() -> None:
    parts = [_part("g", 100_000, labels=100_000), _part("a", 6_000), _part("b", 6_000)]
    assert merge_plan(parts, idle=False) is None
    assert merge_plan(parts, idle=True) == MergePlan(("g", "a", "b"), "g", True)
    parts.append(_part("c", 14_000))
    assert merge_plan(parts, idle=False) == MergePlan(("g", "a", "b", "c"), "g", True)


def test_a_remainder_too_small_for_a_graph_of_its_own_joins_the_one_there_is() -> None:
    """Beside a graph it would be scanned by every search, for ever."""
    parts = [_part("g", 16_500, labels=16_500), _part("f", 3_500)]
    assert 3_500 * DIMENSION < GRAPH_COMPONENTS_MIN
    assert merge_plan(parts, idle=True) == MergePlan(("g", "f"), "g", True)
    assert unsettled_rows(parts, CompactorConfig()) == 3_500
    assert merge_plan([parts[0], _part("f", 500)], idle=True) is None
    assert merge_plan(parts, idle=False) is None
    assert merge_plan([_part("f", 3_500)], idle=True) is None


def test_a_full_graph_part_is_not_grown_any_more() -> None:
    full = _part("full", GRAPH_PART_ROWS_MAX, labels=GRAPH_PART_ROWS_MAX)
    small = _part("small", 10_000, labels=10_000)
    assert merge_plan([full, _part("a", 6_000)], idle=True) == MergePlan(("a",), None, True)
    assert merge_plan([full, small, _part("a", 6_000)], idle=True) == MergePlan(
        ("small", "a"), "small", True
    )


def test_a_flat_part_with_many_dead_rows_is_rewritten() -> None:
    assert merge_plan([_part("a", 1_000, dead=500)], idle=False) == MergePlan(("a",), None, False)
    assert merge_plan([_part("a", 1_000, dead=300)], idle=False) is None
    assert merge_plan([_part("a", 100, dead=90)], idle=False) is None, "too small to matter now"


def test_when_writes_pause_the_dead_take_a_quarter_of_what_lives_at_most() -> None:
    parts = [_part("a", 1_000, dead=300), _part("b", 1_000, dead=150), _part("c", 50, dead=20)]
    assert merge_plan(parts, idle=True) == MergePlan(("a", "c"), None, False)
    assert merge_plan(parts[:2], idle=True) == MergePlan(("a",), None, False)
    assert merge_plan([_part("a", 1_000, dead=200), _part("c", 50, dead=5)], idle=True) is None
    assert merge_plan([_part("c", 10, dead=3)], idle=True) == MergePlan(("c",), None, False)
    rng = random.Random(5)
    for _ in range(300):
        collection = Collection()
        for number in range(rng.randrange(1, 12)):
            rows = rng.choice((1, 20, 300, 4_000, 9_000))
            labels = rows if rows > 4_000 and rng.random() < 0.5 else 0
            dead = int(rng.random() * rows)
            collection.parts.append(_part(f"part-{number}", rows, labels=labels, dead=dead))
        live = sum(part.live_rows for part in collection.parts)
        collection.settle(idle=True)
        stored = sum(max(p.manifest.rows, p.manifest.graph_labels) for p in collection.parts)
        assert sum(part.live_rows for part in collection.parts) == live
        assert stored <= 1.26 * live, collection.parts


def test_unsettled_rows_are_those_that_an_idle_merge_would_touch() -> None:
    assert unsettled_rows([], CompactorConfig()) == 0
    assert unsettled_rows([_part("a", 4_000)], CompactorConfig()) == 0
    grow = [_part("g", 50_000, labels=50_000), _part("a", 6_000, dead=10)]
    assert unsettled_rows(grow, CompactorConfig()) == 5_990
    assert unsettled_rows([_part(name, 100) for name in "abcd"], CompactorConfig()) == 400


@pytest.mark.parametrize(
    ("rows", "size", "quiet_s", "due"),
    [
        (0, 0, 100.0, False),
        (1, 100, 4.9, False),
        (1, 100, 5.0, True),
        (499, 100, 0.6, False),
        (500, 100, 0.4, False),
        (500, 100, 0.5, True),
        (8_000, 100, 0.0, True),
        (1, 16 << 20, 0.0, True),
    ],
)
def test_a_tail_is_folded_when_it_is_large_or_its_writer_rests(
    rows: int, size: int, quiet_s: float, due: bool
) -> None:
    work = PendingWork("c", rows, size, 1_000_000, 0)
    now_us = 1_000_000 + int(quiet_s * 1e6)
    assert compaction_due(work, now_us, CompactorConfig()) is due


@pytest.mark.parametrize(
    ("rows", "quiet_s", "due"),
    [(1, 6, False), (499, 59, False), (499, 61, True), (500, 0.6, True), (8_000, 0, True)],
)
def test_a_small_tail_waits_while_others_are_written(rows: int, quiet_s: float, due: bool) -> None:
    now_us = 1_000_000_000
    work = PendingWork("c", rows, 100, now_us - int(quiet_s * 1e6), 0)
    assert compaction_due(work, now_us, CompactorConfig(), busy=True) is due


def test_what_may_be_due_is_found_without_looking_at_all() -> None:
    """The queries give exactly the tails that the scheduler could want, and the parts."""
    clock = ManualClock()
    with running_node(clock=clock) as node:
        names = {name: make_collection(node, name) for name in ("old", "large", "young", "empty")}
        add_rows(node, names["old"], 0, 3)
        clock.advance(10)
        add_rows(node, names["large"], 0, 20)
        add_rows(node, names["young"], 0, 3)
        quiet_since_us = clock.now_us() - 5_000_000

        def found(rows_min: int, bytes_min: int) -> list[str]:
            tails = list(node.logs.tails(rows_min, bytes_min, quiet_since_us))
            return sorted(name for name, id_ in names.items() for t in tails if t.collection == id_)

        assert found(20, 1 << 30) == ["large", "old"]
        assert found(21, 1 << 30) == ["old"]
        assert found(21, 1) == ["large", "old", "young"]
        assert node.logs.unsettled() == []
        for first in range(0, 2_000, 500):
            add_rows(node, names["large"], 100 + first, 500)
            node.compactor.fold_now(names["large"])
        assert [item.collection for item in node.logs.unsettled()] == [names["large"]]
        assert {item.collection for item in node.logs.pending()} == set(names.values()) - {
            names["empty"]
        }


def test_tails_come_in_short_statements_and_none_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running_node() as node:
        names = {make_collection(node, f"collection-{number:03d}") for number in range(405)}
        for name in names:
            add_rows(node, name, 0, 1)
        sizes: list[int] = []
        read = node.database.read

        class Counting:
            def __init__(self) -> None:
                self._block = read()

            def __enter__(self) -> Counting:
                self._session = self._block.__enter__()
                return self

            def __exit__(self, *error: object) -> None:
                self._block.__exit__(*error)  # type: ignore[arg-type]

            def all(self, *arguments: object, **params: object) -> object:
                rows = self._session.all(*arguments, **params)  # type: ignore[arg-type]
                sizes.append(len(rows))
                return rows

        monkeypatch.setattr(node.database, "read", Counting)
        assert {work.collection for work in node.logs.tails(1, 1 << 40, 0)} == names
        assert sizes == [200, 200, 5]


@pytest.mark.parametrize("row_bytes", [100, 12_288, 3_000_000, 300_000_000])
def test_no_merge_makes_an_object_that_is_too_large(row_bytes: int) -> None:
    collection = Collection(row_bytes=row_bytes)
    rng = random.Random(3)
    rows_max = OBJECT_BYTES_MAX // row_bytes
    for _ in range(400):
        collection.arrive(min(rows_max, rng.choice((3, 300, 16_000))))
        collection.settle(idle=rng.random() < 0.2)
        assert max(part.manifest.rows for part in collection.parts) <= rows_max
    collection.settle(idle=True)
    rows = sum(part.manifest.rows for part in collection.parts)
    # Most parts are half full at least; those below a graph's worth are merged in tiers.
    assert len(collection.parts) <= 2 * rows / rows_max + 25
