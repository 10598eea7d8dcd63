"""What a node reads is on the disk of a second one too, which then answers without the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ochredb.cancel import Cancel
from ochredb.cluster.rendezvous import order
from ochredb.errors import Unavailable, Unimplemented
from ochredb.peers import GetRequest, QueryRequest
from ochredb.storage.cached import CachedStore
from ochredb.types import Field, Op
from ochredb_compactor import scheduler
from ochredb_node.node import Node
from ochredb_query.config import QueryConfig
from ochredb_query.service import QueryService
from tests.property.query_nodes import QueryNodes

from .far_store import FarStore, cached
from .kernel import (
    ManualClock,
    add_rows,
    append,
    make_collection,
    operations,
    running_node,
)

_DIM = 16
_NAMES = ("query-0", "query-1", "query-2")
_UNREACHABLE = Unavailable("connection refused", unreachable=True)


class Place:
    """Three query nodes, each with a disk of its own, before a store that is far away."""

    def __init__(self, node: Node, folder: Path, clock: ManualClock, config: QueryConfig) -> None:
        self.node, self.clock, self.far = node, clock, FarStore()
        self.stores = {name: cached(self.far, str(folder / name)) for name in _NAMES}
        self.nodes = QueryNodes(
            node, len(_NAMES), config, clock=clock, store_of=self.stores.__getitem__
        )
        self.services = dict(zip(_NAMES, self.nodes.services, strict=True))

    def fold(self, collection: str) -> None:
        self.node.compactor.compact_now(collection)
        for found in self.node.store.list(""):
            if found.key not in {known.key for known in self.far.list("")}:
                self.far.create(found.key, self.node.store.get(found.key))

    def settle(self) -> None:
        """As a second goes by: each node looks at what it reads, asks and keeps."""
        for service in self.services.values():
            service.trim()
        for service in self.services.values():
            assert service._copies.settle(60)
        for service in self.services.values():
            assert service._copies.settle(60)

    def copies_of(self, name: str, collection: str) -> set[str]:
        """The objects of a collection's newest version that are on a node's disk."""
        store = self.stores[name]
        return {key for key in self.objects_of(collection) if store._has(key)}

    def objects_of(self, collection: str) -> set[str]:
        version = self.node.logs.snapshot(collection).version
        parts = self.node.versions.parts(collection, version)
        keys = {info.key for part in parts for info in part.manifest.objects}
        return keys | {part.deleted_key for part in parts if part.deleted_key is not None}

    def fetched(self) -> list[Any]:
        """By any of the nodes, since the last call."""
        found = [*self.far.downloads, *self.far.ranges]
        self.far.downloads.clear()
        self.far.ranges.clear()
        return found

    def close(self) -> None:
        self.nodes.close()
        for service in self.services.values():
            service.close()
        for store in self.stores.values():
            store.close()


def answers(service: QueryService, collection: str) -> Any:
    request = QueryRequest(embeddings=np.eye(3, _DIM, dtype=np.float32), n_results=20)
    found = service.query(collection, request, cancel=Cancel())
    page = GetRequest(fields=Field.DOCUMENT | Field.METADATA | Field.EMBEDDING, limit=50)
    records = service.get(collection, page, cancel=Cancel())
    assert records.embeddings is not None
    return (
        [each.ids for each in found.records],
        [each.tobytes() for each in found.distances],
        (records.ids, records.documents, records.embeddings.tobytes()),
    )


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def node(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 1)
    monkeypatch.setattr(scheduler, "GRAPH_PART_ROWS_MAX", 1)  # A part for each fold.
    with running_node(clock=clock) as node:
        yield node


@pytest.fixture
def place(node: Node, tmp_path: Path, clock: ManualClock) -> Iterator[Place]:
    made = Place(node, tmp_path, clock, QueryConfig())
    yield made
    made.close()


@pytest.fixture
def spread(node: Node, tmp_path: Path, clock: ManualClock) -> Iterator[Place]:
    """Whose collections are all large."""
    made = Place(node, tmp_path, clock, QueryConfig(spread_bytes=0))
    yield made
    made.close()


def test_the_second_of_the_order_answers_from_its_own_disk(place: Place) -> None:
    node = place.node
    collection = make_collection(node)
    first, second, third = order(collection, _NAMES)
    add_rows(node, collection, 0, 2_000, _DIM)
    place.fold(collection)
    expected = answers(place.services[first], collection)
    place.settle()
    assert place.copies_of(second, collection) == place.objects_of(collection)
    assert place.copies_of(third, collection) == set()
    assert not place.services[second]._open_parts._parts, "on the disk, not in memory"
    place.fetched()
    assert answers(place.services[second], collection) == expected
    assert place.fetched() == []


def test_of_a_new_version_what_is_new_is_fetched(place: Place) -> None:
    node = place.node
    collection = make_collection(node)
    first, second, _ = order(collection, _NAMES)
    add_rows(node, collection, 0, 2_000, _DIM)
    place.fold(collection)
    before = place.objects_of(collection)
    answers(place.services[first], collection)
    place.settle()
    append(node, collection, operations(Op.DELETE, [f"id-{row}" for row in range(0, 900, 2)]))
    add_rows(node, collection, 2_000, 1_000, _DIM)
    place.fold(collection)
    expected = answers(place.services[first], collection)
    place.fetched()
    place.settle()
    assert set(place.fetched()) == place.objects_of(collection) - before
    assert answers(place.services[second], collection) == expected
    assert place.fetched() == []


def test_large_deleted_bitmaps_are_kept_too(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ochredb.parts.deleted.INLINE_BYTES_MAX", 16)
    node = place.node
    collection = make_collection(node)
    first, second, _ = order(collection, _NAMES)
    add_rows(node, collection, 0, 1_000, _DIM)
    place.fold(collection)
    append(node, collection, operations(Op.DELETE, [f"id-{row}" for row in range(0, 150, 2)]))
    place.fold(collection)
    expected = answers(place.services[first], collection)
    place.settle()
    assert any(key.startswith("deleted/") for key in place.objects_of(collection))
    assert place.copies_of(second, collection) == place.objects_of(collection)
    assert answers(place.services[second], collection) == expected


@pytest.mark.parametrize("error", [_UNREACHABLE, Unimplemented("old")])
def test_if_the_second_cannot_be_asked_the_third_is(place: Place, error: Exception) -> None:
    node = place.node
    collection = make_collection(node)
    first, second, third = order(collection, _NAMES)
    place.nodes.lines[second].always = error
    add_rows(node, collection, 0, 500, _DIM)
    place.fold(collection)
    answers(place.services[first], collection)
    place.settle()
    assert place.copies_of(third, collection) == place.objects_of(collection)


def test_it_is_asked_again_while_the_collection_is_read(place: Place) -> None:
    node = place.node
    collection = make_collection(node)
    first, second, third = order(collection, _NAMES)
    for name in (second, third):
        place.nodes.lines[name].always = _UNREACHABLE
    add_rows(node, collection, 0, 500, _DIM)
    place.fold(collection)
    answers(place.services[first], collection)
    place.settle()
    for name in (second, third):
        place.nodes.lines[name].always = None
    place.clock.advance(20)
    place.settle()
    place.settle()
    assert place.copies_of(second, collection) == set(), "nobody reads it"
    answers(place.services[first], collection)
    place.settle()
    assert place.copies_of(second, collection) == place.objects_of(collection)
    for key in place.objects_of(collection):
        place.stores[second]._forget(key)  # As if others had needed the room.
    answers(place.services[first], collection)
    place.settle()
    assert place.copies_of(second, collection) == set(), "it was asked not long ago"
    place.clock.advance(301)
    answers(place.services[first], collection)
    place.settle()
    assert place.copies_of(second, collection) == place.objects_of(collection)


def test_what_is_gone_or_does_not_come_keeps_nobody(place: Place) -> None:
    service, store = place.services["query-0"], place.stores["query-0"]
    place.far.create("parts/1/records", b"content")
    place.far.fail_times = 1
    service.keep_copies(
        [("parts/1/records", 7), ("parts/gone", 7), ("../no/key", 1)],
        cancel=Cancel(),
    )
    assert service._copies.settle(60)
    assert not store._has("parts/1/records")
    service.keep_copies([("parts/1/records", 7)], cancel=Cancel())
    assert service._copies.settle(60)
    assert store._has("parts/1/records")


def test_each_part_of_a_large_collection_has_a_second_owner(spread: Place) -> None:
    node = spread.node
    collection = make_collection(node)
    first = order(collection, _NAMES)[0]
    for number in range(6):
        add_rows(node, collection, 500 * number, 500, _DIM)
        spread.fold(collection)
    expected = answers(spread.services[first], collection)
    spread.settle()
    scatter = spread.services[first]._scatter
    assert scatter is not None
    parts = node.versions.parts(collection, node.logs.snapshot(collection).version)
    objects = {part.manifest.id: part.manifest.objects for part in parts}
    sizes = {part.manifest.id: part.manifest.size_bytes for part in parts}
    heirs = scatter.heirs(sizes)
    assert sorted(part_id for ids in heirs.values() for part_id in ids) == sorted(sizes)
    for name, part_ids in heirs.items():
        kept = spread.copies_of(name, collection)
        assert {info.key for part_id in part_ids for info in objects[part_id]} <= kept
    owners = scatter.owners(sizes)
    for owner, part_ids in owners.items():
        for name, ids in scatter.owners(sizes, without=owner).items():
            assert name == owner or set(ids) & set(part_ids) <= set(heirs.get(name, ()))
    gone = next(name for name in _NAMES if name != first and owners.get(name))
    spread.nodes.lines[gone].always = _UNREACHABLE
    answers(spread.services[first], collection)  # By now it is known that one is gone.
    spread.fetched()
    assert answers(spread.services[first], collection) == expected
    # Of the others' parts some change their owners too, as shares stay even.
    theirs = {info.key for part_id in owners[gone] for info in objects[part_id]}
    assert theirs.isdisjoint(spread.fetched())


def test_where_objects_are_near_nobody_is_asked(node: Node) -> None:
    nodes = QueryNodes(node, 2, QueryConfig())
    collection = make_collection(node)
    add_rows(node, collection, 0, 500, _DIM)
    node.compactor.compact_now(collection)
    assert not isinstance(node.store, CachedStore)
    for service in nodes.services:
        answers(service, collection)
        service.trim()
        assert service._copies._asking._thread is None
    nodes.close()
