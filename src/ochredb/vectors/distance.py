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

from typing import Literal

import numpy as np

from ochredb.types import Float32s

Space = Literal["l2", "cosine", "ip"]
_UNIT_ROUNDOFF = 2.0**-24
# Above this, squares and their sums may overflow float32: estimates are useless.
NORM2_MAX = 1e36
# Below this, squared norms lose bits to underflow: the relative bound does not hold.
NORM2_MIN = 1e-30


def exact(space: Space, query: Float32s, vectors: Float32s) -> Float32s:
    """The distance that answers carry: squared l2, 1 - cosine, or 1 - inner product.

    Args:
        query: float32[d]. vectors: float32[n, d].
    Returns: float32[n]; a zero vector has cosine distance 1.
    Cost: about 0.4 ns per component plus 10 microseconds.
    """
    assert query.ndim == 1 and vectors.ndim == 2 and vectors.shape[1] == query.shape[0]
    q = query.astype(np.float64)
    x = vectors.astype(np.float64)
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
        norms = np.sqrt(x.sum(axis=1)) * np.sqrt((q * q).sum())
        similarity = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
        distances = (1.0 - similarity).astype(np.float32)
        return distances


def estimate(
    space: Space, query: Float32s, vectors: Float32s, squared_norms: Float32s
) -> tuple[Float32s, Float32s | float]:
    """Fast distances and a bound on the error of each.

    Args:
        query: float32[d]. vectors: float32[n, d], C-contiguous. squared_norms: float32[n].
    Returns: float32[n] estimates in the same measure as `exact`, and float32[n] (or one number)
        such that |estimate - exact| <= bound.
    Cost: one pass over `vectors` by BLAS.
    """
    dimension = query.shape[0]
    factor = np.float32(8.0 * (dimension + 4) * _UNIT_ROUNDOFF)
    dots = vectors @ query
    query_norm2 = np.float32(np.dot(query, query))
    if space == "l2":
        # Exact distances are rounded to float32: half a unit of the result, within the bound.
        sums = squared_norms + query_norm2
        dots *= np.float32(-2.0)
        dots += sums
        sums *= factor
        sums += np.float32(NORM2_MIN)
        return dots, sums
    if space == "ip":
        np.subtract(np.float32(1.0), dots, out=dots)
        sums = squared_norms + query_norm2
        sums += np.float32(1.0)
        sums *= factor
        return dots, sums
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.sqrt(squared_norms)
        scale *= np.sqrt(query_norm2)
        similarity = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)
    np.subtract(np.float32(1.0), similarity, out=similarity)
    if float(squared_norms.min(initial=1.0)) >= NORM2_MIN:
        return similarity, float(factor) * 4.0
    bounds = np.full(len(similarity), factor * np.float32(4.0))
    bounds[squared_norms < NORM2_MIN] = 4.0  # The whole range: always a candidate.
    return similarity, bounds
