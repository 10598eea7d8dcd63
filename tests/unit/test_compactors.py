"""Which work comes first, what memory it may take, and how a compactor is told what to do (I9)."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from ochredb.catalog.pending import Due
from ochredb.errors import Unavailable
from ochredb.hints.base import Hint, HintKind, Listener
from ochredb.types import Op, PendingWork
from ochredb_compactor import service
from ochredb_compactor.config import CompactorConfig
from ochredb_compactor.memory import MemoryBudget, fold_bytes, graph_rows, merge_bytes
from ochredb_compactor.scheduler import GRAPH_PART_ROWS_MAX, graph_rows_max, merge_plan
from ochredb_compactor.urgency import is_taken, of_merge, of_tail, ordered
from ochredb_node.config import NodeConfig
from ochredb_node.node import Node

from .kernel import add_rows, append, ids_of, make_collection, operations, running_node
from .test_scheduler import DIMENSION, _part

CONFIG = CompactorConfig()
NOW_US = 1_800_000_000_000_000


def _due(
    name: str, *, rows: int = 0, size: int = 0, age_s: float = 0.0, unsettled: int = 0,
    owner: str | None = None, left_s: float = 0.0,
) -> Due:  # fmt: skip
    oldest_us = NOW_US - int(age_s * 1e6)
    work = PendingWork(name, rows, size, oldest_us, unsettled)
    return Due(work, oldest_us, owner, NOW_US + int(left_s * 1e6))


def _order(found: list[Due], seed: int = 1) -> list[str]:
    return [due.collection for due in ordered(found, of_tail, NOW_US, CONFIG, random.Random(seed))]


class TestUrgency:
    def test_is_size_and_age(self) -> None:
        assert of_tail(_due("a", rows=8_000), NOW_US, CONFIG) == pytest.approx(1.0)
        assert of_tail(_due("a", size=16 << 20), NOW_US, CONFIG) == pytest.approx(1.0)
        assert of_tail(_due("a", rows=3, age_s=60), NOW_US, CONFIG) == pytest.approx(12.0, rel=0.01)
        assert of_tail(_due("a", rows=3, age_s=-60), NOW_US, CONFIG) < 0.01, "the clock was set"

    def test_a_full_backlog_comes_before_small_ones_that_are_younger(self) -> None:
        found = [_due("small", rows=3, age_s=6), _due("full", rows=200_000, age_s=1)]
        assert _order(found) == ["full", "small"]

    def test_nobody_waits_for_ever_behind_a_collection_that_is_always_full(self) -> None:
        """It is folded a piece at a time, and what is left of it is younger."""
        waited_s = 0.0
        while True:
            full = _due("full", rows=200_000, size=512 << 20, age_s=1.0)
            if _order([full, _due("small", rows=1, age_s=waited_s)])[0] == "small":
                break
            waited_s += 1.0
        assert 60 < waited_s < 400

    def test_compactors_begin_with_different_ones_of_equal_urgency(self) -> None:
        found = [_due(f"c{number}", rows=8_000 + number) for number in range(20)]
        firsts = {_order(found, seed)[0] for seed in range(30)}
        assert len(firsts) > 8

    def test_large_merges_do_not_keep_small_ones_for_long(self) -> None:
        large = _due("large", unsettled=4_000_000)
        small = [_due("small", unsettled=10, age_s=age_s) for age_s in (1.0, 120.0)]
        urgency = [of_merge(due, NOW_US, CONFIG) for due in (large, *small)]
        assert urgency[1] < urgency[0] < urgency[2]

    def test_what_another_has_leased_is_taken_until_it_is_gone_or_too_late(self) -> None:
        def taken(due: Due, gone: bool = False) -> bool:
            return is_taken(due, NOW_US, 60.0, lambda _owner: gone)

        assert taken(_due("a", owner="x", left_s=10))
        assert not taken(_due("a", owner="x", left_s=10), gone=True)
        assert not taken(_due("a", owner="x", left_s=-1))
        assert not taken(_due("a"))
        assert not taken(_due("a", owner="x", left_s=3_600)), "the clock was set back"


class TestMemory:
    def test_jobs_wait_until_there_is_room(self) -> None:
        budget = MemoryBudget(100)
        begun, ended = threading.Event(), threading.Event()

        def second() -> None:
            begun.set()
            with budget.held(50, lambda: None):
                ended.set()

        with budget.held(60, lambda: None):
            thread = threading.Thread(target=second)
            thread.start()
            assert begun.wait(10)
            assert not ended.wait(0.25)
        assert ended.wait(10)
        thread.join()

    def test_one_that_is_too_large_runs_alone(self) -> None:
        budget = MemoryBudget(100)
        with budget.held(1_000, lambda: None), pytest.raises(Unavailable):  # noqa: SIM117
            with budget.held(1, _give_up):
                pytest.fail("beside it")
        with budget.held(1, lambda: None):
            pass

    def test_without_a_budget_nobody_waits(self) -> None:
        budget = MemoryBudget(None)
        with budget.held(1 << 60, _give_up), budget.held(1 << 60, _give_up):
            pass

    def test_graphs_are_as_large_as_fits(self) -> None:
        small = CompactorConfig(memory_bytes=256 << 20)
        rows = graph_rows_max([_part("a", 1)], small)
        assert 100_000 < rows < 400_000
        assert merge_bytes(rows, DIMENSION, with_graph=True) <= 256 << 20
        assert graph_rows_max([_part("a", 1)], CompactorConfig()) == GRAPH_PART_ROWS_MAX
        assert graph_rows(1, 10_000) == 20_000, "so many are always tried"
        assert fold_bytes(1, CONFIG) == fold_bytes(0, CONFIG) < fold_bytes(16 << 20, CONFIG)

    def test_merges_are_planned_in_pieces(self) -> None:
        parts = [_part(f"p{number}", 16_000) for number in range(10)]
        plan = merge_plan(parts, idle=True, graph_rows_max=40_000)
        assert plan is not None
        assert plan.inputs == ("p0", "p1", "p2")
        graph = _part("g", 30_000, labels=30_000)
        grown = merge_plan([graph, *parts], idle=True, graph_rows_max=40_000)
        assert grown is not None
        assert (grown.inputs, grown.grow) == (("g", "p0"), "g")
        full = _part("g", 48_000, labels=48_000)
        another = merge_plan([full, *parts[:3]], idle=True, graph_rows_max=40_000)
        assert another is not None
        assert (another.inputs, another.grow) == (("p0", "p1", "p2"), None)


def _give_up() -> None:
    raise Unavailable("no room")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(str(tmp_path / "store")) as node:
        yield node


class TestCalls:
    def test_settle_folds_and_merges_everything(self, node: Node) -> None:
        names = [make_collection(node, f"c-{number}") for number in range(4)]
        for name in names[:3]:
            for first in range(0, 2_000, 500):
                add_rows(node, name, first, 500)
                node.compactor.fold_now(name)
        add_rows(node, names[0], 5_000, 3)
        assert node.logs.pending()
        node.compactor.settle()
        assert node.logs.pending() == []
        assert len(ids_of(node, names[0])) == 2_003

    def test_settle_does_the_others_when_one_fails_and_says_so(
        self, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = [make_collection(node, f"c-{number}") for number in range(3)]
        for name in names:
            add_rows(node, name, 0, 10)
        fold = node.compactor.fold_now

        def fails(name: str, *more: object) -> None:
            if name == names[1]:
                raise Unavailable("not this one")
            fold(name, *more)  # type: ignore[arg-type]

        monkeypatch.setattr(node.compactor, "fold_now", fails)
        with pytest.raises(Unavailable, match="not this one"):
            node.compactor.settle()
        assert [work.collection for work in node.logs.pending()] == [names[1]]

    def test_settle_may_be_given_up(self, node: Node) -> None:
        add_rows(node, make_collection(node), 0, 10)
        with pytest.raises(Unavailable):
            node.compactor.settle(_give_up)

    def test_status_names_what_is_due_and_what_failed(self, node: Node) -> None:
        name = make_collection(node)
        add_rows(node, name, 0, 10)
        with node.compactor._lease(name, "compact"):
            status = node.compactor.status()
            assert [(work.collection, work.tail_rows) for work in status.tails] == [(name, 10)]
            (job,) = status.jobs
            assert (job.collection_id, job.kind, job.running) == (name, "compact", True)
            assert job.owner.startswith(node.owner)
        assert node.compactor.status().jobs == []
        with pytest.raises(Unavailable), node.compactor._lease(name, "merge"):
            raise Unavailable("no luck")
        (failed,) = node.compactor.status().jobs
        assert (failed.kind, failed.running) == ("merge", False)
        assert failed.last_error == "Unavailable: no luck"
        assert not node.compactor.status().paused

    def test_rebuild_writes_every_part_anew(self, node: Node) -> None:
        name = make_collection(node)
        for first in (0, 100):
            add_rows(node, name, first, 100)
            node.compactor.fold_now(name)

        def parts() -> set[str]:
            version = node.logs.snapshot(name).version
            return {part.manifest.id for part in node.versions.parts(name, version)}

        before = parts()
        assert len(before) == 2
        node.compactor.rebuild_now(name)
        assert len(parts()) == 2
        assert not parts() & before
        assert len(ids_of(node, name)) == 200

    def test_whatever_writes_parts_counts_in_the_budget(
        self, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is asked for by vacuum or repair too: all do as merges do."""
        name = make_collection(node)
        add_rows(node, name, 0, 100)
        node.compactor.fold_now(name)
        append(node, name, operations(Op.DELETE, [f"id-{number}" for number in range(50)]))
        node.compactor.fold_now(name)
        taken: list[int] = []
        memory = node.compactor._world.memory
        held = memory.held

        def seen(size_bytes: int, step: Callable[[], None]) -> AbstractContextManager[None]:
            taken.append(size_bytes)
            return held(size_bytes, step)

        monkeypatch.setattr(memory, "held", seen)
        needed = merge_bytes(50, 4, with_graph=False)
        node.compactor.rewrite_now(name, 0.0, lambda: None)
        assert taken == [needed]
        node.compactor.rebuild_now(name)
        assert taken == [needed] * 2
        version = node.logs.snapshot(name).version
        (part,) = node.versions.parts(name, version)
        assert node.compactor.rebuild_part(part.manifest.id, lambda: None)
        assert taken == [needed] * 3
        assert not node.compactor.rebuild_part(part.manifest.id, lambda: None), "it was replaced"

    def test_paused_it_begins_nothing_and_does_what_it_is_asked(self, node: Node) -> None:
        name = make_collection(node)
        add_rows(node, name, 0, 9_000)
        node.compactor.pause()
        assert node.compactor.status().paused
        assert not node.compactor._compact_due()
        assert node.logs.snapshot(name).indexed_offset == 0
        node.compactor.fold_now(name)
        assert node.logs.snapshot(name).indexed_offset == 9_000
        add_rows(node, name, 10_000, 9_000)
        node.compactor.resume()
        node.compactor._compact_due()
        assert node.logs.snapshot(name).indexed_offset == 18_000


