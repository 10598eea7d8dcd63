"""Merging in bounded memory: gathered in steps is the same as gathered at once, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochredb.configuration import IndexSettings
from ochredb.ids import IdSource
from ochredb.parts.columns import BytesColumn
from ochredb.parts.reader import Part
from ochredb.parts.records import COLUMNS, ColumnPlan, records_pieces
from ochredb.parts.writer import PartRows, _records, write_part
from ochredb.segment import Rows
from ochredb.storage.base import LocalStore
from ochredb.storage.directory import DirectoryStore
from ochredb.storage.memory import MemoryStore
from ochredb.types import Op
from ochredb_compactor import gather
from ochredb_compactor.compaction import _some
from ochredb_compactor.config import CompactorConfig

from .kernel import add_rows, all_rows, append, make_collection, operations, running_node

SETTINGS = IndexSettings(ef_construction=64, ef_search=50, max_neighbors=8)
Strings = list[str | None]


def _no_step() -> None:
    pass


def _rows(seqs: list[int], texts: Strings) -> PartRows:
    count = len(seqs)
    metadatas = [None if text is None else orjson.dumps({"a": text}) for text in texts]
    return PartRows(
        seqs=np.array(seqs, np.int64),
        ids=pa.array([f"id-{seq}" for seq in seqs], pa.large_string()),
        documents=pa.array(texts, pa.large_string()),
        uris=pa.array([None] * count, pa.large_string()),
        metadatas=pa.array(metadatas, pa.large_binary()),
        vectors=np.array([[seq, seq % 7, 1] for seq in seqs], np.float32),
    )


def _equal(left: PartRows, right: PartRows) -> None:
    assert left.seqs.tolist() == right.seqs.tolist()
    assert left.vectors.tobytes() == right.vectors.tobytes()
    for name in ("ids", "documents", "uris", "metadatas"):
        assert getattr(left, name).equals(getattr(right, name)), name
        getattr(left, name).validate(full=True)


@st.composite
def _inputs(draw: st.DrawFn) -> list[tuple[list[int], Strings, list[int]]]:
    """For each part: its seqs, its texts, and the rows that live."""
    texts = st.lists(st.one_of(st.none(), st.text(max_size=12)), min_size=1, max_size=6)
    owners = draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    runs = draw(st.integers(1, 10))  # How long rows of one part follow one another.
    parts = []
    for number in range(4):
        seqs = [seq for seq, _ in enumerate(owners * runs) if owners[seq // runs] == number]
        if seqs:
            drawn = draw(texts)
            values = [drawn[seq % len(drawn)] for seq in seqs]
            keep = draw(st.sampled_from([1, 2, 5, 1_000]))
            live = [row for row in range(len(seqs)) if row % keep != keep - 1 or keep == 1]
            parts.append((seqs, values, live))
    return parts


def _parts(store: LocalStore, inputs: list[tuple[list[int], Strings, list[int]]]) -> Any:
    ids = IdSource()
    out: list[tuple[Part, Rows]] = []
    for seqs, texts, live in inputs:
        manifest = write_part(store, ids.uuid7(), _rows(seqs, texts), None, _no_step)
        out.append((Part(store, manifest, SETTINGS), np.array(live, np.int64)))
    return out


@settings(deadline=None, max_examples=25)
@given(inputs=_inputs(), piece_bytes=st.sampled_from([1, 16, 100, 1 << 20]))
def test_in_steps_and_at_once_give_the_same(
    inputs: list[tuple[list[int], Strings, list[int]]], piece_bytes: int
) -> None:
    store = MemoryStore()
    parts = _parts(store, inputs)
    if not any(len(rows) for _, rows in parts):
        return
    expected, maps = gather.rows_of_parts(store, parts, _no_step)
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(gather, "_HEAP_BYTES_MAX", 0)
        monkey.setattr(gather, "_PIECE_BYTES", piece_bytes)
        monkey.setattr(gather, "_RESIDENT_BYTES_MAX", 50)
        found, found_maps = gather.rows_of_parts(store, parts, _no_step)
    assert expected.records is None
    assert found.records is not None
    _equal(found, expected)
    assert bytes(found.records) == bytes(_records(expected))
    assert [item.tolist() for item in found_maps] == [item.tolist() for item in maps]


def test_a_merged_part_is_the_same_however_it_was_gathered(tmp_path: Path) -> None:
    """The manifests agree in everything, checksums of all objects included, but their names."""
    manifests = []
    for heap_bytes_max in (0, 1 << 40):
        store = DirectoryStore(str(tmp_path / str(heap_bytes_max)))
        seqs = list(range(9_000))
        texts: Strings = [f"text {seq} ".ljust(1_000, "x") if seq % 3 else None for seq in seqs]
        parts = _parts(
            store,
            [
                (seqs[:5_000:2], texts[:5_000:2], list(range(2_500))),
                (seqs[1:5_000:2], texts[1:5_000:2], list(range(0, 2_500, 3))),
                (seqs[5_000:], texts[5_000:], list(range(4_000))),
            ],
        )
        with pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(gather, "_HEAP_BYTES_MAX", heap_bytes_max)
            rows, _ = gather.rows_of_parts(store, parts, _no_step)
        assert (rows.records is None) == bool(heap_bytes_max)
        manifest = write_part(store, IdSource().uuid7(), rows, None, _no_step)
        manifests.append([(item.size, item.checksum) for item in manifest.objects])
        assert len(manifest.objects) > 1, "larger than what is packed"
        part = Part(store, manifest, SETTINGS)
        assert part.take_ids(np.arange(3)) == ["id-0", "id-1", "id-2"]
    assert manifests[0] == manifests[1]


def test_bytes_of_absent_strings_are_left_out() -> None:
    """Arrow allows them; a slice would carry them along."""
    offsets = np.array([0, 2, 5, 6], np.int64)
    array = pa.Array.from_buffers(
        pa.large_string(),
        3,
        [pa.py_buffer(b"\x05"), pa.py_buffer(offsets), pa.py_buffer(b"abXXXc")],
        1,
    )
    data = gather._joined([array], np.zeros(3, np.int32), np.arange(3), 3)
    assert bytes(data) == b"abc"


def test_a_column_that_is_not_what_was_announced_is_an_error() -> None:
    plan = ColumnPlan(np.array([3], np.int64), None, lambda: iter([memoryview(b"ab")]))
    empty = ColumnPlan(np.array([0], np.int64), np.array([False]), lambda: iter([]))
    with pytest.raises(AssertionError, match="announced"):
        list(records_pieces(np.array([1]), [plan, empty, empty, empty]))


def test_records_of_all_kinds_are_read_by_arrow() -> None:
    texts: Strings = ["", "ä", None, "x" * 100_000, "", None, "z"]
    rows = _rows(list(range(7)), texts)
    plans = []
    for name in ("ids", "documents", "uris", "metadatas"):
        values = [
            item.encode() if isinstance(item, str) else item
            for item in getattr(rows, name).to_pylist()
        ]
        lengths = np.array([len(item or b"") for item in values], np.int64)
        present = np.array([item is not None for item in values])
        pieces = [memoryview(item) for item in values if item]
        plans.append(ColumnPlan(lengths, present, pieces.__iter__))
    data = b"".join(records_pieces(rows.seqs, plans))
    batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
    assert batch.schema.names == ["seq", *COLUMNS]
    assert BytesColumn.from_arrow(batch.column("document")).take_text(range(7)) == texts


class TestBoundedCompaction:
    """A long tail is folded in several compactions, each in bounded memory."""

    def test_fragments_are_taken_until_there_are_enough(self) -> None:
        fragments = [
            [(1 + 10 * i, operations(Op.ADD, [f"{i}-{k}" for k in range(10)], np.zeros((10, 4))))]
            for i in range(5)
        ]
        config = CompactorConfig(fold_rows_max=25)
        assert [first for first, _ in _some(fragments, config)] == [1, 11, 21]
        config = CompactorConfig(fold_bytes_max=1)
        assert [first for first, _ in _some(fragments, config)] == [1]
        assert len(list(_some(fragments, CompactorConfig()))) == 5
        with pytest.raises(ValueError, match="fold_rows_max"):
            CompactorConfig(fold_rows_max=0)

    def test_nothing_is_lost_or_doubled(self) -> None:
        with running_node() as node:
            world = node.compactor._world
            object.__setattr__(world, "config", CompactorConfig(fold_rows_max=25, graph_threads=1))
            collection = make_collection(node)
            for number in range(20):
                add_rows(node, collection, 10 * number, 10)
                append(node, collection, operations(Op.DELETE, [f"id-{10 * number + 3}"]))
                append(node, collection, operations(Op.UPDATE, ["id-0"], documents=[f"{number}"]))
            expected = all_rows(node, collection)
            node.compactor.fold_now(collection)
            snapshot = node.logs.snapshot(collection)
            assert snapshot.indexed_offset == snapshot.last_offset
            assert snapshot.version == 9, "240 operations, at most 34 at a time"
            assert all_rows(node, collection) == expected
            node.query.drop(collection)
            assert all_rows(node, collection) == expected
            assert node.logs.fragments(collection, 1, 1_000, 10) == []
