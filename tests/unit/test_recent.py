"""What a process just wrote is folded from memory, and always as the log has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ochredb.cancel import Cancel
from ochredb.recent import RecentOperations, own_copy
from ochredb.replay import read_operations
from ochredb.types import Op, Operations
from ochredb_query.loaded import QUICK_OPERATIONS_MAX

from .kernel import (
    append,
    forget_recent,
    ids_of,
    make_collection,
    operations,
    running_node,
    unexpected,
)


def _add(*ids: str) -> Operations:
    return operations(Op.ADD, list(ids), [[1.0]] * len(ids))


def _log(node: Any, collection: str) -> list[tuple[int, list[str]]]:
    return [(first, request.ids) for first, request in _operations(node, collection)]


def _operations(node: Any, collection: str) -> list[tuple[int, Operations]]:
    snapshot = node.logs.snapshot(collection)
    return list(
        read_operations(
            node.logs,
            node.store,
            collection,
            1,
            snapshot.last_offset,
            snapshot.dimension,
            unexpected,
        )
    )


def test_a_reader_does_not_ask_the_catalog_for_what_was_just_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running_node() as node:
        collection = make_collection(node)
        append(node, collection, _add("a", "b"))
        fragments, asked = node.logs.fragments, []

        def counted(*arguments: Any) -> Any:
            asked.append(arguments)
            return fragments(*arguments)

        monkeypatch.setattr(node.logs, "fragments", counted)
        assert ids_of(node, collection) == ["a", "b"]
        assert not asked
        forget_recent(node)
        append(node, collection, _add("c"))
        assert ids_of(node, collection) == ["a", "b", "c"]
        assert not asked
        forget_recent(node)
        assert _log(node, collection) == [(1, ["a", "b"]), (3, ["c"])]
        assert asked


def test_memory_and_log_are_read_in_any_mixture() -> None:
    with running_node() as node:
        collection = make_collection(node)
        for number in range(4):
            append(node, collection, _add(f"{number}-x", f"{number}-y"))
            if number == 1:
                forget_recent(node)
        # Another process's write: not in this one's memory.
        del node.logs.recent._young[collection, 5]
        expected = [(1 + 2 * i, [f"{i}-x", f"{i}-y"]) for i in range(4)]
        assert _log(node, collection) == expected
        forget_recent(node)
        assert _log(node, collection) == expected


def test_what_the_caller_changes_afterwards_is_not_seen() -> None:
    with running_node() as node:
        collection = make_collection(node)
        vectors, ids = np.array([[1.0], [2.0]], np.float32), ["a", "b"]
        request = Operations(op=Op.ADD, ids=ids, embeddings=vectors)
        node.log.append(collection, request, cancel=Cancel())
        vectors[:] = 9.0
        ids[0] = "z"
        ((_, kept),) = _operations(node, collection)
        assert kept.ids == ["a", "b"]
        assert kept.embeddings is not None
        assert kept.embeddings.tolist() == [[1.0], [2.0]]


def test_a_refresh_is_quick_if_little_is_new_and_all_of_it_in_memory() -> None:
    with running_node() as node:
        collection = make_collection(node)
        append(node, collection, _add("a"))
        assert ids_of(node, collection) == ["a"]
        loaded = node.query._loaded[collection]
        append(node, collection, _add("b", "c"))
        append(node, collection, _add("d"))
        assert loaded.refresh_is_quick(node.logs.snapshot(collection))
        with loaded._lock:
            view = loaded.view
            loaded.refresh_if_quick(node.logs.snapshot(collection))  # Waits for nobody.
            assert loaded.view is view
        with loaded._lock:  # Else the writer would fold so many for those who read.
            append(node, collection, _add(*map(str, range(QUICK_OPERATIONS_MAX))))
        assert not loaded.refresh_is_quick(node.logs.snapshot(collection))
        assert len(ids_of(node, collection)) == 4 + QUICK_OPERATIONS_MAX
        append(node, collection, _add("e"))
        forget_recent(node)
        assert not loaded.refresh_is_quick(node.logs.snapshot(collection))
        node.compactor.compact_now(collection)
        assert not loaded.refresh_is_quick(node.logs.snapshot(collection))
        assert len(ids_of(node, collection)) == 5 + QUICK_OPERATIONS_MAX


def test_a_refused_and_a_repeated_request_leave_nothing() -> None:
    with running_node() as node:
        collection = make_collection(node)
        for _ in range(2):
            node.log.append(collection, _add("a"), idempotency_key="k", cancel=Cancel())
        assert ids_of(node, collection) == ["a"]
        assert list(node.logs.recent._young) == [(collection, 1)]


def test_it_is_bounded_and_ages() -> None:
    recent = RecentOperations(bytes_max=100)
    recent.put("c", 1, _add("large"), 60)
    assert recent.get("c", 1) is None
    for offset in range(1, 21):
        recent.put("c", offset, own_copy(_add(str(offset)), 10), 10)
    held = [offset for offset in range(1, 21) if recent.get("c", offset)]
    assert held[-1] == 20
    assert 5 <= len(held) <= 10
    recent.age()
    assert recent.get("c", 20) is not None
    recent.age()
    assert recent.get("c", 20) is None
