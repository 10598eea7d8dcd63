"""Exact nearest neighbours by scanning: codes or BLAS propose, the exact function decides.

A scan passes once over the rows, in blocks whose estimates stay in the processor's cache, for
several query vectors at once. It keeps what may still be among the nearest of each query, given the
nearest so far: after the first block that is hardly anything, and no step but the product looks at
all rows more than once. Candidates of all queries are pairs (owner, row): `owner` is the number of
the query that the row may answer.

    scan = Scan("l2", queries, count=10)
    scan.add(0, segment, mask)
    candidates = scan.candidates()  # [(0, Candidates)]: all that can answer, and few others
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from ochredb.segment import Rows, Segment
from ochredb.types import Bools, Float32s, Int64s
from ochredb.vectors.codes import CodedQueries, Codes, CodesOnUse
from ochredb.vectors.distance import (
    NORM2_MAX,
    NORM2_MIN,
    Space,
    estimate,
    exact,
    products,
    rounding,
)

# Above this share of matching rows, one product over everything is cheaper than gathering them.
GATHER_SHARE_MAX = 0.3
# The same where all rows have codes, which take a seventh of the time of their vectors.
_CODED_SHARE_MIN = 0.1
_EXACT_BYTES = 32 << 20  # Of vectors in float64: bounds memory per step.
QUERIES_MAX = 64  # Of one scan: as many as make the product efficient.
# Estimates per block: with their bounds and what they are compared with they stay in level 2.
_BLOCK_ESTIMATES = 1 << 15
_BLOCK_ROWS_MIN, _BLOCK_ROWS_MAX = 512, 32_768
_FIRST_ROWS = 512  # Of the first block, whose nearest are the first limit.
_KEPT_PAIRS = 1 << 16  # Between two looks at which of them are still near enough.
_TOGETHER_COMPONENTS = 1 << 17  # Of candidates whose exact distances are computed in one go.
_ONE = np.ones((1, 1), np.float32)


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
class _Pairs:
    """Pairs (owner, row), and between what their true distances lie."""

    owners: Int64s
    rows: Rows
    lower: Float32s
    upper: Float32s

    def chosen(self, which: Bools) -> _Pairs:
        return _Pairs(self.owners[which], self.rows[which], self.lower[which], self.upper[which])


@dataclass(frozen=True, slots=True)
class _Run:
    """The rows of several segments, which lie side by side in the same arrays, as of one.

    numbers: the segments'. starts: int64[m], the first row of each.
    """

    vectors: Float32s
    squared_norms: Float32s
    seqs: Int64s
    numbers: list[int]
    starts: Int64s

    @classmethod
    def of(cls, segments: list[tuple[int, Segment]]) -> _Run:
        place = segments[0][1].place
        assert place is not None
        vectors, squared_norms, seqs, first = place
        lengths = [len(segment) for _, segment in segments]
        rows = slice(first, first + sum(lengths))
        starts = np.cumsum([0, *lengths[:-1]])
        numbers = [number for number, _ in segments]
        return cls(vectors[rows], squared_norms[rows], seqs[rows], numbers, starts)

    def __len__(self) -> int:
        return len(self.seqs)

    def apart(self, found: Candidates) -> list[tuple[int, Candidates]]:
        """By segment's number: the candidates among its rows."""
        which = np.searchsorted(self.starts, found.rows, "right") - 1
        answer = []
        for place in np.unique(which).tolist():
            own = which == place
            rows = found.rows[own] - self.starts[place]
            item = Candidates(found.owners[own], rows, found.distances[own], found.seqs[own])
            answer.append((self.numbers[place], item))
        return answer


# Of a segment, with its number: owners and rows of the pairs found in it.
_Piece = tuple[int, Segment | _Run, Int64s, Rows]


def _lie_side_by_side(first: Segment, second: Segment) -> bool:
    """Whether the second one's rows follow the first one's in the same arrays."""
    before, after = first.place, second.place
    return (
        before is not None
        and after is not None
        and before[0] is after[0]
        and before[3] + len(first) == after[3]
    )


