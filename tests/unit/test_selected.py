"""Filters that were used lately are not evaluated again, and no answer shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ochredb.cancel import Cancel
from ochredb.peers import GetRequest, QueryRequest
from ochredb.plan import filter as plan_filter
from ochredb.plan import operators
from ochredb.plan.operators import Selection
from ochredb.segment import SegmentView, View
from ochredb.types import Op
from ochredb.where import And, Compare, DocumentContains, OneOf, Where
from ochredb_node.node import Node
from ochredb_query import selected
from ochredb_query.selected import Selected, name_of

from .kernel import add_rows, append, make_collection, operations, running_node

_VIEW = View(1, 0, 0, 4, (), 0)


def _selections(rows: int) -> list[Selection]:
    segment: Any = None
    return [Selection(SegmentView(segment, None, rows), np.ones(rows, np.bool_), rows, True)]


def test_equal_values_of_other_types_are_other_filters() -> None:
    kept = Selected(_VIEW)
    one, true, real = (Compare("a", "$eq", value) for value in (1, True, 1.0))
    assert one == true == real
    kept.keep(name_of(one), _selections(3))
    assert kept.find(name_of(one)) is not None
    assert kept.find(name_of(true)) is None and kept.find(name_of(real)) is None
    text = And((Compare("a", "$eq", "1"), DocumentContains("x'), ('", False)))
    assert kept.find(name_of(text)) is None


def test_what_was_not_used_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selected, "_KEPT_MAX", 3)
    monkeypatch.setattr(selected, "_KEPT_BYTES_MAX", 100)
    kept = Selected(_VIEW)
    filters = [Compare("a", "$eq", number) for number in range(5)]
    for where in filters[:3]:
        kept.keep(name_of(where), _selections(10))
        kept.keep(name_of(where), _selections(10))
    assert kept.size_bytes == 30
    assert kept.find(name_of(filters[0])) is not None
    kept.keep(name_of(filters[3]), _selections(10))
    assert [kept.find(name_of(one)) is None for one in filters] == [
        False,
        True,
        False,
        False,
        True,
    ]
    kept.keep(name_of(filters[4]), _selections(95))
    assert [kept.find(name_of(one)) is None for one in filters] == [
        True,
        True,
        True,
        True,
        False,
    ]
    assert kept.size_bytes == 95
    kept.keep(name_of(filters[0]), _selections(101))
    kept.keep(name_of(OneOf("a", tuple(map(str, range(2_000))), False)), _selections(1))
    assert kept.size_bytes == 95, "neither too large a result nor too long a filter is kept"


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node() as node:
        yield node


def test_a_filter_is_evaluated_once_for_each_state(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 30)
    evaluated = []
    evaluate = plan_filter.evaluate

    def noted(where: Where, *rest: Any) -> Any:
        evaluated.append(where)
        return evaluate(where, *rest)

    monkeypatch.setattr(operators, "evaluate", noted)
    where = Compare("number", "$gte", 27)
    query = QueryRequest(embeddings=np.zeros((1, 4), np.float32), where=where)
    get = GetRequest(where=where, limit=5)

    def ids() -> list[list[str]]:
        return [
            node.query.get(collection, get, cancel=Cancel()).ids,
            sorted(node.query.query(collection, query, cancel=Cancel()).records[0].ids),
        ]

    assert ids() == [["id-27", "id-28", "id-29"]] * 2
    assert ids() == ids()
    assert evaluated == [where]
    for request in (query, get):
        quick = node.query.quick(collection, request)
        assert quick is not None
        quick.run(Cancel())
    assert evaluated == [where]
    append(node, collection, operations(Op.DELETE, ["id-28"]))
    assert ids() == [["id-27", "id-29"]] * 2, "a new state is another view"
    before = len(evaluated)
    explained = GetRequest(where=where, limit=5, explain=True)
    node.query.get(collection, explained, cancel=Cancel())
    assert len(evaluated) > before, "a plan says what evaluating takes"


def test_quick_searches_with_one_filter_are_one_batch(node: Node) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 50)
    node.compactor.compact_now(collection)
    vectors = np.arange(24, dtype=np.float32).reshape(6, 4)
    filters = [Compare("number", "$lt", 20)] * 4 + [Compare("number", "$lt", 20.0)] * 2
    requests = [
        QueryRequest(embeddings=vectors[i : i + 1], n_results=5, where=where)
        for i, where in enumerate(filters)
    ]
    alone = [node.query.query(collection, request, cancel=Cancel()) for request in requests]
    reads = [node.query.quick(collection, request) for request in requests]
    known = [read for read in reads if read is not None]
    assert len(known) == 6
    assert [read.group == known[0].group for read in known] == [True] * 4 + [False] * 2
    batch = node.query.together(known[:4])
    batch.search()
    for answer, expected in zip(batch.answers(Cancel()), alone[:4], strict=True):
        assert answer.records[0].ids == expected.records[0].ids
        assert answer.distances[0].tobytes() == expected.distances[0].tobytes()


@pytest.fixture
def spread_node() -> Iterator[tuple[Node, str]]:
    """A collection of 20,000 records in one part."""
    with running_node() as node:
        collection = make_collection(node)
        add_rows(node, collection, 0, 20_000, 16)
        node.compactor.compact_now(collection)
        yield node, collection


def test_codes_of_what_a_filter_selects_are_kept_with_it(spread_node: tuple[Node, str]) -> None:
    node, collection = spread_node
    where = Compare("number", "$lt", 1_334)
    rng = np.random.default_rng(2)
    queries = rng.standard_normal((3, 16)).astype(np.float32)
    request = QueryRequest(embeddings=queries, where=where, n_results=20)
    answers = [node.query.query(collection, request, cancel=Cancel()) for _ in range(4)]
    for answer in answers[1:]:
        assert [rows.ids for rows in answer.records] == [rows.ids for rows in answers[0].records]
        for mine, first in zip(answer.distances, answers[0].distances, strict=True):
            assert mine.tobytes() == first.tobytes()
    loaded = node.query._loaded[collection]
    assert loaded.view is not None
    kept = loaded.searches_of(loaded.view).selected
    (selection,) = kept.find(name_of(where)) or []
    assert selection.count == 1_334
    assert selection.codes is not None and selection.codes.size_bytes > 1_334 * 16
    assert kept.size_bytes + 200 > 20_000 + selection.codes.size_bytes
    assert node.query.quick(collection, request) is not None


@pytest.mark.parametrize(
    ("rows", "count", "dimension", "has_codes"),
    [
        (20_000, 1_334, 16, True),
        (20_000, 1_000, 16, False),  # Few.
        (20_000, 2_001, 16, False),  # So many that the codes of all are read.
        (100_000, 9_000, 768, False),  # More than there is room for.
    ],
)
def test_which_selections_have_codes(
    rows: int, count: int, dimension: int, has_codes: bool
) -> None:
    class Segment:
        def __init__(self) -> None:
            self.dimension = dimension

    segment: Any = Segment()
    mask = np.arange(rows) < count
    kept = Selected(_VIEW)
    kept.keep("it", [Selection(SegmentView(segment, None, rows), mask, count, True)])
    (found,) = kept.find("it") or []
    assert (found.codes is not None) == has_codes
    assert (kept.size_bytes > rows) == has_codes
