"""Keyed deletes that find nothing are remembered as having found nothing (I8)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ochredb.cancel import Cancel
from ochredb.types import Appended, Op, Operations
from ochredb_node.node import Node

from .kernel import append, ids_of, make_collection, operations, running_node


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node() as running:
        yield running


def add(name: str) -> Operations:
    return operations(Op.ADD, [name], [[1.0, 2.0]])


def test_nothing_to_write_is_remembered_by_its_key(node: Node) -> None:
    """I8: a repeat must not delete what came later."""
    collection = make_collection(node)
    append(node, collection, add("a"))

    def answer(*ids: str) -> Appended:
        return node.log.append_evaluated(
            collection,
            lambda: operations(Op.DELETE, ids),
            idempotency_key="key",
            request_hash=b"hash",
            cancel=Cancel(),
        )

    assert answer() == Appended(2, 1)
    append(node, collection, add("b"))
    assert answer("b") == Appended(2, 1, repeated=True)
    assert answer() == Appended(2, 1, repeated=True)
    assert ids_of(node, collection) == ["a", "b"]
    assert node.log.record_nothing(collection, "key", b"hash", cancel=Cancel()).repeated


def test_who_found_nothing_is_told_what_its_first_attempt_did(node: Node) -> None:
    """It landed between the look for the key and the read that found nothing any more."""
    collection = make_collection(node)
    append(node, collection, add("a"))
    first = node.log.append(
        collection, operations(Op.DELETE, ["a"]), idempotency_key="key", request_hash=b"hash",
        cancel=Cancel(),
    )  # fmt: skip
    again = node.log.record_nothing(collection, "key", b"hash", cancel=Cancel())
    assert (again.first_offset, again.last_offset) == (first.first_offset, first.last_offset)