def test_a_long_tail_is_folded_in_turns_with_others(tmp_path: Path) -> None:
    """A piece of each: a huge collection does not keep the others (I9)."""
    config = CompactorConfig(tail_rows_due=100, fold_rows_max=100, settle_rows_due=100)
    node = Node(NodeConfig(path=str(tmp_path / "s"), compactor=config))
    node.start(background=False)
    try:
        huge, small = make_collection(node, "huge"), make_collection(node, "small")
        for first in range(0, 1_000, 100):
            add_rows(node, huge, first, 100)
        add_rows(node, small, 0, 100)
        node.compactor._compact_due()
        assert node.logs.snapshot(small).indexed_offset == 100
        assert node.logs.snapshot(huge).indexed_offset == 100
        for _ in range(9):
            node.compactor._compact_due()
        assert node.logs.snapshot(huge).indexed_offset == 1_000
    finally:
        node.close()


@pytest.mark.parametrize("patient", [True, False])
def test_draining_lets_a_job_end_or_abandons_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    config = CompactorConfig(tail_rows_due=10, settle_rows_due=10)
    node = Node(NodeConfig(path=str(tmp_path / "s"), compactor=config))
    node.start(background=False)
    begun, go_on = threading.Event(), threading.Event()
    work = node.compactor._work

    def slow(name: str, step: object) -> bool | None:
        begun.set()
        while not go_on.wait(0.01):
            step()  # type: ignore[operator]
        return compact_some(name, step)  # type: ignore[arg-type]

    compact_some = work.compact_some
    monkeypatch.setattr(work, "compact_some", slow)
    name = make_collection(node)
    add_rows(node, name, 0, 20)
    node.compactor.start()
    assert begun.wait(20)
    if patient:
        threading.Timer(0.2, go_on.set).start()
    assert node.compactor.drain(30.0 if patient else 0.1) is patient
    node.compactor.stop()
    assert node.logs.snapshot(name).indexed_offset == (20 if patient else 0)
    node.close()