def _gathered(segment: Segment, rows: Rows) -> tuple[Float32s, Float32s]:
    return segment.vectors[rows], segment.squared_norms[rows]


def reads_all(matching: int, total: int) -> bool:
    """Whether a scan for so many rows of a segment reads the codes of all, if there are codes."""
    return matching > _CODED_SHARE_MIN * total


def are_usual(queries: Float32s) -> bool:
    """Whether float32 holds the squares of all of float32[q, d]: finite, not zero, not huge."""
    wide = queries.astype(np.float64)
    norms2 = np.einsum("ij,ij->i", wide, wide)
    return float(norms2.min()) > NORM2_MIN and float(norms2.max()) < NORM2_MAX


class Scan:
    """One pass over the rows of some segments for float32[q, d], q <= QUERIES_MAX, count >= 1."""

    def __init__(
        self, space: Space, queries: Float32s, count: int, *, makes_codes: bool = True
    ) -> None:
        """makes_codes: or only uses those that there are."""
        self._makes_codes = makes_codes
        self._space, self._queries, self._count = space, queries, count
        self._are_usual = are_usual(queries)
        self._asked: CodedQueries | None = None
        self._codes: dict[int, Codes] = {}  # Of the segments that were scanned by them.
        # float32[q]: distances that `count` of the rows seen do not exceed. No farther row answers.
        self._limits = np.full(len(queries), np.inf, np.float32)
        self._is_limited = False
        self._segments: dict[int, Segment | _Run] = {}
        self._beside: list[tuple[int, Segment]] = []  # To be scanned as one, at the end.
        self._found: list[tuple[int, _Pairs]] = []
        self._kept, self._kept_max = 0, _KEPT_PAIRS

    def add(
        self,
        number: int,
        segment: Segment,
        mask: Bools | None,
        selected: CodesOnUse | None = None,
    ) -> None:
        """Pass over a segment, named `number`: the rows where `mask` is set, None = all.

        selected: codes of these rows alone, if the mask is kept.
        """
        self._segments[number] = segment
        matching = len(segment) if mask is None else int(np.count_nonzero(mask))
        if self._are_usual and reads_all(matching, len(segment)):
            codes = segment.codes(self._space, makes=self._makes_codes)
            if codes is not None:
                self._add_coded(number, codes, None, mask)
                return
        rows = None
        if mask is not None and matching <= GATHER_SHARE_MAX * len(segment):
            rows, mask = np.flatnonzero(mask), None
            if selected is not None and self._are_usual:
                gathered = partial(_gathered, segment, rows)
                codes = selected.find(self._space, gathered, makes=self._makes_codes)
                if codes is not None:
                    self._add_coded(number, codes, rows, None)
                    return
        elif mask is None and segment.place is not None:
            if self._beside and not _lie_side_by_side(self._beside[-1][1], segment):
                self._scan_beside()
            self._beside.append((number, segment))
            return
        self._scan(number, segment, rows, mask)

    def _scan_beside(self) -> None:
        """Scan segments whose rows lie side by side in one go: short ones are mostly overhead."""
        number, segment = self._beside[0]
        if len(self._beside) == 1:
            self._scan(number, segment, None, None)
        else:
            run = _Run.of(self._beside)
            # A number that no segment has: candidates are told apart in the end.
            number = -1 - number
            self._segments[number] = run
            self._scan(number, run, None, None)
        self._beside = []

    def _scan(
        self, number: int, segment: Segment | _Run, rows: Rows | None, mask: Bools | None
    ) -> None:
        """Pass over the vectors of `rows`, or of all where `mask` is set."""
        total = len(segment) if rows is None else len(rows)
        estimates_are_useful = self._are_usual and float(segment.squared_norms.max()) < NORM2_MAX
        step = _BLOCK_ESTIMATES // len(self._queries)
        step = min(max(step, _BLOCK_ROWS_MIN), _BLOCK_ROWS_MAX)
        for start in range(0, total, step):
            block = slice(start, min(start + step, total))
            chosen = None if rows is None else rows[block]
            where = block if chosen is None else chosen
            among = None if mask is None else mask[block]
            if estimates_are_useful:
                if chosen is None:
                    dots = products(self._queries, segment.vectors[block])
                else:
                    dots = products(self._queries, segment.vectors, chosen)
                norms = segment.squared_norms[where]
                lower, row_bounds, bounds = estimate(self._space, self._queries, dots, norms)
                lower -= row_bounds
                row_bounds = row_bounds[np.newaxis]
            else:  # float32 would overflow or underflow.
                vectors = segment.vectors[where]
                lower = np.stack([exact(self._space, query, vectors) for query in self._queries])
                row_bounds = bounds = np.zeros((1, 1), np.float32)
            self._keep(number, start, chosen, among, lower, row_bounds, _ONE, bounds)

    def _add_coded(self, number: int, codes: Codes, rows: Rows | None, mask: Bools | None) -> None:
        """Pass over the codes of `rows`, or of all where `mask` is set."""
        asked = self._asked
        if asked is None:
            asked = self._asked = CodedQueries(self._space, self._queries)
        self._codes[number] = codes
        for start, lower in codes.lowers(asked):
            block = slice(start, start + lower.shape[1])
            chosen = None if rows is None else rows[block]
            among = None if mask is None else mask[block]
            errors = codes.errors[:, block]
            self._keep(number, start, chosen, among, lower, errors, asked.weights, asked.bounds)

    def _keep(
        self,
        number: int,
        start: int,
        rows: Rows | None,
        among: Bools | None,
        lower: Float32s,
        row_bounds: Float32s,
        weights: Float32s,
        query_bounds: Float32s,
    ) -> None:
        """Keep of a block what may be among the nearest.

        It is the rows from `start` on, or `rows`, and of these the ones that are `among`.
        lower: float32[q, m]. row_bounds: float32[b, m] or [b, 1]. weights: float32[q, b] or [1, b].
        query_bounds: float32[q, 1] or [1, 1]. Distances lie between lower - query_bounds and
        lower + 2 * weights @ row_bounds + query_bounds.
        """
        count, limits = self._count, self._limits
        if not self._is_limited:
            first = max(_FIRST_ROWS, 4 * count)
            some = lower[:, :first] + 2 * (weights @ row_bounds[:, :first])
            if among is not None:
                some = some[:, among[:first]]
            if some.shape[1] >= count:
                some.partition(count - 1, axis=1)
                np.minimum(limits, some[:, count - 1] + query_bounds[:, 0], out=limits)
                self._is_limited = True
        near = lower <= limits[:, np.newaxis] + query_bounds
        if among is not None:
            near &= among
        places = np.flatnonzero(near)
        if not len(places):
            return
        if len(near) == 1:
            owners, columns = np.zeros(len(places), np.int64), places
        else:
            owners, columns = np.divmod(places, near.shape[1])
        lowest = lower.ravel()[places]
        own_bounds = query_bounds[owners if len(query_bounds) > 1 else 0, 0]
        own_weights = weights[owners] if len(weights) > 1 else weights
        rows_bounds = row_bounds[:, columns] if row_bounds.shape[1] > 1 else row_bounds
        upper = lowest + 2 * (own_weights.T * rows_bounds).sum(axis=0) + own_bounds
        picked = columns + start if rows is None else rows[columns]
        pairs = _Pairs(owners, picked, lowest - own_bounds, upper)
        self._found.append((number, pairs))
        self._kept += len(places)
        self._tighten(pairs)
        if self._kept > self._kept_max:
            self._forget()

    def _tighten(self, pairs: _Pairs) -> None:
        """Lower the limits to what these pairs allow; they are ordered by owner."""
        if len(pairs.owners) < 2 * self._count:
            return
        ends = np.searchsorted(pairs.owners, np.arange(len(self._limits) + 1)).tolist()
        for owner in range(len(self._limits)):
            upper = pairs.upper[ends[owner] : ends[owner + 1]]
            if len(upper) >= self._count:
                nearest = np.partition(upper, self._count - 1)
                self._limits[owner] = min(self._limits[owner], nearest[self._count - 1])

    def _forget(self) -> None:
        """Forget pairs that the limits exclude by now."""
        if len(self._found) > 1:
            owners = np.concatenate([pairs.owners for _, pairs in self._found])
            upper = np.concatenate([pairs.upper for _, pairs in self._found])
            order = np.argsort(owners, kind="stable")
            self._tighten(_Pairs(owners[order], order, upper, upper[order]))
        kept = []
        for number, pairs in self._found:
            near = pairs.lower <= self._limits[pairs.owners]
            if near.any():
                kept.append((number, pairs.chosen(near)))
        self._found = kept
        self._kept = sum(len(pairs.rows) for _, pairs in kept)
        self._kept_max = max(_KEPT_PAIRS, 2 * self._kept)  # Equally near: all are kept.

    def candidates(self) -> list[tuple[int, Candidates]]:
        """By segment's number: every pair that can answer, with its exact distance."""
        if self._beside:
            self._scan_beside()
        self._forget()
        pieces = []
        for number in dict.fromkeys(number for number, _ in self._found):
            own = [pairs for other, pairs in self._found if other == number]
            owners, rows = own[0].owners, own[0].rows
            if len(own) > 1:
                owners = np.concatenate([pairs.owners for pairs in own])
                rows = np.concatenate([pairs.rows for pairs in own])
            pieces.append((number, self._segments[number], owners, rows))
        found = []
        for number, segment, item in self._exactly(pieces):
            if number in self._codes:
                self._judge(self._codes[number], segment, item)
            found += segment.apart(item) if isinstance(segment, _Run) else [(number, item)]
        return found

    def _judge(self, codes: Codes, segment: Segment | _Run, item: Candidates) -> None:
        """Give codes up that kept many rows for nothing: float32 would have excluded them."""
        queries, count = len(self._queries), self._count
        if not codes.are_many(len(item.rows), queries, count):
            return
        norms2 = segment.squared_norms[item.rows]
        own = np.einsum("ij,ij->i", self._queries, self._queries)[item.owners]
        sums = 2.0 if self._space == "cosine" else norms2 + own + 1
        bounds = 4 * rounding(self._queries.shape[1]) * sums
        limits = np.full(queries, np.inf, np.float32)
        for owner in range(queries):
            distances = item.distances[item.owners == owner]
            if len(distances) >= count:
                limits[owner] = np.partition(distances, count - 1)[count - 1]
        far = item.distances > limits[item.owners] + bounds
        if self._space == "cosine":
            far &= norms2 >= NORM2_MIN
        if codes.are_many(int(np.count_nonzero(far)), queries, count):
            codes.is_poor = True

    def _exactly(self, pieces: list[_Piece]) -> Iterator[tuple[int, Segment | _Run, Candidates]]:
        """The exact distances of each segment's pairs: of few pairs in one go."""
        if len(pieces) < 2 or self._kept * self._queries.shape[1] > _TOGETHER_COMPONENTS:
            for number, segment, owners, rows in pieces:
                item = exactly(self._space, self._queries, segment, owners, rows)
                yield number, segment, item
            return
        vectors = np.concatenate([segment.vectors[rows] for _, segment, _, rows in pieces])
        asked = self._queries[0]
        if len(self._queries) > 1:
            asked = self._queries[np.concatenate([owners for _, _, owners, _ in pieces])]
        distances, start = exact(self._space, asked, vectors), 0
        for number, segment, owners, rows in pieces:
            stop = start + len(rows)
            item = Candidates(owners, rows, distances[start:stop], segment.seqs[rows])
            yield number, segment, item
            start = stop


def exactly(
    space: Space, queries: Float32s, segment: Segment | _Run, owners: Int64s, rows: Rows
) -> Candidates:
    """The exact distances of pairs (owner, row): `owners` are numbers of `queries`[q, d]."""
    step = max(1, _EXACT_BYTES // (8 * queries.shape[1]))
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
