"""Live rows of tails and of parts as the columns of a new part, ascending by seq."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ochredb.materialise import TailSegment
from ochredb.parts.reader import Part
from ochredb.parts.writer import PartRows
from ochredb.segment import Rows

_STEP_ROWS = 2_000  # Converted per call: no call holds the interpreter longer than a millisecond.
_COLUMNS = ("id", "document", "uri", "metadata")


def rows_of_tail(chunks: Sequence[tuple[TailSegment, Rows]]) -> PartRows:
    """The tail's live rows. Cost: about a microsecond per row, in short steps."""
    seqs = np.concatenate([segment.seqs[rows] for segment, rows in chunks])
    order = np.argsort(seqs, kind="stable")
    vectors = np.concatenate([segment.vectors[rows] for segment, rows in chunks])
    columns: dict[str, list[pa.Array]] = {name: [] for name in _COLUMNS}
    for segment, rows in chunks:
        for start in range(0, len(rows), _STEP_ROWS):
            step = rows[start : start + _STEP_ROWS]
            columns["id"].append(pa.array(segment.take_ids(step), pa.large_string()))
            columns["document"].append(pa.array(segment.take_documents(step), pa.large_string()))
            columns["uri"].append(pa.array(segment.take_uris(step), pa.large_string()))
            columns["metadata"].append(pa.array(segment.take_metadatas(step), pa.large_binary()))
    return _ordered(seqs, vectors, columns, order)


def rows_of_parts(
    inputs: Sequence[tuple[Part, Rows]], step: Callable[[], None]
) -> tuple[PartRows, list[NDArray[np.int64]]]:
    """The given rows of several parts, and for each part int64[rows]: its output rows, or -1."""
    seqs = np.concatenate([part.seqs[rows] for part, rows in inputs])
    order = np.argsort(seqs, kind="stable")
    vectors = np.concatenate([part.vectors[rows] for part, rows in inputs])
    step()
    columns: dict[str, list[pa.Array]] = {name: [] for name in _COLUMNS}
    for part, rows in inputs:
        whole = len(rows) == len(part)
        for name in _COLUMNS:
            column = part.record_batch.column(name)
            columns[name].append(column if whole else column.take(pa.array(rows)))
            step()
    output = np.empty(len(order), np.int64)
    output[order] = np.arange(len(order))
    maps, start = [], 0
    for part, rows in inputs:
        mapping = np.full(len(part), -1, np.int64)
        mapping[rows] = output[start : start + len(rows)]
        maps.append(mapping)
        start += len(rows)
    return _ordered(seqs, vectors, columns, order), maps


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
