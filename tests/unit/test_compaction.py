"""Compaction, merges and garbage collection: what they may never do to an answer (I5, I6, I7)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ochredb.cancel import Cancel
from ochredb.catalog.versions import VersionPart
from ochredb.errors import Conflict, Corrupt, DeadlineExceeded, NotFound, OutcomeUnknown
from ochredb.parts import deleted as deleted_rows
from ochredb.peers import QueryRequest
from ochredb.types import Op
from ochredb_compactor import scheduler
from ochredb_compactor.compaction import compact
from ochredb_compactor.merge import merge
from ochredb_compactor.scheduler import MergePlan
from ochredb_compactor.world import World
from ochredb_node.node import Node

from .kernel import (
    ManualClock,
    add_rows,
    all_rows,
    append,
    forget_recent,
    ids_of,
    make_collection,
    object_keys,
    operations,
    running_node,
)


def _world(node: Node) -> World:
    return node.compactor._world


def _no_step() -> None:
    pass


def _parts(node: Node, collection: str) -> list[VersionPart]:
    return node.versions.parts(collection, node.logs.snapshot(collection).version)


def _delete(node: Node, collection: str, *ids: str) -> None:
    append(node, collection, operations(Op.DELETE, ids))


def _fold(node: Node, collection: str) -> None:
    node.compactor.fold_now(collection)


def _merge_all(node: Node, collection: str, during: Callable[[], None] = _no_step) -> None:
    """Merge all parts into one; `during` runs when the inputs have been read."""
    plan = MergePlan(tuple(p.manifest.id for p in _parts(node, collection)), None, False)
    called: list[bool] = []

    def step() -> None:
        if not called:
            called.append(True)
            during()

    lease = _world(node).jobs.acquire(collection, "merge", "elsewhere/1/test", 60)
    assert lease is not None
    merge(_world(node), lease, plan, step)
    _world(node).jobs.end(lease)


def test_answers_are_equal_before_and_after(node: Node) -> None:
    collection = make_collection(node)
    seen = []
    for round_number in range(6):
        add_rows(node, collection, 50 * round_number, 50)
        _delete(node, collection, *(f"id-{50 * round_number + i}" for i in range(0, 50, 7)))
        change = operations(Op.UPSERT, ["id-1", "id-2", "again"], np.eye(3, 4), documents=["a"] * 3)
        append(node, collection, change)
        before = all_rows(node, collection)
        if round_number % 2:
            _fold(node, collection)
        else:
            node.compactor.compact_now(collection)
        assert all_rows(node, collection) == before
        seen.append(len(before))
    assert seen == sorted(seen)
    node.compactor.compact_now(collection)
    snapshot = node.logs.snapshot(collection)
    assert snapshot.indexed_offset == snapshot.last_offset


def test_of_two_compactions_that_race_one_wins(node: Node) -> None:
    """I7: both run to the end, one takes effect, and nothing is there twice."""
    collection = make_collection(node)
    add_rows(node, collection, 0, 10)
    before = all_rows(node, collection)
    world = _world(node)
    first = world.jobs.acquire(collection, "compact", "elsewhere/1/first", 1)
    assert first is not None
    second_ran: list[bool] = []

    def second_overtakes() -> None:
        if not second_ran:
            second_ran.append(True)
            world.clock.sleep(2)
            second = world.jobs.acquire(collection, "compact", "elsewhere/1/second", 60)
            assert second is not None
            assert second.fence == first.fence + 1
            assert compact(world, second, _no_step) == 1

    with pytest.raises(Conflict, match="lease"):
        compact(world, first, second_overtakes)
    assert node.logs.snapshot(collection).version == 1
    assert all_rows(node, collection) == before
    assert len(_parts(node, collection)) == 1


def test_who_waits_for_a_fold_is_content_with_another_processes(
    node: Node, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is not given up in between: others fold again and again."""
    collection = make_collection(node)
    add_rows(node, collection, 0, 10)
    world = _world(node)
    lease = world.jobs.acquire(collection, "compact", "elsewhere/1/one", 600)
    assert lease is not None

    def sleep(seconds: float) -> None:
        clock.advance(seconds)
        if node.logs.snapshot(collection).version == 0:
            compact(world, lease, _no_step)
            add_rows(node, collection, 10, 10)

    monkeypatch.setattr(clock, "sleep", sleep)
    node.compactor.fold_now(collection)
    assert node.logs.snapshot(collection).indexed_offset == 10


