"""`Fold` against a dict: what each operation means, and that what a reader holds never changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochredb import materialise, tail
from ochredb.configuration import IndexSettings
from ochredb.ids import IdSource
from ochredb.materialise import Fold
from ochredb.parts.reader import Part
from ochredb.parts.writer import write_part
from ochredb.segment import SegmentView, View
from ochredb.storage.memory import MemoryStore
from ochredb.tail import Chunk
from ochredb.types import Op, Operations
from ochredb_compactor.gather import rows_of_tail

from .kernel import Model, operations, rows_of_view

IDS = "abcdef"
_names = st.lists(st.sampled_from(IDS), min_size=1, max_size=6)
_metadata = st.none() | st.dictionaries(
    st.sampled_from("xyz"), st.integers(-3, 3) | st.just("text with null in it"), max_size=3
)
_change = st.none() | st.dictionaries(
    st.sampled_from("xyz"), st.none() | st.integers(-3, 3) | st.just("text"), max_size=3
)


@st.composite
def _requests(draw: st.DrawFn) -> Operations:
    op = draw(st.sampled_from([Op.ADD, Op.UPDATE, Op.UPSERT, Op.DELETE, Op.NOOP]))
    ids = draw(_names)
    count = len(ids)
    if op in (Op.DELETE, Op.NOOP):
        return operations(op, ids)

    def column(items: st.SearchStrategy[Any]) -> list[Any] | None:
        if not draw(st.booleans()):
            return None
        return draw(st.lists(items, min_size=count, max_size=count))

    vectors: list[tuple[int, int]] | None = draw(
        st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=count, max_size=count)
    )
    embedded = None
    if op is Op.UPDATE:
        embedded = column(st.booleans())
        if draw(st.booleans()):
            vectors, embedded = None, None
    metadatas = column(_metadata if op is Op.ADD else _change)
    if metadatas is not None:
        metadatas = [item or None for item in metadatas]  # As `encode_metadatas` makes them.
    return operations(
        op,
        ids,
        vectors,
        embedded=embedded,
        documents=column(st.none() | st.sampled_from(["", "one", "zwei"])),
        uris=column(st.none() | st.just("file:///x")),
        metadatas=metadatas,
    )


def _folded_into_part(fold: Fold, store: MemoryStore) -> Fold:
    """What compaction does: the tail becomes a part, older parts lose rows."""
    base = [view for view in fold.base if view.live_count]
    chunks = fold.tail_live_rows()
    if chunks:
        manifest = write_part(store, IdSource().uuid7(), rows_of_tail(chunks), None, lambda: None)
        part = Part(store, manifest, IndexSettings())
        base.append(SegmentView(part, None, manifest.rows, manifest.id))
    after = Fold(fold.version + 1, fold.last_offset, base)
    after.dimension = fold.dimension
    return after


@settings(deadline=None, max_examples=100)
@given(script=st.lists(_requests() | st.just("compact") | st.just("freeze"), max_size=20))
def test_folding_equals_the_model_and_frozen_views_stay_as_they_were(script: list[Any]) -> None:
    store, model = MemoryStore(), Model()
    fold = Fold(0, 0, [])
    frozen: list[tuple[View, list[dict[str, Any]]]] = []
    for item in script:
        if item == "compact":
            fold = _folded_into_part(fold, store)
        elif item == "freeze":
            frozen.append((fold.freeze(), model.rows()))
        else:
            fold.apply(model.next_offset, item)
            model.apply(item)
    frozen.append((fold.freeze(), model.rows()))
    for view, rows in frozen:
        assert rows_of_view(view) == rows
        assert view.count == len(rows)
        live = view.find_ids(list(IDS))
        found = np.array(live).max(axis=0) >= 0 if live else np.zeros(len(IDS), np.bool_)
        assert {IDS[i] for i in np.flatnonzero(found)} == {row["id"] for row in rows}
        assert sum(int((places >= 0).sum()) for places in live) == len(rows)


def _fold(*requests: Operations) -> Fold:
    fold = Fold(0, 0, [])
    for request in requests:
        fold.apply(fold.last_offset + 1, request)
    return fold


def test_add_is_ignored_if_the_id_lives_and_gets_a_new_seq_after_a_delete() -> None:
    fold = _fold(
        operations(Op.ADD, ["a", "b"], [[1], [2]]),
        operations(Op.ADD, ["a"], [[9]]),
        operations(Op.DELETE, ["a"]),
        operations(Op.ADD, ["a"], [[3]]),
    )
    rows = rows_of_view(fold.freeze())
    assert [(row["id"], row["seq"], row["embedding"]) for row in rows] == [
        ("b", 2, [2.0]),
        ("a", 5, [3.0]),
    ]


def test_update_of_an_unknown_id_is_ignored_and_absent_fields_stay() -> None:
    fold = _fold(
        operations(Op.ADD, ["a"], [[1]], documents=["d"], metadatas=[{"x": 1, "y": 2}]),
        operations(Op.UPDATE, ["a", "b"], metadatas=[{"x": None, "z": 3}, {"z": 4}]),
    )
    assert rows_of_view(fold.freeze()) == [
        {
            "id": "a",
            "seq": 1,
            "document": "d",
            "uri": None,
            "metadata": {"y": 2, "z": 3},
            "embedding": [1.0],
        }
    ]


def test_an_upsert_that_inserts_drops_nulls_and_removing_every_key_leaves_none() -> None:
    fold = _fold(
        operations(Op.UPSERT, ["a", "b"], [[1], [2]], metadatas=[{"x": None}, {"x": None, "y": 1}])
    )
    assert [row["metadata"] for row in rows_of_view(fold.freeze())] == [None, {"y": 1}]


def test_repeated_ids_in_one_request_are_applied_in_order() -> None:
    fold = _fold(
        operations(Op.UPSERT, ["a", "b", "a"], [[1], [2], [3]], documents=["p", "q", None])
    )
    rows = rows_of_view(fold.freeze())
    assert [(row["id"], row["seq"], row["document"]) for row in rows] == [
        ("a", 1, "p"),
        ("b", 2, "q"),
    ]
    assert rows[0]["embedding"] == [3.0]


def test_a_purged_operation_keeps_its_offset() -> None:
    fold = _fold(operations(Op.NOOP, ["a", "b"]), operations(Op.ADD, ["c"], [[1]]))
    assert fold.last_offset == 3
    assert [row["seq"] for row in rows_of_view(fold.freeze())] == [3]


def test_fragments_are_folded_without_holes() -> None:
    fold = _fold(operations(Op.ADD, ["a"], [[1]]))
    with pytest.raises(AssertionError):
        fold.apply(3, operations(Op.ADD, ["b"], [[1]]))


def test_an_older_segment_of_a_chunk_finds_the_rows_that_it_had() -> None:
    """find_ids of a frozen segment walks back from rows that came later, however many."""
    fold = _fold(operations(Op.ADD, ["a", "b"], [[1], [2]]))
    older = fold.freeze().segments[0]
    for value in range(3, 6):
        fold.apply(fold.last_offset + 1, operations(Op.UPSERT, ["a", "c"], [[value], [value]]))
    fold.apply(fold.last_offset + 1, operations(Op.DELETE, ["b"]))
    assert older.segment.find_ids(["a", "b", "c"]).tolist() == [0, 1, -1]
    assert older.is_live(older.segment.find_ids(["a", "b", "c"])).tolist() == [True, True, False]
    newer = fold.freeze().segments[0]
    assert newer.is_live(newer.segment.find_ids(["a", "b", "c"])).tolist() == [True, False, True]


def test_a_view_keeps_its_vectors_while_the_chunk_grows_and_is_replaced() -> None:
    fold = _fold(operations(Op.ADD, ["a"], [[1.5]]))
    view = fold.freeze()
    for start in range(0, 2_000, 100):
        ids = [f"n{i}" for i in range(start, start + 100)]
        fold.apply(fold.last_offset + 1, operations(Op.ADD, ids, [[0.0]] * 100))
    assert rows_of_view(view) == [
        {
            "id": "a",
            "seq": 1,
            "document": None,
            "uri": None,
            "metadata": None,
            "embedding": [1.5],
        }
    ]
    assert fold.freeze().count == 2_001
    assert len(fold.chunks) < 30


def test_a_segment_of_a_chunk_is_a_prefix() -> None:
    chunk = Chunk(1, 4)
    empty = chunk.whole()
    chunk.append(["a"], np.array([1]), np.zeros((1, 1), np.float32), [None], [None], [b'{"x":1}'])
    assert len(empty) == 0
    assert len(empty.documents) == 0
    assert empty.find_ids(["a"]).tolist() == [-1]


@settings(deadline=None, max_examples=60)
@given(
    script=st.lists(_requests() | st.just("compact") | st.just("freeze"), max_size=25),
    cuts=st.lists(st.integers(1, 4), min_size=25, max_size=25),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_folding_in_batches_into_small_chunks_and_segments_gives_the_same(
    script: list[Any], cuts: list[int], sizes: tuple[int, int]
) -> None:
    """Whatever shares a look-up, and wherever chunks and segments end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(materialise, "_CHUNK_BYTES_MAX", 1)
        patch.setattr(materialise, "_CHUNK_ROWS_MIN", sizes[0])
        patch.setattr(tail, "_SEGMENT_ROWS_MIN", sizes[1])
        store, model = MemoryStore(), Model()
        fold = Fold(0, 0, [])
        frozen: list[tuple[View, list[dict[str, Any]]]] = []
        waiting: list[tuple[int, Operations]] = []
        for item, cut in zip(script, cuts, strict=False):
            if not isinstance(item, str):
                waiting.append((model.next_offset, item))
                model.apply(item)
            if isinstance(item, str) or len(waiting) >= cut:
                fold.apply_batch(waiting)
                waiting = []
            if item == "compact":
                fold = _folded_into_part(fold, store)
            elif item == "freeze":
                frozen.append((fold.freeze(), model.rows()))
        fold.apply_batch(waiting)
        frozen.append((fold.freeze(), model.rows()))
        for view, rows in frozen:
            assert rows_of_view(view) == rows
            assert view.count == len(rows)
            for item in view.segments:
                norms = np.einsum("nd,nd->n", item.segment.vectors, item.segment.vectors)
                assert np.allclose(item.segment.squared_norms, norms)
            live = view.find_ids(list(IDS))
            assert sum(int((places >= 0).sum()) for places in live) == len(rows)


