"""Distances: one exact function for the answer, one fast estimate for the selection.

An answer's distances and order must not depend on how rows are cut into parts (I5). So whatever
stage proposed a row, its distance is recomputed by `exact` from the stored vector, in float64, and
rounded once to float32; ties fall to the lower seq. The fast stage works in float32 (BLAS), and its
rounding error is bounded: |estimate - true| <= error_factor(d) * (|q|^2 + |x|^2).

The bound: a float32 dot product of length d errs by at most gamma_d * sum|q_i x_i|, where
gamma_d = d·u / (1 - d·u) and u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms,
section 3.1), and sum|q_i x_i| <= (|q|^2 + |x|^2) / 2. The squared norm of x errs by gamma_d·|x|^2,
and adding up by a few u. For l2 that makes 2·gamma_d/2 + gamma_d + a few u: 4·d·u covers it, and
8·d·u leaves a factor of two.
"""

from __future__ import annotations

import threading
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ochredb.types import Float32s

Space = Literal["l2", "cosine", "ip"]
_UNIT_ROUNDOFF = 2.0**-24
_GATHERED_COMPONENTS = 1 << 18  # 1 MiB.
# OpenBLAS multiplies matrices in place up to this many multiplications; fewer rows do not pay.
_SMALL_PRODUCT, _SMALL_ROWS_MIN = 1_000_000, 64
_local = threading.local()
# Above this, squares and their sums may overflow float32: estimates are useless.
NORM2_MAX = 1e36
# Below this, squared norms lose bits to underflow: the relative bound does not hold.
NORM2_MIN = 1e-30


def exact(space: Space, queries: Float32s, vectors: Float32s) -> Float32s:
    """The distance that answers carry: squared l2, 1 - cosine, or 1 - inner product.

    Args:
        queries: float32[n, d], or float32[d] for all vectors. vectors: float32[n, d].
    Returns: float32[n]; a zero vector has cosine distance 1. Each depends on its own row alone.
    Cost: about 0.4 ns per component plus 10 microseconds.
    """
    q = queries.astype(np.float64)
    if q.ndim == 1:
        q = q[np.newaxis]
    x = vectors.astype(np.float64)
    assert q.ndim == x.ndim == 2 and q.shape[1] == x.shape[1] and len(q) in (1, len(x))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if space == "l2":
            x -= q
            x *= x
            distances: Float32s = x.sum(axis=1).astype(np.float32)
            return distances
        dots = (x * q).sum(axis=1)
        if space == "ip":
            distances = (1.0 - dots).astype(np.float32)
            return distances
        x *= x
        q *= q
        norms = np.sqrt(x.sum(axis=1)) * np.sqrt(q.sum(axis=1))
        similarity = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
        distances = (1.0 - similarity).astype(np.float32)
        return distances


def products(
    queries: Float32s, vectors: Float32s, rows: NDArray[np.int64] | None = None
) -> Float32s:
    """The inner products of float32[q, d] with float32[n, d], or with its `rows`: float32[q, n].

    Cost: one product by BLAS. Rows are gathered in blocks that stay in the processor's cache, into
    memory that is used again and again: fresh pages would cost more than the product. Several
    queries are multiplied in blocks that BLAS takes as they are: it copies the vectors of large
    ones, which costs up to twice as much.
    """
    several = len(queries) > 1
    total = len(vectors) if rows is None else len(rows)
    if rows is None and not several:
        # One query: the matrix-vector product, which reads the vectors once and packs nothing.
        dots: Float32s = (vectors @ queries[0])[np.newaxis]
        return dots
    dimension = vectors.shape[1]
    step = max(1, _GATHERED_COMPONENTS // dimension)
    if several:
        few = _SMALL_PRODUCT // (len(queries) * dimension)
        step = min(step, few) if few >= _SMALL_ROWS_MIN else step
    if rows is not None:
        gathered = _scratch("gathered", step * dimension)
    if several:
        columns = np.ascontiguousarray(queries.T)
        product = _scratch("product", step * len(queries))
    dots = np.empty((len(queries), total), np.float32)
    for start in range(0, total, step):
        stop = min(start + step, total)
        if rows is None:
            block = vectors[start:stop]
        else:
            block = gathered[: (stop - start) * dimension].reshape(-1, dimension)
            # "raise" would buffer.
            np.take(vectors, rows[start:stop], axis=0, out=block, mode="clip")
        if several:
            out = product[: (stop - start) * len(queries)].reshape(-1, len(queries))
            np.dot(block, columns, out=out)
            dots[:, start:stop] = out.T
        else:
            np.dot(block, queries[0], out=dots[0, start:stop])
    return dots


def _scratch(name: str, components: int) -> Float32s:
    """float32[components] that this thread uses again and again."""
    scratch: Float32s | None = getattr(_local, name, None)
    if scratch is None or scratch.size < components:
        scratch = np.empty(components, np.float32)
        setattr(_local, name, scratch)
    return scratch


def rounding(dimension: int) -> np.float32:
    """What float32 may err by in a product of so many components, of |q|^2 + |x|^2; see above."""
    return np.float32(8.0 * (dimension + 4) * _UNIT_ROUNDOFF)


def estimate(
    space: Space, queries: Float32s, dots: Float32s, squared_norms: Float32s
) -> tuple[Float32s, Float32s, Float32s]:
    """Fast distances and a bound on the error of each.

    Args:
        queries: float32[q, d]. dots: float32[q, n], their `products`; overwritten.
        squared_norms: float32[n].
    Returns: float32[q, n] estimates in the same measure as `exact`, float32[n] or [1], and
        float32[q, 1] or [1, 1]: |estimate - exact| <= the sum of these two.
    """
    factor = rounding(queries.shape[1])
    query_norms2 = np.einsum("ij,ij->i", queries, queries)[:, np.newaxis]
    if space == "l2":
        # Exact distances are rounded to float32: half a unit of the result, within the bound.
        dots *= np.float32(-2.0)
        dots += squared_norms
        dots += query_norms2
        return dots, squared_norms * factor, query_norms2 * factor + np.float32(NORM2_MIN)
    if space == "ip":
        np.subtract(np.float32(1.0), dots, out=dots)
        return dots, squared_norms * factor, (query_norms2 + np.float32(1.0)) * factor
    # Of vectors so short that their norms lost bits nothing is known: always candidates.
    short = squared_norms < np.float32(NORM2_MIN)
    bounds = np.zeros(1, np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.float32(1.0) / np.sqrt(squared_norms)
    if short.any():
        inverse[short] = 0.0
        bounds = np.where(short, np.float32(4.0), bounds)
    dots *= inverse
    dots *= np.float32(-1.0) / np.sqrt(query_norms2)
    dots += np.float32(1.0)
    return dots, bounds, np.full((1, 1), factor * np.float32(4.0), np.float32)