def test_a_wait_goes_on_as_long_as_others_get_somewhere(
    node: Node, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = make_collection(node)
    for start in range(0, 40, 10):
        add_rows(node, collection, start, 10)
        _fold(node, collection)
    world = _world(node)
    term_s = world.config.lease_ttl_s
    lease = world.jobs.acquire(collection, "merge", "elsewhere/1/one", term_s)
    assert lease is not None
    rounds: list[float] = []

    def sleep(_seconds: float) -> None:
        clock.advance(term_s / 2)
        assert world.jobs.renew(lease, term_s)
        rounds.append(clock.monotonic_s())
        if len(rounds) < 8:  # Another process folds, and keeps the lease of merges.
            add_rows(node, collection, 30 + 10 * len(rounds), 10)
            _fold(node, collection)

    before = clock.monotonic_s()
    with monkeypatch.context() as patch:
        patch.setattr(clock, "sleep", sleep)
        with pytest.raises(DeadlineExceeded, match="holds the collection's lease"):
            node.compactor.compact_now(collection)
    assert len(rounds) >= 9
    assert 5 * term_s < clock.monotonic_s() - before < 8 * term_s


def test_with_equal_leases_the_version_still_decides(node: Node) -> None:
    """Safety does not rest on leases: one fence, two compactions, one effect."""
    collection = make_collection(node)
    add_rows(node, collection, 0, 10)
    world = _world(node)
    lease = world.jobs.acquire(collection, "compact", "elsewhere/1/one", 60)
    assert lease is not None
    done: list[int | None] = []

    def inner() -> None:
        if not done:
            done.append(None)
            done[0] = compact(world, lease, _no_step)

    with pytest.raises(Conflict, match="version"):
        compact(world, lease, inner)
    assert done == [1]
    assert len(ids_of(node, collection)) == 10


def test_two_threads_compacting_at_once_end_well(node: Node) -> None:
    collection = make_collection(node)
    for number in range(5):
        add_rows(node, collection, 20 * number, 20)
    before = all_rows(node, collection)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            node.compactor.compact_now(collection)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert all_rows(node, collection) == before


def test_a_merge_keeps_deletes_and_updates_made_meanwhile(node: Node) -> None:
    """Commit by rebase: no delete comes back, no update is lost, no compaction is blocked."""
    collection = make_collection(node)
    for number in range(3):
        add_rows(node, collection, 10 * number, 10)
        _fold(node, collection)
    _delete(node, collection, "id-5")
    _fold(node, collection)

    def meanwhile() -> None:
        _delete(node, collection, "id-0", "id-11", "id-29")
        append(node, collection, operations(Op.UPDATE, ["id-12"], documents=["new text"]))
        _fold(node, collection)
        _delete(node, collection, "id-20")  # Stays in the tail.

    _merge_all(node, collection, meanwhile)
    parts = _parts(node, collection)
    assert sorted(part.manifest.rows for part in parts) == [1, 29]
    rows = {row["id"]: row for row in all_rows(node, collection)}
    gone = {"id-0", "id-5", "id-11", "id-20", "id-29"}
    assert set(rows) == {f"id-{i}" for i in range(30)} - gone
    assert rows["id-12"]["document"] == "new text"
    _fold(node, collection)
    assert {row["id"] for row in all_rows(node, collection)} == set(rows)


def test_a_merge_reads_large_bitmaps_outside_of_the_transaction(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = make_collection(node)
    for number in range(2):
        add_rows(node, collection, 10 * number, 10)
        _fold(node, collection)
    monkeypatch.setattr(deleted_rows, "INLINE_BYTES_MAX", 0)
    get, inside = node.store.get, []

    def watched(key: str) -> bytes:
        inside.append(node.sqlite._writer.connection.in_transaction)  # type: ignore[union-attr]
        return get(key)

    def meanwhile() -> None:
        _delete(node, collection, "id-3", "id-17")
        _fold(node, collection)
        monkeypatch.setattr(node.store, "get", watched)

    _merge_all(node, collection, meanwhile)
    assert inside == [False, False]
    assert len(_parts(node, collection)) == 1
    assert set(ids_of(node, collection)) == {f"id-{i}" for i in range(20)} - {"id-3", "id-17"}


def test_a_merge_whose_input_was_replaced_conflicts(node: Node) -> None:
    collection = make_collection(node)
    for number in range(2):
        add_rows(node, collection, 10 * number, 10)
        _fold(node, collection)
    before = all_rows(node, collection)

    def meanwhile() -> None:
        world = _world(node)
        lease = world.jobs.acquire(collection, "other", "elsewhere/1/test", 60)
        assert lease is not None
        ids = tuple(part.manifest.id for part in _parts(node, collection))
        merge(world, lease, MergePlan(ids, None, False), _no_step)

    with pytest.raises(Conflict, match="input"):
        _merge_all(node, collection, meanwhile)
    assert all_rows(node, collection) == before


def test_a_merge_of_dead_rows_only_leaves_no_part(node: Node) -> None:
    collection = make_collection(node)
    for number in range(2):
        add_rows(node, collection, 5 * number, 5)
        _fold(node, collection)

    def meanwhile() -> None:
        _delete(node, collection, *(f"id-{i}" for i in range(9)))
        _fold(node, collection)

    plan_inputs = [part.manifest.id for part in _parts(node, collection)]
    with pytest.raises(Conflict, match="input"):  # One input died whole: compaction dropped it.
        _merge_all(node, collection, meanwhile)
    assert len(plan_inputs) == 2
    assert ids_of(node, collection) == ["id-9"]
    _delete(node, collection, "id-9")
    node.compactor.compact_now(collection)
    assert _parts(node, collection) == []
    assert ids_of(node, collection) == []
    add_rows(node, collection, 0, 2)
    assert ids_of(node, collection) == ["id-0", "id-1"]


def test_large_bitmaps_are_objects_that_later_versions_replace(
    node: Node, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deleted_rows, "INLINE_BYTES_MAX", 0)
    collection = make_collection(node)
    add_rows(node, collection, 0, 20)
    _fold(node, collection)
    for number in (3, 4, 5):
        _delete(node, collection, f"id-{number}")
        _fold(node, collection)
        clock.advance(100)
        node.compactor.collect_now(sweep_orphans=True)
        assert len(ids_of(node, collection)) == 22 - number
    bitmaps = {key for key in object_keys(node) if key.startswith("deleted/")}
    assert len(bitmaps) == 2, "the newest version's and, in its grace, the one's before"


@pytest.mark.parametrize("error", [Conflict("lost"), OutcomeUnknown("perhaps committed")])
def test_what_a_loser_wrote_goes_at_once_and_only_then(
    node: Node, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A lost commit's objects belong to nobody; those of one that may have won are not touched."""
    collection = make_collection(node)
    add_rows(node, collection, 0, 10)
    before = object_keys(node)
    world = _world(node)
    lease = world.jobs.acquire(collection, "compact", "elsewhere/1/one", 60)
    assert lease is not None
    written: set[str] = set()

    def lose(*_arguments: Any) -> int:
        written.update(object_keys(node) - before)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(world.versions, "commit", lose)
        with pytest.raises(type(error)):
            compact(world, lease, lambda: None)
    assert len(written) == 1
    assert object_keys(node) == (before if isinstance(error, Conflict) else before | written)
    assert compact(world, lease, lambda: None) == 1
    assert len(ids_of(node, collection)) == 10


def test_a_drop_during_compaction_wins(node: Node, clock: ManualClock) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 10)
    world = _world(node)
    lease = world.jobs.acquire(collection, "compact", "elsewhere/1/one", 60)
    assert lease is not None
    dropped: list[str] = []

    def drop() -> None:
        if not dropped:
            dropped.append(
                node.namespace.delete_collection("default_tenant", "default_database", "records")
            )

    with pytest.raises(Conflict, match="dropped"):
        compact(world, lease, drop)
    with pytest.raises(NotFound):
        ids_of(node, collection)
    clock.advance(3_600)
    node.compactor.collect_now(sweep_orphans=True)
    assert object_keys(node) == set()


class TestGraphs:
    """Merges that build, grow and rebuild graphs."""

    @pytest.fixture(autouse=True)
    def _small_graphs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scheduler, "GRAPH_ROWS_MIN", 100)
        monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 400)

    def test_a_graph_is_built_grown_and_rebuilt(self, node: Node) -> None:
        collection = make_collection(node)
        add_rows(node, collection, 0, 150)
        node.compactor.compact_now(collection)
        (part,) = _parts(node, collection)
        assert part.manifest.graph_labels == 150
        _delete(node, collection, *(f"id-{i}" for i in range(20)))
        add_rows(node, collection, 150, 120)
        node.compactor.compact_now(collection)
        (part,) = _parts(node, collection)
        assert (part.manifest.rows, part.manifest.graph_labels) == (250, 270)
        assert node.logs.status(collection)[2] == 0
        self._answers_are_right(node, collection)
        _delete(node, collection, *(f"id-{i}" for i in range(20, 80)))
        node.compactor.compact_now(collection)
        (part,) = _parts(node, collection)
        assert (part.manifest.rows, part.manifest.graph_labels) == (190, 190)
        self._answers_are_right(node, collection)

    def _answers_are_right(self, node: Node, collection: str) -> None:
        """The graph finds each stored vector, under its own row, alive."""
        live = set(ids_of(node, collection))
        (part,) = node.query._loaded[collection]._parts.values()
        graph = part.graph
        assert graph is not None
        for row in range(0, len(part), 17):
            searched = graph.search(part.vectors[row : row + 1], 200)
            assert searched is not None
            found = searched[0][searched[0] >= 0][:5]
            distances = ((part.vectors[found] - part.vectors[row]) ** 2).sum(axis=1)
            assert distances.min() == 0.0
            assert set(part.take_ids(found)) <= live
        exact = QueryRequest(embeddings=part.vectors[:3].copy(), n_results=4, exact=True)
        answer = node.query.query(collection, exact, cancel=Cancel())
        assert [len(records.ids) for records in answer.records] == [4, 4, 4]


