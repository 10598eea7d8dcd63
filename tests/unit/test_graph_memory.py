"""Loaded graphs keep to their budget, part by part, whichever collections they belong to."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest

from ochredb.cancel import Cancel
from ochredb.parts.graph_memory import GraphMemory
from ochredb.parts.reader import Part
from ochredb.peers import QueryRequest
from ochredb_compactor import scheduler
from ochredb_node.node import Node
from ochredb_query.config import QueryConfig

from .kernel import ManualClock, add_rows, make_collection, running_node

_ROWS, _DIM = 2_000, 16


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 1)
    with running_node(clock=ManualClock()) as node:
        yield node


@pytest.fixture
def collections(node: Node) -> list[str]:
    """Three, each of one part with a graph, of which nothing is open."""
    made = [make_collection(node, name) for name in ("one", "two", "three")]
    for collection in made:
        add_rows(node, collection, 0, _ROWS, _DIM)
        node.compactor.compact_now(collection)
        node.query.drop(collection)
    gc.collect()
    assert node.open_parts.graphs.size_bytes == 0
    return made


def search(node: Node, collection: str) -> list[str]:
    request = QueryRequest(embeddings=np.zeros((1, _DIM), np.float32))
    return node.query.query(collection, request, cancel=Cancel()).records[0].ids


def parts(node: Node, collections: list[str]) -> list[Part]:
    found = []
    for collection in collections:
        (part,) = node.query._loaded[collection]._parts.values()
        found.append(part)
    return found


def test_what_was_used_longest_ago_makes_room(node: Node, collections: list[str]) -> None:
    expected = [search(node, collection) for collection in collections]
    opened = parts(node, collections)
    each = opened[0].graph_bytes
    assert each > 4 * _ROWS * _DIM
    graphs = node.open_parts.graphs
    assert graphs.size_bytes == 3 * each
    graphs.bytes_max = int(2.5 * each)
    for part in opened:
        part.drop_graph()

    def loaded() -> list[bool]:
        node.query.trim()
        return [part.graph_is_loaded for part in opened]

    assert search(node, collections[0]) == expected[0]
    assert loaded() == [True, False, False]
    assert search(node, collections[1]) == expected[1]
    assert loaded() == [True, True, False]
    assert search(node, collections[0]) == expected[0]
    assert loaded() == [True, True, False]
    assert search(node, collections[2]) == expected[2]
    assert loaded() == [True, False, True], "two was used longest ago"
    assert search(node, collections[1]) == expected[1]
    assert loaded() == [False, True, True]
    assert graphs.size_bytes <= graphs.bytes_max


def test_the_budget_holds_within_a_turn_too(node: Node, collections: list[str]) -> None:
    search(node, collections[0])
    graphs = node.open_parts.graphs
    each = graphs.size_bytes
    graphs.bytes_max = int(1.5 * each)
    for number in (1, 2, 0, 1, 2):
        assert len(search(node, collections[number])) == 10
        assert graphs.size_bytes == each
    graphs.bytes_max = each // 2
    assert len(search(node, collections[0])) == 10
    assert graphs.size_bytes == each, "the one that is needed is loaded, however large"


def test_trimming_leaves_graphs_what_collections_do_not_take(
    node: Node, collections: list[str]
) -> None:
    for collection in collections:
        search(node, collection)
        node.query.trim()
    opened = parts(node, collections)
    each = opened[0].graph_bytes
    tail = make_collection(node, "tail")
    add_rows(node, tail, 0, 1_000, _DIM)
    assert len(search(node, tail)) == 10
    held = sum(loaded.memory_bytes for loaded in node.query._loaded.values())
    node.query._config = QueryConfig(memory_bytes=max(1 << 20, held + 2 * each))
    node.query.trim()
    assert [part.graph_is_loaded for part in opened] == [False, True, True]
    node.query._config = QueryConfig(memory_bytes=1 << 20)
    node.query.trim()
    assert opened[2].graph_is_loaded, "the one used last stays"


def test_no_quick_read_uses_a_graph_that_was_dropped(node: Node, collections: list[str]) -> None:
    """It would be loaded on the event loop."""
    request = QueryRequest(embeddings=np.zeros((1, _DIM), np.float32))
    expected = search(node, collections[0])
    quick = node.query.quick(collections[0], request)
    assert quick is not None
    (part,) = parts(node, collections[:1])
    if not part.manifest.has_graph:
        pytest.fail("the part has no graph")
    part.drop_graph()
    assert node.query.quick(collections[0], request) is None
    assert search(node, collections[0]) == expected


def test_a_graph_that_replaces_another_is_loaded_beside_it(
    node: Node, collections: list[str]
) -> None:
    """Until the next trim: the other one is still being searched."""
    search(node, collections[0])
    (part,) = parts(node, collections[:1])
    graphs, each = node.open_parts.graphs, part.graph_bytes
    graphs.bytes_max = each
    search(node, collections[1])
    assert not part.graph_is_loaded
    part.warm()
    assert graphs.size_bytes == 2 * each
    graphs.trim(graphs.bytes_max)
    assert graphs.size_bytes == each


def test_parts_that_nobody_has_open_do_not_count(node: Node, collections: list[str]) -> None:
    search(node, collections[0])
    graphs = node.open_parts.graphs
    assert graphs.size_bytes > 0
    node.query.drop(collections[0])
    gc.collect()
    assert graphs.size_bytes == 0
    assert GraphMemory().size_bytes == 0
