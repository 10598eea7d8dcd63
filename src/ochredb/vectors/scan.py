"""Exact nearest neighbours by scanning: BLAS proposes, the exact function decides."""

from __future__ import annotations

import numpy as np

from ochredb.segment import Rows, Segment
from ochredb.types import Float32s
from ochredb.vectors.distance import NORM2_MAX, NORM2_MIN, Space, estimate, exact

# Above this share of matching rows, one product over everything is cheaper than gathering them.
_GATHER_SHARE_MAX = 0.3
_BLOCK_BYTES = 32 << 20  # Of gathered vectors at a time: bounds memory and the time between checks.


def nearest(
    space: Space, query: Float32s, segment: Segment, rows: Rows | None, count: int
) -> tuple[Rows, Float32s]:
    """The `count` rows nearest to `query`, by (distance, seq), with their exact distances.

    rows: int64[m], the rows that may answer, ascending; None means all.
    A superset of the true answer is chosen by estimates within their error bound, so the result is
    exact whatever the estimates were.
    """
    total = len(segment)
    everything = rows is None
    candidates = total if rows is None else len(rows)
    if candidates == 0 or count == 0:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    vectors, norms = segment.vectors, segment.squared_norms
    if candidates <= count + 16:
        chosen = np.arange(total) if rows is None else rows
        return finish(space, query, segment, chosen, count)
    query_norm2 = float(np.dot(query.astype(np.float64), query.astype(np.float64)))
    if not NORM2_MIN < query_norm2 < NORM2_MAX or not float(norms.max()) < NORM2_MAX:
        return _by_exact(space, query, segment, rows, count)
    if everything or candidates > _GATHER_SHARE_MAX * total:
        distances, bounds = estimate(space, query, vectors, norms)
        if rows is not None:
            distances = distances[rows]
            bounds = bounds[rows] if isinstance(bounds, np.ndarray) else bounds
    else:
        assert rows is not None
        distances, bounds = estimate(space, query, vectors[rows], norms[rows])
    picked = within_bounds(distances, bounds, count)
    return finish(space, query, segment, picked if rows is None else rows[picked], count)


def within_bounds(distances: Float32s, bounds: Float32s | float, count: int) -> Rows:
    """Positions that may be among the `count` smallest true distances, ascending."""
    nearest_ones = np.argpartition(distances, count - 1)[:count]
    if isinstance(bounds, np.ndarray):
        # Any `count` rows bound the count-th true distance from above by their largest upper end.
        limit = (distances[nearest_ones] + bounds[nearest_ones]).max()
        return np.flatnonzero(distances - bounds <= limit)
    limit = distances[nearest_ones].max() + 2 * bounds
    return np.flatnonzero(distances <= limit)


def finish(
    space: Space, query: Float32s, segment: Segment, rows: Rows, count: int
) -> tuple[Rows, Float32s]:
    """Recompute, sort by (distance, seq), cut."""
    distances = exact(space, query, segment.vectors[rows])
    order = np.lexsort((segment.seqs[rows], distances))[:count]
    return rows[order], distances[order]


def _by_exact(
    space: Space, query: Float32s, segment: Segment, rows: Rows | None, count: int
) -> tuple[Rows, Float32s]:
    """For vectors so long that float32 estimates overflow: exact distances, block by block."""
    chosen = np.arange(len(segment)) if rows is None else rows
    step = max(1, _BLOCK_BYTES // (8 * max(1, query.shape[0])))
    parts = [
        finish(space, query, segment, chosen[start : start + step], count)
        for start in range(0, len(chosen), step)
    ]
    rows_kept = np.concatenate([part[0] for part in parts])
    distances = np.concatenate([part[1] for part in parts])
    order = np.lexsort((segment.seqs[rows_kept], distances))[:count]
    return rows_kept[order], distances[order]
