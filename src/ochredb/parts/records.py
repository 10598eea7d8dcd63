"""The section `records` of a large part, made without having it in memory.

It is an Arrow IPC file with one batch (docs/formats/records.md). How long each string is must be
known beforehand; the strings themselves come in order, some at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ochredb.types import Bools, Int64s

COLUMNS = ("id", "document", "uri", "metadata")
_TYPES = {
    "id": pa.large_string(),
    "document": pa.large_string(),
    "uri": pa.large_string(),
    "metadata": pa.large_binary(),
}


@dataclass(frozen=True, slots=True)
class ColumnPlan:
    """A column of n strings to come: lengths int64[n] in bytes; present bool[n], None = all.

    pieces: the joined bytes, in order; iterated once.
    """

    lengths: Int64s
    present: Bools | None
    pieces: Callable[[], Iterator[memoryview]]


def records_pieces(seqs: Int64s, columns: Sequence[ColumnPlan]) -> Iterator[memoryview]:
    """The bytes of the section `records` (docs/formats/records.md), a piece at a time.

    columns: id, document, uri, metadata. Cost in memory: 8 bytes per string and one piece.
    """
    count = len(seqs)
    arrays: list[pa.Array] = [pa.array(seqs)]
    waiting: dict[int, ColumnPlan] = {}
    for name, column in zip(COLUMNS, columns, strict=True):
        offsets = np.zeros(count + 1, np.int64)
        np.cumsum(column.lengths, out=offsets[1:])
        absent, validity = 0, None
        if column.present is not None:
            absent = count - int(np.count_nonzero(column.present))
            validity = pa.py_buffer(np.packbits(column.present, bitorder="little"))
        # Only its address and size matter: it is never touched, so it takes no memory.
        data = pa.py_buffer(np.empty(max(1, int(offsets[-1])), np.uint8))
        if offsets[-1]:
            data = data.slice(0, int(offsets[-1]))
            waiting[data.address] = column
        buffers = [validity, pa.py_buffer(offsets), data]
        arrays.append(pa.Array.from_buffers(_TYPES[name], count, buffers, absent))
    batch = pa.record_batch(arrays, names=["seq", *COLUMNS])
    recipe: list[memoryview | ColumnPlan] = []
    sink = pa.PythonFile(_Recipe(recipe, waiting), mode="w")
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    assert sum(isinstance(item, ColumnPlan) for item in recipe) == len(waiting)
    for item in recipe:
        if isinstance(item, memoryview):
            yield item
            continue
        size = 0
        for piece in item.pieces():
            size += piece.nbytes
            yield piece
        assert size == int(item.lengths.sum()), "a column has other bytes than were announced"


class _Recipe:
    """A file that keeps what is written to it, and instead of announced buffers their columns."""

    closed = False

    def __init__(
        self, recipe: list[memoryview | ColumnPlan], waiting: dict[int, ColumnPlan]
    ) -> None:
        self._recipe, self._waiting = recipe, waiting
        self._size = 0

    def write(self, data: Any) -> int:
        """data: bytes, or one of the batch's own buffers, not copied."""
        column = None
        if isinstance(data, pa.Buffer):
            column = self._waiting.get(data.address)
        view = memoryview(data)
        self._recipe.append(view.cast("B") if column is None else column)
        self._size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False
