"""Live rows of tails and of parts as the columns of a new part, ascending by seq."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ochredb.parts.reader import Part
from ochredb.parts.records import COLUMNS, ColumnPlan, records_pieces
from ochredb.parts.writer import PartRows
from ochredb.segment import Rows
from ochredb.storage.base import LocalStore
from ochredb.tail import TailSegment
from ochredb.types import Float32s, Int64s

_STEP_ROWS = 500  # Converted per call: no call holds the interpreter for long.
_PIECE_BYTES = 1 << 20
_HEAP_BYTES_MAX = 16 << 20  # Above, a merge's rows are gathered outside of the heap.
_RESIDENT_BYTES_MAX = 16 << 20  # Of mapped inputs, before their pages are let go.


def rows_of_tail(chunks: Sequence[tuple[TailSegment, Rows]]) -> PartRows:
    """The tail's live rows. Cost: about a microsecond per row, in short steps."""
    seqs = np.concatenate([segment.seqs[rows] for segment, rows in chunks])
    order = np.argsort(seqs, kind="stable")
    vectors = np.concatenate([segment.vectors[rows] for segment, rows in chunks])
    columns: dict[str, list[pa.Array]] = {name: [] for name in COLUMNS}
    for segment, rows in chunks:
        for start in range(0, len(rows), _STEP_ROWS):
            step = rows[start : start + _STEP_ROWS]
            columns["id"].append(pa.array(segment.take_ids(step), pa.large_string()))
            columns["document"].append(pa.array(segment.take_documents(step), pa.large_string()))
            columns["uri"].append(pa.array(segment.take_uris(step), pa.large_string()))
            columns["metadata"].append(pa.array(segment.take_metadatas(step), pa.large_binary()))
    return _ordered(seqs, vectors, columns, order)


def rows_of_parts(
    store: LocalStore, inputs: Sequence[tuple[Part, Rows]], step: Callable[[], None]
) -> tuple[PartRows, list[NDArray[np.int64]]]:
    """The given rows of several parts, and for each part int64[rows]: its output rows, or -1.

    What is large is gathered in steps into scratch of `store`: memory holds some 30 bytes per row.
    """
    seqs = np.concatenate([part.seqs[rows] for part, rows in inputs])
    order = np.argsort(seqs, kind="stable")
    output = np.empty(len(order), np.int64)
    output[order] = np.arange(len(order))
    maps, start = [], 0
    for part, rows in inputs:
        mapping = np.full(len(part), -1, np.int64)
        mapping[rows] = output[start : start + len(rows)]
        maps.append(mapping)
        start += len(rows)
    picks = _Picks(inputs, order, step)
    if _size_bytes(inputs) > _HEAP_BYTES_MAX:
        return _in_scratch(store, seqs[order], picks), maps
    vectors = np.concatenate([part.vectors[rows] for part, rows in inputs])
    step()
    columns: dict[str, list[pa.Array]] = {name: [] for name in COLUMNS}
    for part, rows in inputs:
        whole = len(rows) == len(part)
        for name in COLUMNS:
            column = part.record_batch.column(name)
            columns[name].append(column if whole else column.take(pa.array(rows)))
            step()
    return _ordered(seqs, vectors, columns, order), maps


def _size_bytes(inputs: Sequence[tuple[Part, Rows]]) -> int:
    return sum(part.record_batch.nbytes + len(part) * part.dimension * 4 for part, _ in inputs)


def _in_scratch(store: LocalStore, seqs: Int64s, picks: _Picks) -> PartRows:
    vectors = store.scratch(picks.vectors())
    records = store.scratch(records_pieces(seqs, [picks.column(name) for name in COLUMNS]))
    batch = pa.ipc.open_file(pa.py_buffer(records)).get_batch(0)

    def forget_pages() -> None:
        store.forget_pages(vectors)
        store.forget_pages(records)

    forget_pages()
    return PartRows(
        seqs=seqs,
        ids=batch.column("id"),
        documents=batch.column("document"),
        uris=batch.column("uri"),
        metadatas=batch.column("metadata"),
        vectors=np.frombuffer(vectors, np.float32).reshape(len(seqs), -1),
        records=records,
        forget_pages=forget_pages,
    )


