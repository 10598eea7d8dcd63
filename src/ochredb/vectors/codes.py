"""Vectors in 8 bits: a quarter of the bytes, products of integers, and a bound on what they miss.

A scan is as fast as memory is read, and most of what it reads only tells that a row is too far.
Codes tell that from a quarter of the bytes: a row x is nearly s * c, its scale times a vector of
small integers, so a product of integers gives x·q but for at most

    |q| * |x - s·c|  +  |q - q'| * |s·c|       (Cauchy and Schwarz; q' is the query in 8 bits)

and the first factor of each is known. The scan keeps what may be near enough under that bound and
computes it exactly, as it does with estimates in float32: what is found does not depend on codes
(docs/decisions/0060-scans-read-codes-of-8-bits.md). Products are numkong's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numkong
import numpy as np
from numpy.typing import NDArray

from ochredb.types import Float32s
from ochredb.vectors.distance import NORM2_MAX, NORM2_MIN, Space, rounding

# Less is scanned as it is, in no more time: 8,192 rows of 128 components.
COMPONENTS_MIN = 1_000_000
BLOCK_ROWS = 16_384  # Of one product: what it gives for a query is looked at in the cache.
_BUILD_ROWS = 4_096  # Coded at a time.
_CODE_MAX = np.float32(127.0)
# What the query's own rounding is taken to be, relative to its norm: 0.6 to 0.8 % where components
# are alike. If it is more, all errors count as many times more.
_QUERY_ERROR = np.float32(0.01)
_SCALE_MIN = np.float32(1e-30)  # Below it all codes are 0: a row is all error.
# Of the rows, and for each result: how many pairs a scan may have kept for nothing. Of what keeps
# more, codes tell too little.
_FAR_SHARE_MAX, _FAR_PER_RESULT = 0.05, 8
_SCANS_MIN = 2  # Of all rows, before they are coded: that takes as long as several.


class CodedQueries:
    """Queries in 8 bits, for the codes of any segment.

    codes: int8[q, d]. scales: float32[q, 1], what a product of codes is multiplied with. weights:
    float32[q, 2], bases, bounds: float32[q, 1], see `Codes.lowers`.
    """

    __slots__ = ("bases", "bounds", "codes", "scales", "weights")

    def __init__(self, space: Space, queries: Float32s) -> None:
        """float32[q, d], each usual: neither zero nor huge. Cost: 15 µs."""
        wide = queries.astype(np.float64)
        steps = np.abs(queries).max(axis=1, keepdims=True) / _CODE_MAX
        rounded = np.rint(wide / steps)  # -127 to 127: a step is too short by 2^-24 at most.
        self.codes = rounded.astype(np.int8, order="C")
        norms2 = np.einsum("ij,ij->i", wide, wide)[:, np.newaxis]
        rounded *= steps
        rounded -= wide
        own2 = np.einsum("ij,ij->i", rounded, rounded)[:, np.newaxis]
        # All errors count for more if the query's own is larger than they allow for.
        weights = np.sqrt(np.maximum(own2 / float(_QUERY_ERROR) ** 2, norms2)) * 1.000_001
        factor = float(rounding(queries.shape[1]))
        if space == "cosine":
            norms = np.sqrt(norms2)
            steps, weights = steps / norms, weights / norms
            bases, bounds = np.ones_like(norms2), np.full_like(norms2, 4.0 * factor)
        elif space == "ip":
            bases, bounds = np.ones_like(norms2), (norms2 + 1.0) * factor
        else:
            steps, bases, bounds = 2.0 * steps, norms2, norms2 * factor
        self.scales = (-steps).astype(np.float32)
        self.bases = bases.astype(np.float32)
        self.weights = np.hstack((weights, np.ones_like(weights))).astype(np.float32)
        self.bounds = (bounds + NORM2_MIN).astype(np.float32)


class Codes:
    """The codes of float32[n, d] vectors for one space; immutable but for `is_poor`.

    errors: float32[2, n], of each row: for a query of weight 1, and for any. is_poor: a scan kept
    many rows, which differ by less than 8 bits tell. size_bytes: of memory.
    """

    __slots__ = (
        "_block_rows", "_blocks", "_factors", "_terms", "errors", "is_poor", "size_bytes", "space",
    )  # fmt: skip

    def __init__(self, space: Space, vectors: Float32s, squared_norms: Float32s) -> None:
        """squared_norms: float32[n], each below NORM2_MAX.

        Cost: 0.3 µs for each row of 128 components, 1.2 for one of 768.
        """
        rows, dimension = vectors.shape
        self.space: Space = space
        scales, errors = np.empty(rows, np.float32), np.empty(rows, np.float32)
        self._blocks, self._block_rows = [], BLOCK_ROWS
        codes = np.empty((min(BLOCK_ROWS, rows), dimension), np.int8)
        for first in range(0, rows, BLOCK_ROWS):
            stop = min(first + BLOCK_ROWS, rows)
            for start in range(first, stop, _BUILD_ROWS):
                part = slice(start, min(start + _BUILD_ROWS, stop))
                own = codes[start - first : part.stop - first]
                scales[part], errors[part] = _code(vectors[part], own)
            self._blocks.append(numkong.dots_pack(codes[: stop - first]))
        norms = np.sqrt(squared_norms)
        errors += norms * rounding(dimension)  # What rounding may have hidden of them.
        errors += (norms + errors) * _QUERY_ERROR
        # float32[4, n], of which sums are made: |x|^2 for l2, the errors, 1.
        self._terms = np.zeros((4, rows), np.float32)
        self._terms[3] = 1.0
        self.is_poor = False
        if space == "cosine":
            short = squared_norms < np.float32(NORM2_MIN)
            with np.errstate(divide="ignore"):
                inverse = np.float32(1.0) / norms
            inverse[short] = 0.0
            scales *= inverse
            errors *= inverse
            errors[short] = 4.0  # Their norms lost bits: always candidates.
        else:
            if space == "l2":
                errors *= np.float32(2.0)
                self._terms[0] = squared_norms
            self._terms[2] = squared_norms * rounding(dimension)  # What sums are rounded by.
        self._terms[1] = errors
        self._factors, self.errors = scales, self._terms[1:3]
        self.size_bytes = 20 * rows + sum(block.nbytes for block in self._blocks)

    def are_many(self, pairs: int, queries: int, count: int) -> bool:
        """Whether a scan for `count` results each kept unusually many pairs (query, row)."""
        usual = int(_FAR_SHARE_MAX * len(self.errors[0])) + _FAR_PER_RESULT * count
        return pairs > queries * usual

    def lowers(self, asked: CodedQueries) -> Iterator[tuple[int, Float32s]]:
        """For each block of rows its first and float32[q, m], what distances are not less than.

        For query i and row j: lower - bounds[i] <= the distance that `exact` computes
        <= lower + 2 * weights[i] @ errors[:, j] + bounds[i].
        """
        one = np.ones_like(asked.bases)
        coefficients = np.hstack((one, -asked.weights, asked.bases))
        for number, block in enumerate(self._blocks):
            start = number * self._block_rows
            part = slice(start, start + self._block_rows)
            dots = np.asarray(numkong.dots_packed(asked.codes, block))
            lower = np.multiply(dots, self._factors[part], dtype=np.float32, casting="unsafe")
            lower *= asked.scales
            lower += coefficients @ self._terms[:, part]
            yield start, lower


def _code(vectors: Float32s, codes: NDArray[np.int8]) -> tuple[Float32s, Float32s]:
    """Fill in int8[n, d]; the scale and the error of each row of float32[n, d]."""
    scales = np.abs(vectors).max(axis=1) / _CODE_MAX
    scales[scales < _SCALE_MIN] = 0.0
    inverse = np.divide(np.float32(1.0), scales, out=np.zeros_like(scales), where=scales > 0)
    near = vectors * inverse[:, np.newaxis]
    np.rint(near, out=near)
    np.clip(near, -_CODE_MAX, _CODE_MAX, out=near)
    codes[:] = near
    near *= scales[:, np.newaxis]
    near -= vectors
    return scales, np.sqrt(np.einsum("ij,ij->i", near, near))


class CodesOnUse:
    """The codes of a segment's vectors, or of those that a filter selects, made at the second scan.

    A scan that nobody repeats does not pay for them. They are given up if they turn out poor.
    Thread-safe.
    """

    __slots__ = ("_codes", "_is_useless", "_lock", "_scans")

    def __init__(self, *, is_useful: bool) -> None:
        """is_useful: whether there is enough to scan; see `is_enough`."""
        self._lock = threading.Lock()
        self._codes: Codes | None = None
        self._is_useless = not is_useful
        self._scans = 0

    @property
    def is_useful(self) -> bool:
        """Whether scans read codes, if they are repeated. Not of few rows, nor poor ones."""
        return not self._is_useless

    @property
    def is_settled(self) -> bool:
        """Whether the next scan will not stop to make them."""
        return self._codes is not None or self._is_useless

    @property
    def size_bytes(self) -> int:
        codes = self._codes
        return 0 if codes is None else codes.size_bytes

    def expect(self) -> None:
        """It will be scanned again and again: they are made at once when asked for."""
        self._scans = _SCANS_MIN

    def drop(self) -> None:
        """Free them, once the scans that use them end."""
        self._codes, self._scans = None, 0

    def find(
        self,
        space: Space,
        vectors: Callable[[], tuple[Float32s, Float32s]],
        has_room: Callable[[int], bool] = lambda _size_bytes: True,
        *,
        makes: bool = True,
    ) -> Codes | None:
        """The codes for a scan of all rows, or None: it reads the vectors.

        vectors: float32[n, d] and the squared norms float32[n]. has_room: whether there is memory
            for so many bytes. makes: whether they are made if it is time; others who ask meanwhile
            do not wait.
        """
        codes = self._codes
        if codes is not None and codes.space == space:
            if not codes.is_poor:
                return codes
            self._codes, self._is_useless = None, True
        if self._is_useless or not makes or not self._lock.acquire(blocking=False):
            return None
        try:
            return self._make(space, vectors, has_room)
        finally:
            self._lock.release()

    def _make(
        self,
        space: Space,
        vectors: Callable[[], tuple[Float32s, Float32s]],
        has_room: Callable[[int], bool],
    ) -> Codes | None:
        codes = self._codes
        if codes is not None and codes.space == space:
            return codes  # Made by another thread meanwhile.
        self._scans += 1
        if self._is_useless or self._scans < _SCANS_MIN:
            return None
        own, squared_norms = vectors()
        if not float(squared_norms.max()) < NORM2_MAX:
            self._is_useless = True
            return None
        if not has_room(memory_bytes(*own.shape)):
            return None
        codes = self._codes = Codes(space, own, squared_norms)
        return codes


def is_enough(rows: int, dimension: int) -> bool:
    """Whether a scan of so many vectors is faster by codes."""
    return rows * dimension >= COMPONENTS_MIN


def memory_bytes(rows: int, dimension: int) -> int:
    """What codes take at most, nearly: rows are padded to 64 bytes, some once more, and a norm."""
    return rows * (64 * (-(-dimension // 64) + 1) + 28)
