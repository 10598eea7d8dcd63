"""Searching: a batch answers as its queries do alone, by graph, by scan, and by both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest

from ochredb.cancel import Cancel
from ochredb.explain import PlanStep
from ochredb.parts import reader
from ochredb.parts.reader import Part
from ochredb.peers import QueryRequest
from ochredb.plan import cost
from ochredb.types import Field, Float32s, Op, Operations, QueryAnswer
from ochredb.where import Compare
from ochredb_node.node import Node, NodeConfig
from ochredb_query.quick import Search

from .kernel import make_collection

_ROWS, _DIMENSION = 2_600, 256  # Enough for a graph.


@pytest.fixture(scope="module")
def vectors() -> Float32s:
    rng = np.random.default_rng(3)
    centers = rng.standard_normal((40, _DIMENSION))
    noise = 0.4 * rng.standard_normal((_ROWS + 60, _DIMENSION))
    rows: Float32s = (centers[rng.integers(0, 40, _ROWS + 60)] + noise).astype(np.float32)
    return rows


@pytest.fixture(scope="module")
def store(vectors: Float32s) -> Iterator[tuple[Node, str]]:
    """A collection with a graph, dead rows in it, and a tail."""
    node = Node(NodeConfig())
    node.start(background=False)
    collection = make_collection(node)
    _add(node, collection, vectors, 0, _ROWS - 50)
    node.compactor.compact_now(collection)
    deleted = [f"id-{n}" for n in range(0, 600, 3)]
    node.log.append(collection, Operations(op=Op.DELETE, ids=deleted), cancel=Cancel())
    _add(node, collection, vectors, _ROWS - 50, _ROWS)
    yield node, collection
    node.close()


def _add(node: Node, collection: str, vectors: Float32s, start: int, stop: int) -> None:
    numbers = range(start, stop)
    operations = Operations(
        op=Op.ADD,
        ids=[f"id-{n}" for n in numbers],
        embeddings=vectors[start:stop],
        metadatas=[orjson.dumps({"n": n}) for n in numbers],
    )
    node.log.append(collection, operations, cancel=Cancel())


def _query(store: tuple[Node, str], queries: Float32s, **more: Any) -> QueryAnswer:
    node, collection = store
    request = QueryRequest(embeddings=queries, fields=Field.METADATA, **more)
    return node.query.query(collection, request, cancel=Cancel())


def _steps(plan: PlanStep | None, operator: str) -> list[PlanStep]:
    assert plan is not None
    inner = [found for step in plan.steps for found in _steps(step, operator)]
    return [plan, *inner] if plan.operator == operator else inner


def _same(one: QueryAnswer, other: QueryAnswer) -> None:
    assert [rows.ids for rows in one.records] == [rows.ids for rows in other.records]
    assert [rows.metadatas for rows in one.records] == [rows.metadatas for rows in other.records]
    for mine, theirs in zip(one.distances, other.distances, strict=True):
        assert mine.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("where", [None, Compare("n", "$lt", 1_900), Compare("n", "$lt", 40)])
def test_a_batch_answers_as_its_queries_alone(
    store: tuple[Node, str], vectors: Float32s, exact: bool, where: Compare | None
) -> None:
    queries = vectors[_ROWS:]
    together = _query(store, queries, exact=exact, where=where, n_results=12)
    alone = [_query(store, q[np.newaxis], exact=exact, where=where, n_results=12) for q in queries]
    _same(
        together,
        QueryAnswer([one.records[0] for one in alone], [one.distances[0] for one in alone]),
    )


def test_queries_that_are_not_finite_do_not_disturb_others(
    store: tuple[Node, str], vectors: Float32s
) -> None:
    queries = vectors[_ROWS : _ROWS + 4].copy()
    queries[1, 7] = np.nan
    queries[3, 0] = np.inf
    answer = _query(store, queries)
    for row in (0, 2):
        alone = _query(store, vectors[_ROWS + row : _ROWS + row + 1])
        assert answer.records[row].ids == alone.records[0].ids
        assert answer.distances[row].tobytes() == alone.distances[0].tobytes()
    for row in (1, 3):
        assert np.isnan(answer.distances[row]).all()
        assert answer.records[row].ids == [f"id-{n}" for n in (1, 2, 4, 5, 7, 8, 10, 11, 13, 14)]


def test_quick_reads_run_together_answer_as_they_do_alone(
    store: tuple[Node, str], vectors: Float32s
) -> None:
    node, collection = store
    _query(store, vectors[:1])
    requests = [
        QueryRequest(embeddings=vectors[_ROWS + n : _ROWS + n + 1 + n % 3]) for n in range(7)
    ]
    reads = [node.query.quick(collection, request) for request in requests]
    known = [read for read in reads if read is not None]
    assert len(known) == 7
    assert len({read.group for read in known}) == 1
    batch = node.query.together(known)
    batch.search()
    answers = batch.answers(Cancel())
    for read, answer in zip(known, answers, strict=True):
        alone = read.run(Cancel())
        assert isinstance(alone, QueryAnswer)
        _same(answer, alone)
    other = node.query.quick(collection, QueryRequest(embeddings=vectors[:1], n_results=3))
    assert other is not None and other.group != known[0].group


@pytest.mark.parametrize("space", ["l2", "cosine", "ip"])
def test_one_graph_answers_as_the_general_search_does(vectors: Float32s, space: str) -> None:
    """Ties included: every vector is stored twice."""
    node = Node(NodeConfig())
    node.start(background=False)
    try:
        collection = make_collection(node, space=space)
        _add(node, collection, np.repeat(vectors[: _ROWS // 2], 2, axis=0), 0, _ROWS)
        node.compactor.compact_now(collection)
        requests = [QueryRequest(embeddings=vectors[n : n + 3]) for n in (_ROWS - 9, 40, 500)]
        bad = vectors[:2].copy()
        bad[1, 3] = np.inf
        requests.append(QueryRequest(embeddings=bad))
        for request in requests:
            node.query.query(collection, request, cancel=Cancel())
            read = node.query.quick(collection, request)
            assert read is not None and isinstance(read.group, Search)
            assert read.group.one_graph is not None
            quick = read.run(Cancel())
            assert isinstance(quick, QueryAnswer)
            _same(quick, node.query.query(collection, request, cancel=Cancel()))
    finally:
        node.close()


def test_the_graph_is_used_and_exact_forces_scans(
    store: tuple[Node, str], vectors: Float32s
) -> None:
    queries = vectors[_ROWS : _ROWS + 30]
    approximate = _query(store, queries, explain=True, target_recall=0.0)
    exact = _query(store, queries, exact=True, explain=True)
    (graph,) = _steps(approximate.plan, "Graph")
    assert graph.details["fell_short"] == 0
    assert graph.details["ef"] == 63  # Half of what nobody asked for finds nearly all.
    assert not _steps(exact.plan, "Graph")
    assert len(_steps(exact.plan, "Scan")) == 2
    found = sum(
        len(set(mine.ids) & set(true.ids))
        for mine, true in zip(approximate.records, exact.records, strict=True)
    )
    assert found >= 0.9 * 300


def test_a_target_lengthens_the_candidate_list(store: tuple[Node, str], vectors: Float32s) -> None:
    node, collection = store
    (item, *_) = node.query._loaded[collection].view.segments  # type: ignore[union-attr]
    curve = item.segment.graph_recall
    assert len(curve) > 0
    plan = _query(store, vectors[:1], explain=True, target_recall=curve[-1][1]).plan
    assert _steps(plan, "Graph")[0].details["ef"] == max(63, curve[-1][0])


def test_a_target_that_no_list_was_measured_to_reach_is_met_by_a_scan(
    store: tuple[Node, str], vectors: Float32s, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Part, "graph_recall", ((50, 0.8), (100, 0.9)))
    monkeypatch.setattr(cost, "FILTERED_SCAN_US_MAX", 0.0)
    answer = _query(store, vectors[:5], explain=True)
    assert not _steps(answer.plan, "Graph")
    scan, tail = _steps(answer.plan, "Scan")
    assert scan.details["graph_recall_max"] == 0.9
    assert "graph_us" not in scan.details
    assert "graph_recall_max" not in tail.details
    exact = _query(store, vectors[:5], exact=True)
    assert [one.ids for one in answer.records] == [one.ids for one in exact.records]
    where = Compare("n", "$gte", 10)
    for more in ({}, {"where": where}):
        answer = _query(store, vectors[:5], explain=True, **more)
        assert not _steps(answer.plan, "Graph")
        answer = _query(store, vectors[:5], explain=True, target_recall=0.9, **more)
        assert len(_steps(answer.plan, "Graph")) == 1


def test_a_plan_says_what_was_done(store: tuple[Node, str], vectors: Float32s) -> None:
    plan = _query(store, vectors[:2], where=Compare("n", "$gte", 2_000), explain=True).plan
    assert plan is not None
    assert [step.operator for step in plan.steps] == ["Snapshot", "Filter", "Nearest", "Project"]
    snapshot, filtered, nearest, project = plan.steps
    assert snapshot.details["parts"] == 1
    assert snapshot.details["tail_records"] == 50
    assert filtered.details["rows_out"] == 600
    assert [step.details["rows_out"] for step in filtered.steps] == [550, 50]
    assert nearest.details["queries"] == 2
    assert nearest.details["rows_out"] == 20
    assert project.details["rows"] == 20
    assert all(step.time_us > 0 for step in plan.steps)
    assert {step.operator for step in nearest.steps} <= {"Graph", "Scan"}
    assert "bytes_read" in nearest.steps[0].details


def test_reads_are_quick_once_codes_are_made_or_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody makes codes on an event loop; filters that select little do without them."""
    monkeypatch.setattr(reader, "_CODED_AT_ONCE_ROWS", 1)
    vectors = np.random.default_rng(8).standard_normal((6_000, 180)).astype(np.float32)
    node = Node(NodeConfig())
    node.start(background=False)
    try:
        collection = make_collection(node)
        _add(node, collection, vectors, 0, 6_000)
        few = QueryRequest(embeddings=vectors[:1], where=Compare("n", "$lt", 60))
        everything = QueryRequest(embeddings=vectors[:1])

        def is_quick(request: QueryRequest) -> bool:
            return node.query.quick(collection, request) is not None

        node.query.query(collection, few, cancel=Cancel())
        assert is_quick(few) and not is_quick(everything)
        first = node.query.query(collection, everything, cancel=Cancel())
        assert not is_quick(everything)
        second = node.query.query(collection, everything, cancel=Cancel())
        assert is_quick(everything)
        _same(first, second)
        node.compactor.compact_now(collection)
        node.query.query(collection, few, cancel=Cancel())
        assert is_quick(few)
        _same(first, node.query.query(collection, everything, cancel=Cancel()))
        _same(first, node.query.query(collection, everything, cancel=Cancel()))
        assert is_quick(everything)
    finally:
        node.close()


def test_codes_of_a_part_go_with_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(9).standard_normal((6_000, 180)).astype(np.float32)
    node = Node(NodeConfig())
    node.start(background=False)
    try:
        collection = make_collection(node)
        _add(node, collection, vectors, 0, 6_000)
        node.compactor.compact_now(collection)
        request = QueryRequest(embeddings=vectors[:1], exact=True)
        before = node.query.query(collection, request, cancel=Cancel())
        (item,) = node.query._loaded[collection].view.segments  # type: ignore[union-attr]
        part = item.segment
        assert isinstance(part, Part)
        assert part.heap_bytes - part.graph_bytes > 6_000 * 64
        assert node.open_parts.graphs.size_bytes == part.heap_bytes
        part.drop_heap()
        assert part.heap_bytes == node.open_parts.graphs.size_bytes == 0
        _same(before, node.query.query(collection, request, cancel=Cancel()))
        assert part.heap_bytes > 0
    finally:
        node.close()