def test_new_versions_and_drops_are_told(node: Node) -> None:
    heard: list[Hint] = []

    def listener(kind: HintKind) -> Listener:
        return lambda name, number: heard.append(Hint(kind, name, number))

    for kind in (HintKind.VERSION, HintKind.DROPPED):
        node.shared.hints.subscribe(kind, listener(kind))
    name = make_collection(node)
    for first in range(0, 2_000, 500):
        add_rows(node, name, first, 500)
        node.compactor.fold_now(name)
    node.compactor.compact_now(name)
    versions = [hint.number for hint in heard]
    assert versions == list(range(1, len(versions) + 1)), "folds and merges alike"
    assert versions[-1] == node.logs.snapshot(name).version > 4
    node.namespace.delete_collection("default_tenant", "default_database", "records")
    other = make_collection(node, "other")
    node.namespace.reset()
    assert heard[len(versions) :] == [Hint(HintKind.DROPPED, name), Hint(HintKind.DROPPED, other)]


def test_what_another_process_takes_is_left_to_it_until_that_gets_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def take(is_large: bool) -> bool:
        asked.append(is_large)
        return True

    monkeypatch.setattr(service, "_LARGE_ROWS", 150)
    config = CompactorConfig(graph_threads=1, tail_rows_due=100)
    node = Node(NodeConfig(path=str(tmp_path / "s"), compactor=config), delegate=take)
    node.start(background=False)
    try:
        collection = make_collection(node)
        for rows, is_large in ((120, False), (180, True)):
            add_rows(node, collection, len(asked) * 120, rows)
            node.compactor._compact_due()
            assert asked[-1] == is_large
            assert node.logs.snapshot(collection).indexed_offset == 0
        add_rows(node, collection, 300, 100)
        node.compactor._compact_due()
        assert asked == [False, True], "four times what is due"
        assert node.logs.snapshot(collection).indexed_offset == 400
    finally:
        node.close()
