"""What loaded collections hold: pages are let go, replaced versions too, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest

from ochredb_node.node import Node
from ochredb_query import service as query_service
from ochredb_query.config import QueryConfig
from ochredb_query.loaded import LoadedCollection

from .kernel import ManualClock, add_rows, ids_of, make_collection, running_node


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node(clock=ManualClock()) as node:
        yield node


def test_pages_of_idle_collections_are_let_go_beyond_their_budget(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least recently read first, once, and never while somebody reads."""
    names = {name: make_collection(node, name) for name in ("one", "two", "three")}
    for collection in names.values():
        add_rows(node, collection, 0, 200)
        node.compactor.compact_now(collection)
        ids_of(node, collection)
    each = node.query._loaded[names["one"]].mapped_bytes
    assert each > 10_000
    forgotten: list[str] = []
    forget = LoadedCollection.forget_pages

    def record(self: LoadedCollection) -> None:
        forgotten.extend(name for name, id_ in names.items() if id_ == self.collection_id)
        forget(self)

    monkeypatch.setattr(LoadedCollection, "forget_pages", record)
    node.query._config = QueryConfig(mapped_bytes=int(1.5 * each))
    node.query.trim()
    assert forgotten == [], "all were just read"
    node.query.trim()
    assert forgotten == ["two", "one"]
    node.query.trim()
    assert forgotten == ["two", "one"], "nothing is resident any more"
    ids_of(node, names["one"])
    for _ in range(2):
        node.query.trim()
    assert forgotten == ["two", "one", "three"]
    assert len(ids_of(node, names["three"])) == 200


def test_in_turns_every_collection_is_looked_at(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many idle collections some are looked at each time, and a replaced version moves on."""
    monkeypatch.setattr(query_service, "_ALWAYS_LOOKED_AT", 0)
    made = [make_collection(node, f"c{number}") for number in range(10)]
    for collection in made:
        add_rows(node, collection, 0, 5)
        ids_of(node, collection)
    for collection in made:
        node.compactor.fold_now(collection)

    def moved() -> int:
        views = [node.query._loaded[collection].view for collection in made]
        return sum(view is not None and view.version == 1 for view in views)

    node.query.trim()  # All were just read: they refresh by themselves.
    counts = [moved()]
    for _ in range(8):
        node.query.trim()
        counts.append(moved())
    assert counts[0] == 0
    assert all(later - sooner <= 2 for sooner, later in pairwise(counts))
    assert counts[-1] == 10


def test_pages_go_under_load_too_but_not_of_what_was_read_last(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of collections read one after the other must not add up."""
    monkeypatch.setattr(query_service, "_ALWAYS_LOOKED_AT", 2)
    made = [make_collection(node, f"c{number}") for number in range(5)]
    for collection in made:
        add_rows(node, collection, 0, 200)
        node.compactor.compact_now(collection)
        ids_of(node, collection)
    node.query._config = QueryConfig(mapped_bytes=1)
    node.query.trim()
    resident = [node.query._loaded[collection].is_resident for collection in made]
    assert resident == [False, False, False, True, True]
    assert all(len(ids_of(node, collection)) == 200 for collection in made)


def test_what_an_idle_collection_holds_is_counted_again_in_turns(node: Node) -> None:
    """A read may still be loading while its collection is counted: then the count is wrong."""
    collection = make_collection(node)
    add_rows(node, collection, 0, 50)
    ids_of(node, collection)
    loaded = node.query._loaded[collection]
    assert node.query.trim()
    assert loaded.measured == (loaded.memory_bytes, loaded.mapped_bytes)
    loaded.measured = (1, 1)
    for _ in range(query_service._TURNS):
        assert not node.query.trim()
    assert loaded.measured == (loaded.memory_bytes, loaded.mapped_bytes)


def test_looking_at_many_collections_pauses(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_service, "_LOOKS_IN_A_ROW", 2)
    pauses_s: list[float] = []
    monkeypatch.setattr(node.query._clock, "sleep", pauses_s.append)
    for name in ("one", "two", "three", "four", "five"):
        ids_of(node, make_collection(node, name))
    node.query.trim()
    assert pauses_s == [query_service._PAUSE_S] * 2
