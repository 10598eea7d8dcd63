"""What the first read of a collection fetches: the objects that it needs, and no other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ochredb.cancel import Cancel
from ochredb.parts import writer
from ochredb.parts.open_parts import OpenParts
from ochredb.peers import GetRequest, QueryRequest
from ochredb.storage.base import LocalStore
from ochredb.types import Field, Op
from ochredb.where import Compare, DocumentContains
from ochredb_compactor import scheduler
from ochredb_node.node import Node
from ochredb_query.config import QueryConfig
from ochredb_query.service import QueryService

from .kernel import add_rows, append, make_collection, operations, running_node

_DIM = 16
_QUERY = np.ones((1, _DIM), np.float32)


class Recording:
    """A store that notes which objects of parts are asked for."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self.fetched: set[str] = set()

    def map(self, key: str) -> memoryview:
        self.fetched.add(key.rsplit("/", 1)[-1])
        return self._store.map(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr(writer, "PACKED_BYTES_MAX", 0)
    monkeypatch.setattr(writer, "TEXT_INDEX_ROWS_MIN", 10)
    with running_node() as node:
        yield node


def made(node: Node, *, with_graph: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 1 if with_graph else 1 << 60)
    collection = make_collection(node)
    add_rows(node, collection, 0, 20_000 if with_graph else 2_000, _DIM)
    node.compactor.compact_now(collection)
    (part,) = node.versions.parts(collection, node.logs.snapshot(collection).version)
    assert part.manifest.has_graph == with_graph
    return collection


def fetched_by(node: Node, read: Callable[[QueryService], object]) -> set[str]:
    """By the first read of a process."""
    store = Recording(node.store)
    service = QueryService(
        node.logs,
        node.versions,
        node.namespace,
        store,
        OpenParts(store),
        node.clock,
        QueryConfig(),
    )
    with contextlib.closing(service):
        read(service)
    return store.fetched


def get(collection: str, **more: Any) -> Callable[[QueryService], object]:
    return lambda service: service.get(collection, GetRequest(**more), cancel=Cancel())


def query(collection: str, **more: Any) -> Callable[[QueryService], object]:
    request = QueryRequest(embeddings=_QUERY, **more)
    return lambda service: service.query(collection, request, cancel=Cancel())


def test_flat_parts(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = made(node, with_graph=False, monkeypatch=monkeypatch)
    few = Compare("number", "$lt", 5)
    assert fetched_by(node, lambda s: s.count(collection, cancel=Cancel())) == set()
    assert fetched_by(node, get(collection, limit=5)) == {"records"}
    assert fetched_by(node, get(collection, where=few)) == {"records", "index"}
    assert fetched_by(node, get(collection, ids=["id-7"])) == {"records", "index"}
    assert fetched_by(node, get(collection, limit=1, fields=Field.EMBEDDING)) == {
        "records",
        "vectors",
    }
    text = DocumentContains("document 77", False)
    assert fetched_by(node, get(collection, where=text)) == {"records", "index"}
    everything = {"records", "vectors", "index"}
    assert fetched_by(node, query(collection)) == everything
    assert fetched_by(node, query(collection, where=few)) == everything


def test_parts_with_graphs(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = made(node, with_graph=True, monkeypatch=monkeypatch)
    few = Compare("number", "$lt", 5)
    assert fetched_by(node, query(collection)) == {"records", "vectors", "graph"}
    assert fetched_by(node, query(collection, where=few)) == {"records", "vectors", "index"}
    assert fetched_by(node, get(collection, where=few)) == {"records", "index"}


def test_a_tail_needs_the_ids_that_it_may_change(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = made(node, with_graph=False, monkeypatch=monkeypatch)
    append(node, collection, operations(Op.DELETE, ["id-3", "nobody"]))
    count: list[int] = []
    read = lambda s: count.append(s.count(collection, cancel=Cancel()))  # noqa: E731
    assert fetched_by(node, read) == {"records", "index"}
    assert count == [1_999]


@pytest.mark.parametrize("with_graph", [True, False])
def test_what_is_opened_ahead_is_as_ready_as_if_it_had_been_read(
    node: Node, with_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = made(node, with_graph=with_graph, monkeypatch=monkeypatch)
    node.query.drop(collection)
    node.query.open(collection)
    assert node.query.read_lately(10) == [collection]
    view = node.query._loaded[collection].view
    assert view is not None
    (item,) = view.segments
    assert item.segment.has_open(("vectors",)), "before anybody searches it"
    assert item.segment.graph_is_loaded, "or there is none"
    node.query.open("01900000-0000-7000-8000-000000000000")  # Dropped meanwhile: no matter.
