"""Exact nearest neighbours by scanning: BLAS proposes, the exact function decides.

Several query vectors are scanned as one matrix product, in blocks that bound memory. Candidates of
all of them are pairs (owner, row): `owner` is the number of the query that the row may answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ochredb.segment import Rows, Segment
from ochredb.types import Float32s, Int64s
from ochredb.vectors.distance import NORM2_MAX, NORM2_MIN, Space, estimate, exact, products

# Above this share of matching rows, one product over everything is cheaper than gathering them.
_GATHER_SHARE_MAX = 0.3
_BLOCK_BYTES = 32 << 20  # Of estimates, or of exact vectors: bounds memory and time per step.


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows of one segment with their exact distances, for several queries.

    owners, rows: int64[m]. distances: float32[m]. seqs: int64[m].
    """

    owners: Int64s
    rows: Rows
    distances: Float32s
    seqs: Int64s


@dataclass(frozen=True, slots=True)
class Estimates:
    """Estimated distances of a segment's candidate rows, and how far each may be off.

    rows: int64[m], None = every row. distances: float32[q, m]. bounds: broadcasts to it.
    """

    rows: Rows | None
    distances: Float32s
    bounds: Float32s

    def within(self, limits: Float32s) -> tuple[Int64s, Rows]:
        """Pairs (owner, row) whose true distance may be at most the owner's of `limits`[q]."""
        near = self.distances - self.bounds <= limits[:, np.newaxis]
        if len(near) == 1:
            picked = np.flatnonzero(near[0])
            owners = np.zeros(len(picked), np.int64)
        else:
            owners, picked = np.nonzero(near)
        return owners, picked if self.rows is None else self.rows[picked]


def queries_per_block(rows: int) -> int:
    """How many queries to estimate against `rows` rows at a time."""
    return max(1, _BLOCK_BYTES // (4 * max(1, rows)))


def are_usual(queries: Float32s) -> bool:
    """Whether float32 holds the squares of all of float32[q, d]: finite, not zero, not huge."""
    wide = queries.astype(np.float64)
    norms2 = np.einsum("ij,ij->i", wide, wide)
    return float(norms2.min()) > NORM2_MIN and float(norms2.max()) < NORM2_MAX


def estimates(space: Space, queries: Float32s, segment: Segment, rows: Rows | None) -> Estimates:
    """Estimates of float32[q, d] for `rows` (int64[m] ascending, None = all): one BLAS product.

    Where float32 would overflow or underflow, the exact distances themselves.
    """
    vectors, norms = segment.vectors, segment.squared_norms
    if not are_usual(queries) or not float(norms.max()) < NORM2_MAX:
        found = [_all_exact(space, query, vectors, rows) for query in queries]
        return Estimates(rows, np.stack(found), np.zeros((1, 1), np.float32))
    if rows is None or len(rows) > _GATHER_SHARE_MAX * len(segment):
        distances, bounds = estimate(space, queries, products(queries, vectors), norms)
        if rows is None:
            return Estimates(None, distances, bounds)
    else:
        dots = products(queries, vectors, rows)
        return Estimates(rows, *estimate(space, queries, dots, norms[rows]))
    return Estimates(rows, distances[:, rows], bounds[:, rows] if bounds.shape[1] > 1 else bounds)


def limits_of(found: Sequence[Estimates], count: int) -> Float32s:
    """float32[q]: distances that at least `count` of these rows do not exceed.

    No farther row can answer. Infinite if there are no more than `count` rows.
    """
    queries = len(found[0].distances)
    if sum(item.distances.shape[1] for item in found) <= count:
        return np.full(queries, np.inf, np.float32)
    if len(found) == 1:
        distances, bounds = found[0].distances, found[0].bounds
        nearest = np.argpartition(distances, count - 1, axis=1)[:, :count]
        upper = np.take_along_axis(distances, nearest, axis=1)
        if bounds.shape == distances.shape:
            upper += np.take_along_axis(bounds, nearest, axis=1)
        elif bounds.shape[1] > 1:
            upper += bounds[0][nearest]
        else:
            upper += bounds
        # Any `count` rows bound the count-th true distance by their largest upper end.
        limits: Float32s = upper.max(axis=1)
        return limits
    uppers = np.concatenate([item.distances + item.bounds for item in found], axis=1)
    limits = np.partition(uppers, count - 1, axis=1)[:, count - 1]
    return limits


def exactly(
    space: Space, queries: Float32s, segment: Segment, owners: Int64s, rows: Rows
) -> Candidates:
    """The exact distances of pairs (owner, row): `owners` are numbers of `queries`[q, d]."""
    step = max(1, _BLOCK_BYTES // (8 * queries.shape[1]))
    distances = [
        exact(
            space,
            queries[0] if len(queries) == 1 else queries[owners[start : start + step]],
            segment.vectors[rows[start : start + step]],
        )
        for start in range(0, max(1, len(rows)), step)
    ]
    joined = distances[0] if len(distances) == 1 else np.concatenate(distances)
    return Candidates(owners, rows, joined, segment.seqs[rows])


def _all_exact(space: Space, query: Float32s, vectors: Float32s, rows: Rows | None) -> Float32s:
    """Exact distances, block by block: for vectors whose squares float32 cannot hold."""
    total = len(vectors) if rows is None else len(rows)
    step = max(1, _BLOCK_BYTES // (8 * max(1, query.shape[0])))
    blocks = [np.empty(0, np.float32)]
    for start in range(0, total, step):
        block = slice(start, start + step)
        blocks.append(exact(space, query, vectors[block if rows is None else rows[block]]))
    return np.concatenate(blocks)
