"""Exact nearest neighbours by scanning: BLAS proposes, the exact function decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ochredb.segment import Rows, Segment
from ochredb.types import Float32s
from ochredb.vectors.distance import NORM2_MAX, NORM2_MIN, Space, estimate, exact

# Above this share of matching rows, one product over everything is cheaper than gathering them.
_GATHER_SHARE_MAX = 0.3
_BLOCK_BYTES = 32 << 20  # Of gathered vectors at a time: bounds memory and the time between checks.


@dataclass(frozen=True, slots=True)
class Estimates:
    """Estimated distances of a segment's candidate rows, and how far each may be off.

    rows: int64[m], None = every row. distances: float32[m]. bounds: float32[m] or one number.
    """

    rows: Rows | None
    distances: Float32s
    bounds: Float32s | float

    def within(self, limit: float) -> Rows:
        """Rows whose true distance may be at most `limit`."""
        picked = np.flatnonzero(self.distances - self.bounds <= limit)
        return picked if self.rows is None else self.rows[picked]


def estimates(space: Space, query: Float32s, segment: Segment, rows: Rows | None) -> Estimates:
    """Estimates for `rows` (int64[m] ascending, None = all): one pass by BLAS.

    Where float32 would overflow or underflow, the exact distances themselves.
    """
    vectors, norms = segment.vectors, segment.squared_norms
    query_norm2 = float(np.dot(query.astype(np.float64), query.astype(np.float64)))
    if not NORM2_MIN < query_norm2 < NORM2_MAX or not float(norms.max()) < NORM2_MAX:
        return Estimates(rows, _all_exact(space, query, vectors, rows), 0.0)
    if rows is None:
        return Estimates(None, *estimate(space, query, vectors, norms))
    if len(rows) <= _GATHER_SHARE_MAX * len(segment):
        return Estimates(rows, *estimate(space, query, vectors[rows], norms[rows]))
    distances, bounds = estimate(space, query, vectors, norms)
    return Estimates(
        rows, distances[rows], bounds[rows] if isinstance(bounds, np.ndarray) else bounds
    )


def limit_of(found: Sequence[Estimates], count: int) -> float:
    """A distance that at least `count` of these rows do not exceed: no farther row can answer.

    Infinite if there are no more than `count` rows.
    """
    if sum(len(item.distances) for item in found) <= count:
        return float("inf")
    if len(found) == 1:
        distances, bounds = found[0].distances, found[0].bounds
        nearest_ones = np.argpartition(distances, count - 1)[:count]
        chosen = bounds[nearest_ones] if isinstance(bounds, np.ndarray) else bounds
        # Any `count` rows bound the count-th true distance by their largest upper end.
        return float((distances[nearest_ones] + chosen).max())
    upper = np.concatenate([item.distances + item.bounds for item in found])
    return float(np.partition(upper, count - 1)[count - 1])


def nearest(
    space: Space, query: Float32s, segment: Segment, rows: Rows | None, count: int
) -> tuple[Rows, Float32s]:
    """The `count` rows nearest to `query`, by (distance, seq), with their exact distances.

    A superset of the true answer is chosen by estimates within their error bound, so the result is
    exact whatever the estimates were.
    """
    if count == 0 or (len(segment) if rows is None else len(rows)) == 0:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    found = estimates(space, query, segment, rows)
    return finish(space, query, segment, found.within(limit_of([found], count)), count)


def finish(
    space: Space, query: Float32s, segment: Segment, rows: Rows, count: int
) -> tuple[Rows, Float32s]:
    """Recompute, sort by (distance, seq), cut."""
    distances = exact(space, query, segment.vectors[rows])
    order = np.lexsort((segment.seqs[rows], distances))[:count]
    return rows[order], distances[order]


def _all_exact(space: Space, query: Float32s, vectors: Float32s, rows: Rows | None) -> Float32s:
    """Exact distances, block by block: for vectors whose squares float32 cannot hold."""
    total = len(vectors) if rows is None else len(rows)
    step = max(1, _BLOCK_BYTES // (8 * max(1, query.shape[0])))
    blocks = [np.empty(0, np.float32)]
    for start in range(0, total, step):
        block = slice(start, start + step)
        blocks.append(exact(space, query, vectors[block if rows is None else rows[block]]))
    return np.concatenate(blocks)
