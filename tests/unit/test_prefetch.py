"""A new version is opened before reads need it, where its collection is read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from ochredb.cancel import Cancel
from ochredb.errors import Unavailable
from ochredb.parts.reader import Part
from ochredb.peers import QueryRequest
from ochredb_compactor import scheduler
from ochredb_node.node import Node
from ochredb_query.config import QueryConfig
from ochredb_query.prefetch import Prefetcher
from ochredb_query.service import QueryService
from tests.property.query_nodes import QueryNodes

from .kernel import add_rows, ids_of, make_collection, running_node

_DIM = 16


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 1)
    monkeypatch.setattr(scheduler, "GRAPH_PART_ROWS_MAX", 1)  # A part for each fold.
    with running_node() as node:
        yield node


def fold(node: Node, collection: str, first: int, nodes: QueryNodes) -> int:
    """A new part with a graph, and the version that names it, of which the nodes are told."""
    add_rows(node, collection, first, 2_000, _DIM)
    node.compactor.compact_now(collection)
    version = node.logs.snapshot(collection).version
    for service in nodes.services:
        service.prefetch(collection, version)
        assert service._prefetcher.settle(60)
    return version


def opened(service: QueryService) -> dict[str, Part]:
    return dict(service._open_parts._parts)


def search(service: QueryService, collection: str) -> list[str]:
    request = QueryRequest(embeddings=np.zeros((1, _DIM), np.float32))
    return service.query(collection, request, cancel=Cancel()).records[0].ids


def test_what_is_read_is_opened_graph_and_all(node: Node) -> None:
    nodes = QueryNodes(node, 2, QueryConfig())
    reader, idle = nodes.services
    collection = make_collection(node)
    fold(node, collection, 0, nodes)
    assert opened(reader) == {}, "nobody has read it"
    assert search(reader, collection) == search(node.query, collection)
    fold(node, collection, 2_000, nodes)
    parts = opened(reader)
    assert len(parts) == 2
    assert all(part.graph_is_loaded for part in parts.values())
    assert opened(idle) == {}
    before = {name: part.verified_bytes for name, part in parts.items()}
    assert search(reader, collection) == search(node.query, collection)
    assert {name: part.verified_bytes for name, part in parts.items()} == before
    nodes.close()


def test_each_node_opens_what_it_owns(node: Node) -> None:
    nodes = QueryNodes(node, 2, QueryConfig(spread_bytes=0))
    collection = make_collection(node)
    fold(node, collection, 0, nodes)
    for service in nodes.services:
        search(service, collection)
    for number in range(1, 6):
        fold(node, collection, 2_000 * number, nodes)
        for service in nodes.services:
            assert service._scatter is not None
            loaded = {name for name, part in opened(service).items() if part.graph_is_loaded}
            parts = node.versions.parts(collection, node.logs.snapshot(collection).version)
            sizes = {part.manifest.id: part.manifest.size_bytes for part in parts}
            assert set(service._mine(sizes)) <= loaded, "what it owns, though it owned less before"
            assert search(service, collection) == search(node.query, collection)
    nodes.close()


def test_a_hint_may_be_wrong(node: Node) -> None:
    nodes = QueryNodes(node, 1, QueryConfig())
    (service,) = nodes.services
    collection = make_collection(node)
    fold(node, collection, 0, nodes)
    expected = search(service, collection)
    for version in (0, 77, 1, 1):
        service.prefetch(collection, version)
        assert service._prefetcher.settle(60)
    service.prefetch("00000000-0000-7000-8000-000000000000", 1)
    assert search(service, collection) == expected
    assert len(ids_of(node, collection)) == 2_000
    service.close()
    service.prefetch(collection, 2)
    nodes.close()


def test_a_version_that_cannot_be_opened_does_not_stop_the_others() -> None:
    tried: list[tuple[str, int]] = []

    def open_version(collection_id: str, version: int) -> None:
        tried.append((collection_id, version))
        if collection_id == "bad":
            raise Unavailable("no store")

    prefetcher = Prefetcher(open_version)
    prefetcher.add("bad", 1)
    prefetcher.add("good", 2)
    assert prefetcher.settle(60)
    assert tried == [("bad", 1), ("good", 2)]
    prefetcher.close()
    prefetcher.add("good", 3)
    assert tried == [("bad", 1), ("good", 2)]
