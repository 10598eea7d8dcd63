"""One budget for all tails: others make room, and what cannot fit is refused, never cut short."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ochredb.cancel import Cancel
from ochredb.catalog.appends import BacklogLimits
from ochredb.errors import Exhausted
from ochredb.tail import ROW_BYTES
from ochredb.types import Op
from ochredb_node.node import Node
from ochredb_query.config import QueryConfig

from .kernel import (
    add_rows,
    all_rows,
    append,
    forget_recent,
    ids_of,
    make_collection,
    operations,
    running_node,
)

ROWS = 300


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node() as node:
        yield node


def _budget(node: Node, tails: float) -> int:
    """Room for so many tails of `ROWS` rows."""
    if not node.query._loaded:
        probe = make_collection(node, "probe")
        add_rows(node, probe, 0, ROWS)
        ids_of(node, probe)
    each = node.query._tails.size_bytes
    assert each > ROWS * ROW_BYTES
    node.query.drop(node.query._loaded.popitem()[0])
    node.query._tails.bytes_max = int(tails * each)
    return node.query._tails.bytes_max


def _filled(node: Node, count: int) -> list[str]:
    collections = [make_collection(node, f"full-{number}") for number in range(count)]
    for collection in collections:
        add_rows(node, collection, 0, ROWS)
    return collections


def test_more_tails_than_memory_are_read_one_after_the_other(node: Node) -> None:
    budget = _budget(node, 3.5)
    collections = _filled(node, 10)
    for _ in range(2):
        for collection in collections:
            assert len(ids_of(node, collection)) == ROWS
            assert node.query._tails.size_bytes <= budget
    loaded = [key for key, item in node.query._loaded.items() if item.has_tail]
    assert loaded == collections[-3:], "the least recently used went"


def test_what_reads_hold_is_counted_and_the_next_one_is_refused(node: Node) -> None:
    budget = _budget(node, 2.5)
    one, two, three = _filled(node, 3)
    held = [node.query._view(name, Cancel())[0] for name in (one, two)]
    with pytest.raises(Exhausted, match="not yet indexed"):
        ids_of(node, three)
    assert node.query._tails.size_bytes <= budget
    assert [view.count for view in held] == [ROWS, ROWS], "a view that was taken stays valid"
    del held
    assert len(ids_of(node, three)) == ROWS


def test_a_log_that_can_never_fit_is_refused_until_it_is_folded(node: Node) -> None:
    _budget(node, 0.5)
    (collection,) = _filled(node, 1)
    for _ in range(2):
        with pytest.raises(Exhausted) as caught:
            ids_of(node, collection)
        assert caught.value.retry_after_s >= 1
    forget_recent(node)
    with pytest.raises(Exhausted):
        ids_of(node, collection)
    assert node.query._tails.size_bytes == 0
    node.compactor.fold_now(collection)
    assert len(ids_of(node, collection)) == ROWS


def test_a_tail_that_outgrows_memory_takes_writes_and_refuses_reads(node: Node) -> None:
    _budget(node, 1.5)
    (collection,) = _filled(node, 1)
    assert len(ids_of(node, collection)) == ROWS
    for first in range(ROWS, 4 * ROWS, ROWS):
        add_rows(node, collection, first, ROWS)
    with pytest.raises(Exhausted):
        ids_of(node, collection)
    node.query.follow(collection, 0)
    node.query.trim()
    node.compactor.fold_now(collection)
    assert len(ids_of(node, collection)) == 4 * ROWS


def test_texts_are_counted_of_fragments_and_of_records_in_parts(node: Node) -> None:
    collection = make_collection(node)
    names = [f"id-{number}" for number in range(20)]
    texts = ["x" * 50_000] * 20
    append(node, collection, operations(Op.ADD, names, [[1.0, 2.0]] * 20, documents=texts))
    ids_of(node, collection)
    assert 1_000_000 < node.query._tails.size_bytes < 1_200_000
    node.compactor.fold_now(collection)
    ids_of(node, collection)
    assert node.query._tails.size_bytes == 0
    append(node, collection, operations(Op.UPDATE, names, [[3.0, 4.0]] * 20))
    ids_of(node, collection)
    assert 1_000_000 < node.query._tails.size_bytes < 1_200_000, "they came from the part"


def test_all_of_it_is_free_at_once_when_nobody_holds_it(node: Node) -> None:
    collections = _filled(node, 3)
    gc.disable()
    try:
        for collection in collections:
            assert len(all_rows(node, collection)) == ROWS
        append(node, collections[0], operations(Op.UPDATE, ["id-3"], [[1.0] * 4]))
        ids_of(node, collections[0])
        assert node.query._tails.size_bytes > 3 * ROWS * ROW_BYTES
        for collection in collections:
            node.query.drop(collection)
        assert node.query._tails.size_bytes == 0
    finally:
        gc.enable()


def test_readers_at_once_get_all_or_a_refusal_and_memory_is_kept(node: Node) -> None:
    budget = _budget(node, 3.2)
    collections = _filled(node, 12)
    peaks: list[int] = []
    answers = {"whole": 0, "refused": 0}
    lock = threading.Lock()

    def read(turn: int) -> None:
        for number in range(24):
            try:
                found = len(ids_of(node, collections[(5 * turn + 7 * number) % 12]))
            except Exhausted:
                found = None
            with lock:
                peaks.append(node.query._tails.size_bytes)
                answers["refused" if found is None else "whole"] += 1
            assert found in (None, ROWS)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert answers["whole"] >= 4 * 12, answers
    assert max(peaks) <= 2 * budget, "four readers, each a tail beyond at most"


def test_the_default_fits_the_largest_log() -> None:
    limits = BacklogLimits()
    largest = limits.tail_bytes_max + limits.tail_rows_max * ROW_BYTES
    assert largest < 0.8 * QueryConfig().tail_bytes_max
