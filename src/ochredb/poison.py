"""Poison: operations in the log that deterministically cannot be folded (decision 0024).

Append refuses what could never be folded, so there is none unless a release had a bug. If there
is, it must not stop its collection: whoever reads the log skips it by the rule of
`fragment.operations_of`, which depends on an operation's own bytes and the collection's dimension
only, and the compaction that passes it records it in quarantine. Everything else that goes wrong
(memory, disk, a bug in folding or in an index) is an error and never makes an operation poison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa

from ochredb.fragment import Unfoldable, encode_batch, open_batch, operations_of
from ochredb.types import Op, Operations

Admitted = list[tuple[int, Operations]]
"""(First offset, operations) of consecutive runs; poison is a run of no-ops."""


@dataclass(frozen=True, slots=True)
class Poison:
    """Operations start..stop (offsets, both included) that are skipped.

    data: a fragment of these alone; of a request that cannot be taken apart, all of its bytes.
    """

    start: int
    stop: int
    reason: str
    data: bytes


def admitted(
    start: int,
    stop: int,
    data: bytes,
    dimension: int | None,
    found: Callable[[Poison], None],
) -> Admitted:
    """The operations of a fragment that covers offsets start..stop; `found` is told of poison.

    data: bytes that passed their checksum. dimension: the collection's, None before the first
    embedding. Raises NewerFormat. Cost: as decoding; with poison, up to log2(n) times as much.
    """
    try:
        op, batch = open_batch(data)
        if batch.num_rows != stop - start + 1:
            raise Unfoldable(f"{batch.num_rows} operations have {stop - start + 1} offsets")
    except Unfoldable as error:
        found(Poison(start, stop, str(error), bytes(data)))
        return [(start, noops(stop - start + 1))]
    try:
        return [(start, _judged(op, batch, dimension))]
    except Unfoldable:
        pass
    runs: Admitted = []
    verdicts = _verdicts(op, batch, dimension, 0, batch.num_rows)
    for reason, group in groupby(verdicts, key=lambda item: item[2]):
        pieces = list(group)
        first, end = pieces[0][0], pieces[-1][1]
        rows = batch.slice(first, end - first)
        if reason is None:
            runs.append((start + first, _judged(op, rows, dimension)))
        else:
            found(Poison(start + first, start + end - 1, reason, encode_batch(op, rows)))
            runs.append((start + first, noops(end - first)))
    return runs


def noops(count: int) -> Operations:
    """Operations that only keep their offsets."""
    return Operations(op=Op.NOOP, ids=[""] * count)


def _judged(op: Op, batch: pa.RecordBatch, dimension: int | None) -> Operations:
    """Raises Unfoldable if one of these operations is poison."""
    operations = operations_of(op, batch)
    if operations.dimension not in (None, dimension):
        raise Unfoldable(
            f"an embedding has dimension {operations.dimension}, its collection {dimension}"
        )
    return operations


def _verdicts(
    op: Op, batch: pa.RecordBatch, dimension: int | None, first: int, end: int
) -> Iterator[tuple[int, int, str | None]]:
    """Bisect rows [first, end): consecutive (first, end, reason), None where all can be folded."""
    try:
        _judged(op, batch.slice(first, end - first), dimension)
    except Unfoldable as error:
        if end - first == 1:
            yield first, end, str(error)
            return
        middle = (first + end) // 2
        yield from _verdicts(op, batch, dimension, first, middle)
        yield from _verdicts(op, batch, dimension, middle, end)
    else:
        yield first, end, None
