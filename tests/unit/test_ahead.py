"""While the parts of a version that another process made are opened, reads go on without them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ochredb.errors import Unavailable
from ochredb.parts.reader import Part
from ochredb.segment import View
from ochredb.types import Op
from ochredb_node.node import Node

from .kernel import add_rows, append, ids_of, make_collection, operations, running_node


class Gate:
    """Holds up who opens the parts of new versions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.error: Exception | None = None
        warm = Part.warm

        def gated(part: Part) -> None:
            self.reached.set()
            assert self.opened.wait(30)
            if self.error is not None:
                raise self.error
            warm(part)

        monkeypatch.setattr(Part, "warm", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(str(tmp_path / "store")) as node:
        yield node


def fold_elsewhere(node: Node, collection: str) -> int:
    """Another process makes a part of the tail; returns the version."""
    with running_node(node.config.path) as other:
        other.compactor.fold_now(collection)
    return node.logs.snapshot(collection).version


def view_of(node: Node, collection: str) -> View:
    view = node.query._loaded[collection].view
    assert view is not None
    return view


def named(first: int, stop: int) -> list[str]:
    return [f"id-{number}" for number in range(first, stop)]


def test_reads_wait_for_no_part_and_see_every_write(node: Node, gate: Gate) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 50)
    assert ids_of(node, collection) == named(0, 50)
    version = fold_elsewhere(node, collection)
    assert ids_of(node, collection) == named(0, 50)
    assert gate.reached.wait(30)
    loaded = node.query._loaded[collection]
    for first in range(50, 90, 10):
        add_rows(node, collection, first, 10)
        assert ids_of(node, collection) == named(0, first + 10)
        assert loaded.is_current(node.logs.snapshot(collection)), "an event loop may answer"
    append(node, collection, operations(Op.DELETE, ["id-3", "id-60"]))
    assert "id-3" not in ids_of(node, collection)
    assert node.query.quick(collection, None) is not None
    assert view_of(node, collection).version < version
    gate.opened.set()
    assert node.query._prefetcher.settle(30)
    assert view_of(node, collection).version == version, "moved on without being asked"
    expected = [name for name in named(0, 90) if name not in ("id-3", "id-60")]
    assert ids_of(node, collection) == expected


def test_what_cannot_be_opened_is_found_out_by_readers(node: Node, gate: Gate) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 50)
    ids_of(node, collection)
    version = fold_elsewhere(node, collection)
    gate.error = Unavailable("not now")
    assert ids_of(node, collection) == named(0, 50)
    gate.opened.set()
    assert node.query._prefetcher.settle(30)
    assert ids_of(node, collection) == named(0, 50)
    assert view_of(node, collection).version == version


def test_a_tail_that_ends_before_the_parts_begin_does_not_serve(node: Node, gate: Gate) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 50)
    ids_of(node, collection)
    add_rows(node, collection, 50, 50)  # Never read by this process before they are in a part.
    version = fold_elsewhere(node, collection)
    assert ids_of(node, collection) == named(0, 100)
    assert view_of(node, collection).version == version
    assert not gate.reached.is_set()


def test_parts_of_this_process_are_open_and_taken_at_once(node: Node) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 50)
    ids_of(node, collection)
    node.compactor.fold_now(collection)
    assert ids_of(node, collection) == named(0, 50)
    assert view_of(node, collection).version == node.logs.snapshot(collection).version
    assert node.query._prefetcher._thread is None, "no other thread had anything to do"


def test_a_version_that_is_replaced_before_it_arrives_is_passed_over(
    node: Node, gate: Gate
) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 50)
    ids_of(node, collection)
    fold_elsewhere(node, collection)
    ids_of(node, collection)
    assert gate.reached.wait(30)
    add_rows(node, collection, 50, 50)
    assert ids_of(node, collection) == named(0, 100)
    version = fold_elsewhere(node, collection)
    assert ids_of(node, collection) == named(0, 100)
    gate.opened.set()
    assert node.query._prefetcher.settle(30)
    assert view_of(node, collection).version == version
    assert ids_of(node, collection) == named(0, 100)