def test_a_tail_of_many_small_writes_has_few_segments() -> None:
    fold = Fold(0, 0, [])
    for number in range(2_000):
        fold.apply(fold.last_offset + 1, operations(Op.ADD, [str(number)], [[number]]))
        if number % 3 == 0:
            view = fold.freeze()
            assert view.count == number + 1
            assert len(view.segments) <= 5
    fold.apply(fold.last_offset + 1, operations(Op.DELETE, [str(i) for i in range(1_000)]))
    assert fold.freeze().count == 1_000


def test_a_batch_is_applied_in_order_to_records_in_parts() -> None:
    """What one look-up found for all of a batch is not used after the record has changed."""
    first = _fold(operations(Op.ADD, ["a", "b", "c"], [[1], [2], [3]], uris=["u", None, None]))
    fold = _folded_into_part(first, MemoryStore())
    batch = [
        operations(Op.UPDATE, ["a"], documents=["new"]),
        operations(Op.DELETE, ["a", "b"]),
        operations(Op.UPDATE, ["a"], documents=["ignored"]),
        operations(Op.ADD, ["a"], [[9]]),
        operations(Op.UPSERT, ["c", "b"], [[7], [8]]),
        operations(Op.DELETE, ["b"]),
    ]
    fragments, offset = [], 4
    for item in batch:
        fragments.append((offset, item))
        offset += len(item)
    fold.apply_batch(fragments)
    rows = rows_of_view(fold.freeze())
    assert [(row["id"], row["seq"], row["document"], row["uri"]) for row in rows] == [
        ("c", 3, None, None),
        ("a", 8, None, None),
    ]
    assert [row["embedding"] for row in rows] == [[7.0], [9.0]]


