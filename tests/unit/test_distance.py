"""Distances: estimates within their bound, scans equal to brute force, whatever the numbers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ochredb.segment import Rows
from ochredb.types import Float32s
from ochredb.vectors.distance import NORM2_MAX, NORM2_MIN, Space, estimate, exact, products
from ochredb.vectors.scan import Scan

SPACES: tuple[Space, ...] = ("l2", "cosine", "ip")
FLOAT32_MAX = float(np.finfo(np.float32).max)


class Vectors:
    """Just what a scan needs of a segment."""

    def __init__(self, vectors: Float32s, seqs: Any = None) -> None:
        self.vectors = vectors
        self.seqs = np.arange(len(vectors)) if seqs is None else seqs
        with np.errstate(over="ignore"):
            self.squared_norms: Float32s = np.einsum("nd,nd->n", vectors, vectors)

    place = None

    def codes(self, _space: Space, *, makes: bool = True) -> None:
        return None

    def __len__(self) -> int:
        return len(self.vectors)


def _brute_force(space: Space, query: Float32s, vectors: Float32s) -> list[float]:
    """Each distance by itself, in float64, rounded once."""
    q = query.astype(np.float64)
    out = []
    for row in vectors.astype(np.float64):
        if space == "l2":
            value = float(((row - q) ** 2).sum())
        elif space == "ip":
            value = 1.0 - float((row * q).sum())
        else:
            norm = np.sqrt((row * row).sum()) * np.sqrt((q * q).sum())
            value = 1.0 - (float((row * q).sum()) / norm if norm > 0 else 0.0)
        with np.errstate(over="ignore"):
            out.append(float(np.float32(value)))
    return out


def _vectors(seed: int, rows: int, dimension: int, exponents: tuple[int, int]) -> Float32s:
    """Norms spread over the given powers of ten; duplicates and near-duplicates among them."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((rows, dimension))
    base /= np.linalg.norm(base, axis=1, keepdims=True) + 1e-30
    base *= 10.0 ** rng.uniform(*exponents, size=(rows, 1))
    vectors = base.astype(np.float32)
    vectors[rows // 2 :: 5] = vectors[0]
    vectors[rows // 2 + 1 :: 7] = np.nextafter(vectors[0], np.float32(np.inf))
    return vectors


@settings(deadline=None, max_examples=60)
@given(
    space=st.sampled_from(SPACES),
    seed=st.integers(0, 2**32 - 1),
    dimension=st.sampled_from([1, 2, 3, 17, 128, 769]),
    exponents=st.sampled_from([(-3, 4), (-3, -3), (4, 4), (-17, -13), (15, 17), (-25, -20)]),
)
def test_an_estimate_errs_by_less_than_its_bound(
    space: Space, seed: int, dimension: int, exponents: tuple[int, int]
) -> None:
    data = Vectors(_vectors(seed, 80, dimension, exponents))
    for query in (data.vectors[0], data.vectors[3], -data.vectors[5]):
        norm2 = float(np.dot(query.astype(np.float64), query.astype(np.float64)))
        if not NORM2_MIN < norm2 < NORM2_MAX:
            continue  # Scans do not estimate then.
        true = exact(space, query, data.vectors).astype(np.float64)
        for queries, rows in itertools.product(
            (query[np.newaxis], np.stack([query, -query, query])),
            (None, np.arange(len(data.vectors))),
        ):
            dots = products(queries, data.vectors, rows)
            estimated, *bounds = estimate(space, queries, dots, data.squared_norms)
            error = np.abs(estimated[0].astype(np.float64) - true)
            limit = np.broadcast_to(bounds[0] + bounds[1], estimated.shape)[0]
            assert (error <= limit).all(), float((error / limit).max())


@settings(deadline=None, max_examples=60)
@given(
    space=st.sampled_from(SPACES),
    seed=st.integers(0, 2**32 - 1),
    dimension=st.sampled_from([1, 3, 32, 300]),
    exponents=st.sampled_from([(-3, 4), (0, 0), (-40, -30), (17, 30), (-45, 38), (-20, 20)]),
    count=st.integers(1, 40),
    share=st.sampled_from([0.05, 0.25, 0.5, 1.0]),
)
@example(space="l2", seed=0, dimension=3, exponents=(-45, 38), count=5, share=1.0)
def test_a_scan_equals_brute_force_with_ties_to_the_older(
    space: Space,
    seed: int,
    dimension: int,
    exponents: tuple[int, int],
    count: int,
    share: float,
) -> None:
    rng = np.random.default_rng(seed)
    vectors = _vectors(seed, 150, dimension, exponents)
    seqs = rng.permutation(1_000)[:150]
    data: Any = Vectors(vectors, seqs)
    rows = None if share == 1.0 else np.flatnonzero(rng.random(150) < share)
    candidates = np.arange(150) if rows is None else rows
    query = vectors[int(rng.integers(150))] * np.float32(0.9)
    found, distances = _nearest(space, query, data, rows, count)
    true = _brute_force(space, query, vectors[candidates])
    order = sorted(range(len(true)), key=lambda i: (true[i], seqs[candidates[i]]))[:count]
    assert distances.tolist() == [true[i] for i in order]
    assert found.tolist() == [int(candidates[i]) for i in order]


@pytest.mark.parametrize("space", SPACES)
def test_a_distance_does_not_depend_on_its_company(space: Space) -> None:
    """I5: one row alone, gathered, or among all others: the same bits."""
    for dimension in (1, 2, 7, 128, 1_000, 9_000):
        vectors = _vectors(dimension, 30, dimension, (-3, 4))
        query = vectors[7] + np.float32(0.01)
        together = exact(space, query, vectors)
        for row in range(0, 30, 4):
            alone = exact(space, query, vectors[row : row + 1])
            assert alone.tobytes() == together[row : row + 1].tobytes()
        picked = np.array([29, 3, 3, 11])
        assert exact(space, query, vectors[picked]).tobytes() == together[picked].tobytes()
        assert exact(space, query, vectors[::3]).tobytes() == together[::3].tobytes()


class TestExtremes:
    """Zero vectors, overflow, underflow: a number each, no warning, no row lost."""

    def test_cosine_of_a_zero_vector_is_one(self) -> None:
        vectors = np.array([[0, 0], [1, 0], [-1, 0]], np.float32)
        assert exact("cosine", np.array([2, 0], np.float32), vectors).tolist() == [1.0, 0.0, 2.0]
        assert exact("cosine", np.zeros(2, np.float32), vectors).tolist() == [1.0, 1.0, 1.0]

    def test_overflow_is_infinity_and_keeps_its_rank(self) -> None:
        vectors = np.full((40, 4), FLOAT32_MAX, np.float32)
        vectors[20:] *= -1
        data: Any = Vectors(vectors)
        query = np.full(4, FLOAT32_MAX, np.float32)
        rows, distances = _nearest("l2", query, data, None, 25)
        assert rows.tolist() == list(range(25))
        assert distances[:20].tolist() == [0.0] * 20
        assert np.isposinf(distances[20:]).all()
        rows, distances = _nearest("ip", query, data, None, 25)
        assert rows[:20].tolist() == list(range(20))
        assert np.isneginf(distances[:20]).all()
        rows, distances = _nearest("cosine", query, data, None, 25)
        assert distances[:20].tolist() == [0.0] * 20
        assert distances[20:].tolist() == [2.0] * 5

    def test_denormal_vectors_keep_their_directions(self) -> None:
        tiny = np.float32(1e-44)
        vectors = np.tile(np.array([[tiny, 0], [0, tiny], [-tiny, 0]], np.float32), (10, 1))
        data: Any = Vectors(vectors)
        rows, distances = _nearest("cosine", np.array([1, 0], np.float32), data, None, 11)
        assert rows.tolist() == [*range(0, 30, 3), 1]
        assert distances.tolist() == [0.0] * 10 + [1.0]

    def test_a_zero_query(self) -> None:
        vectors = _vectors(1, 60, 8, (-3, 4))
        data: Any = Vectors(vectors)
        zero = np.zeros(8, np.float32)
        for space in SPACES:
            rows, distances = _nearest(space, zero, data, None, 10)
            true = _brute_force(space, zero, vectors)
            order = sorted(range(60), key=lambda i: (true[i], i))[:10]
            assert (rows.tolist(), distances.tolist()) == (order, [true[i] for i in order])

    def test_nothing_to_search(self) -> None:
        data: Any = Vectors(np.zeros((5, 2), np.float32))
        query = np.ones(2, np.float32)
        for rows, count in ((np.empty(0, np.int64), 5), (None, 0)):
            found, distances = _nearest("l2", query, data, rows, count)
            assert (len(found), len(distances)) == (0, 0)


def _nearest(
    space: Space, query: Float32s, segment: Any, rows: Rows | None, count: int
) -> tuple[Rows, Float32s]:
    """What a scan finds: estimates, limit, exact distances, order by (distance, seq)."""
    if count == 0 or (rows is not None and len(rows) == 0):
        return np.empty(0, np.int64), np.empty(0, np.float32)
    mask = None
    if rows is not None:
        mask = np.zeros(len(segment), np.bool_)
        mask[rows] = True
    # In company, whose answers are looked at too: they must not differ from those alone.
    answers = [
        *_scan(space, np.stack([query, query[::-1], query]), [(segment, mask)], count)[::2],
        *_scan(space, query[np.newaxis], [(segment, mask)], count),
    ]
    for other in answers[1:]:
        assert answers[0][1].tolist() == other[1].tolist()
        assert answers[0][2].tobytes() == other[2].tobytes()
    return answers[0][1], answers[0][2]


def _scan(
    space: Space, queries: Float32s, segments: list[tuple[Any, Any]], count: int
) -> list[tuple[Any, Rows, Float32s]]:
    """For each query the segment, row and distance of its nearest, by (distance, seq)."""
    scan = Scan(space, queries, count)
    for number, (segment, mask) in enumerate(segments):
        scan.add(number, segment, mask)
    answers = []
    found = scan.candidates()
    for owner in range(len(queries)):
        mine = [(number, item, item.owners == owner) for number, item in found]
        numbers = np.concatenate([np.full(which.sum(), number) for number, _, which in mine])
        rows, distances, seqs = (
            np.concatenate([getattr(item, name)[which] for _, item, which in mine])
            for name in ("rows", "distances", "seqs")
        )
        order = np.lexsort((seqs, distances))[:count]
        answers.append((numbers[order], rows[order], distances[order]))
    return answers


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("count", [1, 10, 1_000, 9_000])
@pytest.mark.parametrize("order", ["as drawn", "nearer and nearer", "all equal", "many equal"])
def test_a_scan_of_many_blocks_misses_nothing(space: Space, count: int, order: str) -> None:
    """Whatever comes late, in whatever segment: 21,000 rows of three segments, by brute force."""
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((21_000, 2)).astype(np.float32)
    query = np.array([1.0, 0.5], np.float32)
    if order == "nearer and nearer":
        vectors = vectors[np.argsort(exact(space, query, vectors), kind="stable")[::-1]]
    elif order == "all equal":
        vectors[:] = vectors[0]
    elif order == "many equal":
        vectors = vectors[rng.integers(0, 50, len(vectors))]
    mask = rng.random(len(vectors)) < np.repeat([0.6, 0.1, 1.0], [10_000, 10_000, 1_000])
    pieces = [slice(0, 10_000), slice(10_000, 20_000), slice(20_000, 21_000)]
    seqs = rng.permutation(len(vectors))
    segments: list[tuple[Any, Any]] = [
        (Vectors(vectors[piece], seqs[piece]), None if number == 2 else mask[piece])
        for number, piece in enumerate(pieces)
    ]
    rows = np.flatnonzero(mask)
    for queries in (query[np.newaxis], np.stack([-query, query])):
        numbers, found, distances = _scan(space, queries, segments, count)[-1]
        true = exact(space, query, vectors[rows])
        nearest = np.lexsort((seqs[rows], true))[:count]
        assert distances.tobytes() == true[nearest].tobytes()
        assert (numbers * 10_000 + found).tolist() == rows[nearest].tolist()


def test_a_scan_keeps_few_of_the_rows() -> None:
    """What is recomputed exactly: the nearest, and what its bound does not tell from them."""
    rng = np.random.default_rng(6)
    segment: Any = Vectors(rng.standard_normal((50_000, 8)).astype(np.float32))
    scan = Scan("l2", rng.standard_normal((3, 8)).astype(np.float32), 10)
    scan.add(0, segment, None)
    ((_, found),) = scan.candidates()
    assert 30 <= len(found.rows) <= 40
