"""What is in quarantine: listed, inspected, dropped; its bytes stay until then."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ochredb.catalog import objects, quarantine
from ochredb.catalog.quarantine import Quarantined
from ochredb.errors import NotFound
from ochredb_node.node import Node

from .kernel import ManualClock, make_collection, object_keys, running_node


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def node(clock: ManualClock) -> Iterator[Node]:
    with running_node(clock=clock) as node:
        yield node


def _item(collection: str, start: int, stop: int, key: str | None = None) -> Quarantined:
    return Quarantined(
        collection=collection,
        start=start,
        stop=stop,
        reason="not JSON",
        payload=b"bytes" if key is None else None,
        object_key=key,
        checksum=7,
    )


def _record(node: Node, item: Quarantined) -> None:
    with node.database.write() as session:
        if item.object_key is not None:
            objects.introduce(session, [(item.object_key, 5)])
        quarantine.record(session, [item], now_us=3)


def test_rows_are_listed_page_by_page_and_counted(node: Node) -> None:
    one, two = sorted([make_collection(node, "one"), make_collection(node, "two")])
    for item in (_item(two, 1, 1), _item(one, 9, 12), _item(one, 3, 3)):
        _record(node, item)
    table = node.quarantine
    places = [(one, 3), (one, 9), (two, 1)]
    assert [(item.collection, item.start) for item in table.list()] == places
    assert [(item.collection, item.start) for item in table.list((one, 3), 1)] == places[1:2]
    assert [(item.collection, item.start) for item in table.list((one, 9))] == places[2:]
    assert (table.count(one), table.count(two), table.count("other")) == (5, 1, 0)
    found = table.get(one, 9)
    assert (found.payload, found.reason, found.count, found.time_us) == (b"bytes", "not JSON", 4, 3)
    with pytest.raises(NotFound, match="offset 4"):
        table.get(one, 4)


def test_a_dropped_row_lets_its_object_go_and_no_other(node: Node, clock: ManualClock) -> None:
    collection = make_collection(node)
    for start in (3, 9):
        node.store.create(f"fragments/{start}", b"bytes")
        _record(node, _item(collection, start, start, f"fragments/{start}"))
    clock.advance(3_600)
    node.compactor.collect_now(sweep_orphans=True)
    assert object_keys(node) == {"fragments/3", "fragments/9"}
    assert node.quarantine.drop(collection, 9).object_key == "fragments/9"
    with pytest.raises(NotFound):
        node.quarantine.drop(collection, 9)
    clock.advance(3_600)
    node.compactor.collect_now(sweep_orphans=True)
    assert object_keys(node) == {"fragments/3"}
    node.namespace.delete_collection("default_tenant", "default_database", "records")
    clock.advance(3_600)
    node.compactor.collect_now(sweep_orphans=True)
    assert object_keys(node) == set()