def _three_rows(first: int) -> Operations:
    ids = [f"id-{number}" for number in range(first, first + 3)]
    vectors = [(number, first) for number in range(first, first + 3)]
    return operations(Op.ADD, ids, vectors)


def test_a_tail_of_inserts_moves_to_a_newer_version() -> None:
    """It is what folding the log anew over that version gives, and old views stay as they were."""
    fold = Fold(1, 0, [])
    for first in (1, 4, 7):
        fold.apply(first, _three_rows(first))
    before = fold.freeze()
    rows = rows_of_view(before)
    moved = fold.moved(2, 3, [])
    assert moved is not None
    anew = Fold(2, 3, [])
    for first in (4, 7):
        anew.apply(first, _three_rows(first))
    for one in (moved, anew):
        one.apply(10, operations(Op.UPSERT, ["id-5"], [(0, 0)]))
    view, expected = moved.freeze(), anew.freeze()
    assert rows_of_view(view) == rows_of_view(expected)
    assert (view.version, view.indexed_offset, view.last_offset) == (2, 3, 10)
    assert moved.tail_rows == anew.tail_rows
    assert rows_of_view(before) == rows
    assert moved.moved(3, 6, []) is None, "a row was replaced"


def test_a_tail_moves_only_to_where_it_reaches() -> None:
    fold = Fold(1, 3, [])
    fold.apply(4, _three_rows(4))
    assert fold.moved(2, 9, []) is None
    assert fold.moved(2, 2, []) is None
    moved = fold.moved(2, 6, [])
    assert moved is not None
    assert moved.freeze().count == 0


def test_growing_copies_little_and_a_chunk_that_is_full_is_one_range() -> None:
    fold = Fold(0, 0, [])
    rng = np.random.default_rng(1)
    views: list[View] = []
    for number in range(60):
        names = [f"id-{number}-{i}" for i in range(250)]
        vectors = rng.standard_normal((250, 128)).astype(np.float32)
        fold.apply(1 + 250 * number, operations(Op.ADD, names, vectors))
        views.append(fold.freeze())
    assert len(fold.chunks) > 1
    rows_max = materialise._CHUNK_BYTES_MAX // (4 * 128) + 250
    assert all(chunk.count < rows_max for chunk in fold.chunks)
    full, last = fold.chunks[0], fold.chunks[-1]
    assert [len(item.segment) for item in full.freeze()] == [full.count]
    assert len(last.freeze()) > 1
    for number, view in enumerate(views):
        assert view.count == 250 * (number + 1)
        seqs = np.concatenate([item.segment.seqs for item in view.segments])
        assert np.array_equal(seqs, np.arange(1, view.count + 1))