class TestLeases:
    def test_a_held_lease_is_waited_for_until_its_end(self, node: Node, clock: ManualClock) -> None:
        collection = make_collection(node)
        add_rows(node, collection, 0, 3)
        jobs = _world(node).jobs
        lease = jobs.acquire(collection, "compact", "elsewhere/1/dead-process", 30)
        assert lease is not None
        assert jobs.acquire(collection, "compact", "elsewhere/1/another", 30) is None
        started_s = clock.monotonic_s()
        node.compactor.fold_now(collection)
        assert 30 <= clock.monotonic_s() - started_s < 40
        assert not jobs.renew(lease, 30), "it was taken over"

    def test_a_lease_that_never_ends_is_given_up(self, node: Node, clock: ManualClock) -> None:
        collection = make_collection(node)
        add_rows(node, collection, 0, 3)
        # For as long as the attempt waits.
        _world(node).jobs.acquire(collection, "compact", "elsewhere/1/alive", 120)
        with pytest.raises(DeadlineExceeded):
            node.compactor.fold_now(collection)

    def test_a_finished_lease_can_be_taken_at_once_and_keeps_its_error(self, node: Node) -> None:
        jobs = _world(node).jobs
        lease = jobs.acquire("c", "merge", "elsewhere/1/a", 60)
        assert lease is not None
        jobs.end(lease, "ValueError: no")
        again = jobs.acquire("c", "merge", "elsewhere/1/b", 60)
        assert again is not None
        assert again.fence == lease.fence + 1


def test_a_damaged_fragment_stops_its_collection_only_and_is_reported(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """I9, I12: the other collections go on; nobody gets a guess."""
    with running_node(clock=clock, inline_bytes_max=0) as node:
        broken, whole = make_collection(node, "broken"), make_collection(node, "whole")
        add_rows(node, broken, 0, 5)
        (key,) = object_keys(node)
        add_rows(node, whole, 0, 5)
        node.store.delete(key)
        forget_recent(node)
        with pytest.raises(Corrupt, match=key):
            ids_of(node, broken)
        with pytest.raises(Corrupt, match=key):
            node.compactor.fold_now(broken)
        clock.advance(10)
        with caplog.at_level(logging.ERROR):
            for _ in range(2):
                node.compactor._compact_due()
        assert broken in caplog.text
        assert node.logs.snapshot(whole).version == 1
        assert len(ids_of(node, whole)) == 5


def test_a_part_without_living_rows_is_left_out(node: Node) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 5)
    _fold(node, collection)
    _delete(node, collection, *(f"id-{i}" for i in range(5)))
    add_rows(node, collection, 5, 1)
    _fold(node, collection)
    assert [part.manifest.rows for part in _parts(node, collection)] == [1]
