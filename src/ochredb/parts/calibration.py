"""How long a graph's candidate list (ef) must be for a wanted recall: measured on the graph itself.

How hard a collection is depends on its vectors: ef 100 finds 99 % of the neighbours in one and 84 %
in another. So a graph is asked for the neighbours of sampled queries at rising ef, and its answers
are compared with exact ones. The outcome is a curve of (ef, recall at 10), kept in the manifest.

Two kinds of queries are made from the rows themselves: stored vectors, each without itself, and
midpoints between a stored vector and a near neighbour, slightly perturbed. The lower of the two
recalls counts: a stored vector is a node of the graph, which makes its neighbours easy to find.

A found row is right if it is as near as the exact tenth, so ties are never mistakes. A query that
was answered in full is not asked again at a greater ef: with rare exceptions it would be again.
Beyond ef 400 every other query that is left stands for two: these are few, and dear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ochredb.types import Float32s, Int64s

Space = Literal["l2", "cosine", "ip"]
Curve = tuple[tuple[int, float], ...]

NEAREST = 10
QUERIES_OF_A_KIND = 200
QUERIES_OF_A_KIND_MEANWHILE = 100  # For a graph that is still being grown.
LADDER = (50, 100, 150, 200, 300, 400, 600, 800, 1_200, 1_600, 2_400, 3_200)
RECALL_ENOUGH = 0.995
RECALL_ENOUGH_MEANWHILE = 0.96
_ALL_ASKED_EF_MAX = 400
_MISSES_AIMED = 0.9  # Of those that a target allows.
# A graph is calibrated again when it has grown by these factors: while more is coming, and when
# writes pause. Recall falls slowly with size: by 0.02 at most from one size to its double.
_GROWTH_MIN = 2.0
_GROWTH_MIN_SETTLED = 1.5
# The noise on a midpoint, as a share of the distance of the two: with it the exact tenth is as far
# from midpoints as it is from stored vectors (measured on clustered data, 5k to 100k x 128: between
# 0.4 and 0.62). Without any, midpoints lie closer to their ends than queries do, and are easy.
_NOISE_SHARE = 0.5
_BLOCK_COMPONENTS = 1 << 18  # Of rows per product with the queries: 3 to 10 ms.
_SEARCHES = 16  # Per call to the graph: 1 to 20 ms.
_CANDIDATES = 2 * NEAREST  # Nearest in float32, of which the exact tenth is found in float64.
_ROUNDING = 4e-6  # hnswlib's distances are float32 sums of float32 products.


class Index(Protocol):
    """The part of hnswlib.Index that is measured."""

    def set_ef(self, ef: int) -> None: ...

    def knn_query(
        self, data: Float32s, k: int = 1, num_threads: int = -1
    ) -> tuple[NDArray[np.uint64], Float32s]: ...


def calibrate(
    index: Index,
    vectors: Float32s,
    rows: NDArray[np.int32] | None,
    space: Space,
    *,
    seed: int,
    threads: int,
    step: Callable[[], None],
    queries_of_a_kind: int = QUERIES_OF_A_KIND,
    recall_enough: float = RECALL_ENOUGH,
) -> Curve:
    """Measure `index` at the ef of LADDER until its recall is enough; empty if it cannot be.

    vectors: float32[n, d], the living rows. rows: int32[labels], the row of each label of the
        index, -1 = dead; None: labels are rows. seed: of the choice of queries and of the noise.
    step: called between pieces of at most some 20 ms; it may raise to give up.
    Cost: one product of the queries with all rows, and searches until answers are complete; 0.1 s
        for 20k x 128, 1.3 s for 100k x 128 hard ones. Memory: a few MB.
    """
    if len(vectors) <= NEAREST:
        return ()  # There are no ten neighbours to find.
    searcher = _Searcher(index, rows, len(vectors), threads, step)
    rng = np.random.Generator(np.random.PCG64(seed))  # noqa: TID251 - built from a seed
    queries, own_rows, kinds = _queries(searcher, vectors, rng, queries_of_a_kind)
    limits = _tenth_distances(space, queries, own_rows, vectors, step)
    known = np.isfinite(limits)  # Not so where float32 cannot hold the squares.
    queries, own_rows, kinds, limits = queries[known], own_rows[known], kinds[known], limits[known]
    weights = np.ones(len(queries))
    if not all((kinds == kind).any() for kind in (0, 1)):
        return ()
    hits = np.zeros(len(queries), np.int64)

    def recall_of(kind: int) -> float:
        return float(np.average(hits[kinds == kind], weights=weights[kinds == kind])) / NEAREST

    curve: list[tuple[int, float]] = []
    for ef in LADDER:
        recall = 1.0
        # The worse kind first: the other one need not be asked if it was better already.
        for kind in sorted((0, 1), key=recall_of):
            if recall_of(kind) >= recall:
                continue
            left = np.flatnonzero((kinds == kind) & (hits < NEAREST) & (weights > 0))
            if ef > _ALL_ASKED_EF_MAX and (weights[left] == 1.0).all() and len(left) > 1:
                weights[left[1::2]] = 0.0
                weights[left[::2]] = len(left) / len(left[::2])
                left = left[::2]
            found = searcher.hits(queries[left], own_rows[left], limits[left], ef)
            hits[left] = np.maximum(hits[left], found)
            recall = min(recall, recall_of(kind))
        recall = max(round(recall, 4), curve[-1][1] if curve else 0.0)
        curve.append((ef, recall))
        if recall >= recall_enough or ef >= len(vectors):
            break
    return tuple(curve)


@dataclass(frozen=True, slots=True)
class Calibration:
    """A curve and what it was measured on; empty if nothing is known.

    labels: of the graph. queries: of each kind.
    """

    curve: Curve = ()
    labels: int = 0
    queries: int = 0


def calibration_of(
    index: Index,
    vectors: Float32s,
    rows: NDArray[np.int32] | None,
    space: Space,
    *,
    before: Calibration,
    settles: bool,
    seed: int,
    threads: int,
    step: Callable[[], None],
) -> Calibration:
    """Calibrate a graph anew if it is worth the time, else return what was known `before`.

    before: of the graph that it grew from; empty for a new one. settles: nothing more is going to
        be inserted for now. For the others see `calibrate`.
    Cost over a collection's life: docs/decisions/0009-calibrated-graphs.md.
    """
    labels = len(vectors) if rows is None else len(rows)
    queries = QUERIES_OF_A_KIND if settles else QUERIES_OF_A_KIND_MEANWHILE
    growth_min = _GROWTH_MIN
    if settles:
        growth_min = 1.0 if before.queries < queries else _GROWTH_MIN_SETTLED
    if before.curve and labels < growth_min * before.labels:
        return before
    curve = calibrate(
        index, vectors, rows, space, seed=seed, threads=threads, step=step,
        queries_of_a_kind=queries,
        recall_enough=RECALL_ENOUGH if settles else RECALL_ENOUGH_MEANWHILE,
    )  # fmt: skip
    return Calibration(curve, labels, queries)


def ef_for(curve: Curve, target_recall: float) -> int | None:
    """The least candidate list that reaches `target_recall` (at 10), by interpolation.

    curve: (ef, recall), ascending in ef. None if no list that was measured reaches the target; 0
    for an empty curve or a target of 0: nothing is known or wanted.
    """
    if not curve or target_recall <= 0:
        return 0
    before_ef, before = curve[0]
    if before >= target_recall:
        return before_ef
    for ef, recall in curve[1:]:
        if recall >= target_recall:
            share = (target_recall - before) / (recall - before)
            return before_ef + math.ceil(share * (ef - before_ef))
        before_ef, before = ef, max(before, recall)
    return None


def list_for(curve: Curve, target_recall: float) -> int | None:
    """The candidate list for a search that shall reach `target_recall`; as `ef_for` otherwise.

    It aims at a tenth fewer misses where that was measured: 200 queries of a kind tell 0.95 to
    within 0.005.
    """
    if target_recall <= 0:
        return 0
    aim = 1.0 - _MISSES_AIMED * (1.0 - target_recall)
    ef = ef_for(curve, aim)
    return ef_for(curve, target_recall) if ef is None else ef


class _Searcher:
    """Asks the graph, in small calls."""

    def __init__(
        self,
        index: Index,
        rows: NDArray[np.int32] | None,
        count: int,
        threads: int,
        step: Callable[[], None],
    ) -> None:
        self._index, self._threads, self._step = index, threads, step
        self._rows = np.arange(count) if rows is None else rows.astype(np.int64)
        # The query itself and dead labels take places among the answers.
        fetch = math.ceil(1.2 * (NEAREST + 1) * len(self._rows) / count)
        self._fetch = min(len(self._rows), fetch)

    def neighbors(self, queries: Float32s, own_rows: Int64s, ef: int) -> Int64s:
        """int64[m, k]: rows near each query, nearest first; -1 for its own, dead, and none."""
        return self._search(queries, own_rows, ef)[0]

    def hits(
        self, queries: Float32s, own_rows: Int64s, limits: NDArray[np.float64], ef: int
    ) -> Int64s:
        """int64[m]: how many of at most ten answers are within the limits."""
        rows, distances = self._search(queries, own_rows, ef)
        right = (rows >= 0) & (distances <= limits[:, None])
        counts: Int64s = np.minimum(np.count_nonzero(right, axis=1), NEAREST)
        return counts

    def _search(self, queries: Float32s, own_rows: Int64s, ef: int) -> tuple[Int64s, Float32s]:
        self._index.set_ef(max(ef, self._fetch))
        rows = np.full((len(queries), self._fetch), -1, np.int64)
        distances = np.full(rows.shape, np.inf, np.float32)
        for start in range(0, len(queries), _SEARCHES):
            block = slice(start, start + _SEARCHES)
            rows[block], distances[block] = self._ask(queries[block])
            self._step()
        rows[rows == own_rows[:, None]] = -1
        return rows, distances

    def _ask(self, queries: Float32s) -> tuple[Int64s, Float32s]:
        try:
            labels, distances = self._index.knn_query(
                queries, k=self._fetch, num_threads=self._threads
            )
            return self._rows[labels.astype(np.int64)], distances
        except RuntimeError:  # From one of them too few nodes can be reached.
            if len(queries) == 1:
                shape = (1, self._fetch)
                return np.full(shape, -1, np.int64), np.full(shape, np.inf, np.float32)
        halves = [self._ask(half) for half in np.array_split(queries, 2)]
        return (
            np.concatenate([rows for rows, _ in halves]),
            np.concatenate([distances for _, distances in halves]),
        )


def _queries(
    searcher: _Searcher,
    vectors: Float32s,
    rng: np.random.Generator,  # noqa: TID251 - built from a seed
    of_a_kind: int,
) -> tuple[Float32s, Int64s, NDArray[np.int8]]:
    """Queries float32[m, d], the row to leave out of each one's answer or -1, and its kind.

    Kind 0: stored vectors. Kind 1: midpoints.
    """
    count, dimension = vectors.shape
    chosen = np.sort(rng.choice(count, min(count, of_a_kind), replace=False))
    stored = vectors[chosen]
    near = searcher.neighbors(stored, chosen, 2 * NEAREST)
    # One of the near ones at random; a vector itself if the graph shows none.
    order = rng.permuted(np.tile(np.arange(near.shape[1]), (len(chosen), 1)), axis=1)
    shuffled = np.take_along_axis(near, order, axis=1)
    first = np.argmax(shuffled >= 0, axis=1)
    others = np.take_along_axis(shuffled, first[:, None], axis=1)[:, 0]
    neighbors = vectors[np.where(others >= 0, others, chosen)]
    with np.errstate(all="ignore"):  # Of what overflows, nothing is measured.
        middle = (stored + neighbors) / 2
        noise = rng.standard_normal(stored.shape, np.float32) / np.float32(math.sqrt(dimension))
        middle += noise * (np.float32(_NOISE_SHARE) * _norms(stored - neighbors))
        # Where the vectors stored have one length, so shall the queries.
        wanted, norms = (_norms(stored) + _norms(neighbors)) / 2, _norms(middle)
        middle *= np.divide(wanted, norms, out=np.ones_like(norms), where=norms > 0)
    queries = np.concatenate([stored, middle])
    own_rows = np.concatenate([chosen, np.full(len(middle), -1)])
    kinds = np.repeat(np.array([0, 1], np.int8), (len(stored), len(middle)))
    finite = np.isfinite(queries).all(axis=1)
    return queries[finite], own_rows[finite], kinds[finite]


def _norms(vectors: Float32s) -> Float32s:
    """float32[n, 1]."""
    norms: Float32s = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    return norms


def _tenth_distances(
    space: Space,
    queries: Float32s,
    own_rows: Int64s,
    vectors: Float32s,
    step: Callable[[], None],
) -> NDArray[np.float64]:
    """float64[m]: the distance of each query's tenth nearest row, its own left out; with margin.

    NaN where there is none that can be computed. The margin is what hnswlib may err by.
    """
    everyone = np.arange(len(queries))
    best = _Best(len(queries))
    with np.errstate(all="ignore"):
        # Around the middle of the data squares are small, so float32 holds their differences.
        center = queries.mean(axis=0) if space == "l2" else np.float32(0.0)
        factors = np.ones((queries.shape[1] + 1, len(queries)), np.float32)
        factors[:-1] = (center - queries).T
        block_rows = max(NEAREST, _BLOCK_COMPONENTS // vectors.shape[1])
        for start in range(0, len(vectors), block_rows):
            # Smaller is nearer, up to what is the same for all rows.
            scores = _extended(space, vectors[start : start + block_rows] - center) @ factors
            own = own_rows - start
            inside = (own >= 0) & (own < len(scores))
            scores[own[inside], everyone[inside]] = np.inf
            best.offer(scores, start)
            step()
    limits = np.full(len(queries), np.nan)
    for place, rows in enumerate(best.rows()):
        if len(rows) >= NEAREST:
            limits[place] = _tenth_distance(space, queries[place], vectors[rows])
    return limits


def _extended(space: Space, block: Float32s) -> Float32s:
    """float32[n, d + 1]: vectors and a number, whose product with (-query, 1) ranks by distance."""
    extended = np.zeros((block.shape[0], block.shape[1] + 1), np.float32)
    extended[:, :-1] = block
    if space == "l2":
        extended[:, -1] = np.einsum("nd,nd->n", block, block) / 2
    elif space == "cosine":
        norms = _norms(block)
        extended[:, :-1] /= np.where(norms > 0, norms, np.float32(1.0))
    return extended


class _Best:
    """The rows with the least scores for each of m queries, gathered block by block."""

    def __init__(self, queries: int) -> None:
        self._limits = np.full(queries, np.inf, np.float32)  # Nothing from it on can be among them.
        self._queries = np.empty(0, np.int64)
        self._rows = np.empty(0, np.int64)
        self._scores = np.empty(0, np.float32)

    def offer(self, scores: Float32s, first_row: int) -> None:
        """scores: float32[n, m] of rows first_row, first_row + 1, ...; inf: not a candidate."""
        count = scores.shape[1]
        if len(self._rows) == 0 and len(scores) > _CANDIDATES:
            # Spares sorting the whole first block. NaN is sorted last.
            cut = np.partition(scores, _CANDIDATES - 1, axis=0)[_CANDIDATES - 1]
            self._limits = np.where(np.isnan(cut), self._limits, np.nextafter(cut, np.inf))
        places = np.flatnonzero(scores < self._limits)
        self._queries = np.concatenate([self._queries, places % count])
        self._rows = np.concatenate([self._rows, first_row + places // count])
        self._scores = np.concatenate([self._scores, scores.ravel()[places]])
        if len(self._rows) > 2 * _CANDIDATES * count:
            self._cut()

    def rows(self) -> list[Int64s]:
        """For each query at most _CANDIDATES rows."""
        self._cut()
        bounds = np.searchsorted(self._queries, np.arange(len(self._limits) + 1))
        return [self._rows[start:stop] for start, stop in pairwise(bounds.tolist())]

    def _cut(self) -> None:
        order = np.lexsort((self._scores, self._queries))
        queries = self._queries[order]
        rank = np.arange(len(order)) - np.searchsorted(queries, queries)
        last = rank == _CANDIDATES - 1
        self._limits[queries[last]] = self._scores[order[last]]
        order = order[rank < _CANDIDATES]
        self._queries, self._rows = self._queries[order], self._rows[order]
        self._scores = self._scores[order]


def _tenth_distance(space: Space, query: Float32s, vectors: Float32s) -> float:
    """In the measure of the space, plus what hnswlib's float32 arithmetic may err by."""
    with np.errstate(all="ignore"):
        q, x = query.astype(np.float64), vectors.astype(np.float64)
        if space == "l2":
            x -= q
            tenth = float(np.partition(np.einsum("nd,nd->n", x, x), NEAREST - 1)[NEAREST - 1])
            return tenth * (1.0 + _ROUNDING)
        dots = x @ q
        norms = np.sqrt(np.einsum("nd,nd->n", x, x) * (q @ q))
        if space == "cosine":
            dots = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
            norms[:] = 1.0
        tenth = float(np.partition(1.0 - dots, NEAREST - 1)[NEAREST - 1])
        return tenth + _ROUNDING * (1.0 + float(norms.max()))