class _Picks:
    """Rows of several parts in the order of the output, fetched a few at a time."""

    def __init__(
        self,
        inputs: Sequence[tuple[Part, Rows]],
        order: NDArray[np.int64],
        step: Callable[[], None],
    ) -> None:
        self._parts = [part for part, _ in inputs]
        counts = [len(rows) for _, rows in inputs]
        self._of = np.repeat(np.arange(len(inputs), dtype=np.int32), counts)[order]
        self._rows = np.concatenate([np.asarray(rows, np.int64) for _, rows in inputs])[order]
        self._step = step
        self._read_bytes = 0

    def vectors(self) -> Iterator[Float32s]:
        """float32[some, d] each, in order."""
        dimension = self._parts[0].dimension
        some = max(1, _PIECE_BYTES // (4 * dimension))
        for start in range(0, len(self._rows), some):
            of, rows = self._of[start : start + some], self._rows[start : start + some]
            block = np.empty((len(rows), dimension), np.float32)
            for number in np.unique(of).tolist():
                mine = of == number
                block[mine] = self._parts[number].vectors[rows[mine]]
            self._read(block.nbytes)
            yield block

    def column(self, name: str) -> ColumnPlan:
        count = len(self._rows)
        lengths = np.empty(count, np.int64)
        present = np.ones(count, np.bool_)
        for number, part in enumerate(self._parts):
            array = part.record_batch.column(name)
            mine = self._of == number
            rows = self._rows[mine]
            lengths[mine] = np.diff(_offsets(array))[rows]
            if array.null_count:
                present[mine] = array.is_valid().to_numpy(zero_copy_only=False)[rows]
        lengths[~present] = 0
        self._step()
        return ColumnPlan(
            lengths, None if present.all() else present, partial(self._strings, name, lengths)
        )

    def _strings(self, name: str, lengths: Int64s) -> Iterator[memoryview]:
        arrays = [part.record_batch.column(name) for part in self._parts]
        ends = np.cumsum(lengths)
        start = done = 0
        while start < len(lengths):
            stop = int(np.searchsorted(ends, done + _PIECE_BYTES, "right"))
            stop = min(max(start + 1, stop), start + _STEP_ROWS, len(lengths))
            size = int(ends[stop - 1]) - done
            if size:
                yield _joined(arrays, self._of[start:stop], self._rows[start:stop], size)
            self._read(size)
            start, done = stop, int(ends[stop - 1])

    def _read(self, size: int) -> None:
        """Between two pieces: let others run, and go of what is behind."""
        self._step()
        self._read_bytes += size
        if self._read_bytes > _RESIDENT_BYTES_MAX:
            self._read_bytes = 0
            for part in self._parts:
                part.forget_pages()


def _joined(
    arrays: Sequence[pa.Array], of: NDArray[np.int32], rows: NDArray[np.int64], size: int
) -> memoryview:
    """The bytes of row `rows[i]` of array `of[i]`, one after the other; `size` in all."""
    numbers = np.unique(of)
    if len(numbers) == 1:
        array = arrays[numbers[0]]
        if rows[-1] - rows[0] + 1 == len(rows):
            data = _bytes(array.slice(rows[0], len(rows)))
            if data.nbytes == size:  # Else absent strings have bytes: not those of `take`.
                return data
        return _bytes(array.take(pa.array(rows)))
    taken = pa.concat_arrays([arrays[k].take(pa.array(rows[of == k])) for k in numbers.tolist()])
    place = np.empty(len(of), np.int64)
    place[np.argsort(of, kind="stable")] = np.arange(len(of))
    return _bytes(taken.take(pa.array(place)))


def _bytes(array: pa.Array) -> memoryview:
    offsets = _offsets(array)
    data = array.buffers()[2]
    return memoryview(data if data is not None else b"").cast("B")[offsets[0] : offsets[-1]]


def _offsets(array: pa.Array) -> Int64s:
    """int64[n+1] of a large_string or large_binary array."""
    start_bytes = 8 * array.offset
    return np.frombuffer(array.buffers()[1], np.int64, len(array) + 1, start_bytes)


def _ordered(
    seqs: NDArray[np.int64],
    vectors: NDArray[np.float32],
    columns: dict[str, list[pa.Array]],
    order: NDArray[np.int64],
) -> PartRows:
    joined = {name: pa.concat_arrays(pieces) for name, pieces in columns.items()}
    if not bool(np.all(order[1:] > order[:-1])):
        picks = pa.array(order)
        joined = {name: column.take(picks) for name, column in joined.items()}
        seqs, vectors = seqs[order], vectors[order]
    return PartRows(
        seqs=seqs,
        ids=joined["id"],
        documents=joined["document"],
        uris=joined["uri"],
        metadatas=joined["metadata"],
        vectors=np.ascontiguousarray(vectors),
    )
