"""Codes of 8 bits: their bounds hold for whatever vectors, and scans by them find the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numkong
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ochredb.tail import Chunk, TailMemory, TailSegment
from ochredb.types import Float32s, Int64s
from ochredb.vectors import codes as codes_module
from ochredb.vectors import distance
from ochredb.vectors import scan as scan_module
from ochredb.vectors.codes import CodedQueries, Codes, CodesOnUse, is_enough, memory_bytes
from ochredb.vectors.distance import Space, exact
from ochredb.vectors.scan import Scan

SPACES: tuple[Space, ...] = ("l2", "cosine", "ip")


def _norms(vectors: Float32s) -> Float32s:
    norms: Float32s = np.einsum("ij,ij->i", vectors, vectors)
    return norms


def _drawn(seed: int, rows: int, dimension: int, kind: str) -> Float32s:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((rows, dimension)).astype(np.float32)
    if kind == "unit":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    elif kind == "of all lengths":
        vectors *= (10.0 ** rng.uniform(-14, 14, (rows, 1))).astype(np.float32)
    elif kind == "uneven":
        vectors[:, 0] *= 300
    elif kind == "zeros between":
        vectors[rng.random(rows) < 0.4] = 0
        vectors[rng.random((rows, dimension)) < 0.3] = 0
    elif kind == "tiny":
        vectors *= np.float32(1e-22)
    return vectors


KINDS = ("normal", "unit", "of all lengths", "uneven", "zeros between", "tiny")


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 70),
    dimension=st.sampled_from([1, 2, 3, 8, 31, 64, 100, 384, 768]),
    kind=st.sampled_from(KINDS),
    asked=st.sampled_from(["normal", "unit", "of all lengths", "uneven"]),
    space=st.sampled_from(SPACES),
)
def test_distances_lie_within_the_bounds(
    seed: int, rows: int, dimension: int, kind: str, asked: str, space: Space
) -> None:
    vectors = _drawn(seed, rows, dimension, kind)
    queries = _drawn(seed + 1, 3, dimension, asked)
    queries[0] = vectors[0] if 1e-12 < float(_norms(vectors[:1])[0]) < 1e30 else queries[0]
    codes, coded = Codes(space, vectors, _norms(vectors)), CodedQueries(space, queries)
    ((start, lower),) = codes.lowers(coded)
    assert start == 0
    upper = lower + 2 * coded.weights @ codes.errors
    for number, query in enumerate(queries):
        true = exact(space, query, vectors).astype(np.float64)
        bound = float(coded.bounds[number, 0])
        assert (lower[number].astype(np.float64) - bound <= true).all()
        assert (true <= upper[number].astype(np.float64) + bound).all()


@pytest.mark.parametrize("space", SPACES)
def test_bounds_of_ordinary_vectors_are_narrow(space: Space) -> None:
    vectors = _drawn(1, 500, 128, "unit")
    codes, coded = Codes(space, vectors, _norms(vectors)), CodedQueries(space, vectors[:1])
    width = 2 * coded.weights @ codes.errors
    assert 0 < float(width.max()) < (0.08 if space == "l2" else 0.04)


def test_products_of_codes_are_exact() -> None:
    """Ours is the bound, numkong's the product: of every shape, up to the ends of 8 bits."""
    rng = np.random.default_rng(2)
    for rows in (1, 2, 15, 17, 100):
        for dimension in (1, 3, 16, 63, 64, 65, 128, 700, 1537):
            for queries in (1, 2, 5, 17):
                stored = rng.integers(-127, 128, (rows, dimension)).astype(np.int8)
                asked = rng.integers(-127, 128, (queries, dimension)).astype(np.int8)
                if dimension % 2:
                    stored[:], asked[:] = 127, (-127, 127)[rows % 2]
                    stored[1::2] = -127
                found = np.asarray(numkong.dots_packed(asked, numkong.dots_pack(stored)))
                wide: NDArray[np.int32] = asked.astype(np.int32) @ stored.T.astype(np.int32)
                assert np.array_equal(found, wide)


class _Vectors:
    """Just what a scan needs of a segment."""

    place = None

    def __init__(self, vectors: Float32s, seqs: Int64s) -> None:
        self.vectors, self.seqs, self.squared_norms = vectors, seqs, _norms(vectors)
        self.coded = CodesOnUse(is_useful=is_enough(*vectors.shape))
        self.coded.expect()

    def __len__(self) -> int:
        return len(self.vectors)

    def codes(self, space: Space, *, makes: bool = True) -> Codes | None:
        return self.coded.find(space, lambda: (self.vectors, self.squared_norms), makes=makes)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("count", [1, 10, 500])
@pytest.mark.parametrize("kind", ["normal", "unit", "nearer and nearer", "many equal", "long ones"])
def test_a_scan_by_codes_finds_what_a_scan_of_vectors_does(
    space: Space, count: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several blocks and segments, some rows masked: by brute force."""
    rng = np.random.default_rng(3)
    monkeypatch.setattr(codes_module, "COMPONENTS_MIN", 100_000)
    vectors = _drawn(4, 30_000, 20, "unit" if kind == "unit" else "normal")
    queries = _drawn(5, 3, 20, "normal")
    if kind == "nearer and nearer":
        order = np.argsort(exact(space, queries[0], vectors), kind="stable")
        vectors = vectors[order[::-1]]
    elif kind == "many equal":
        vectors = vectors[rng.integers(0, 40, len(vectors))]
    elif kind == "long ones":
        vectors[::1_000] *= np.float32(1e6)
    seqs = rng.permutation(len(vectors))
    mask = rng.random(len(vectors)) < 0.5
    pieces = [slice(0, 20_000), slice(20_000, 24_000), slice(24_000, 30_000)]
    segments: list[Any] = [_Vectors(vectors[piece], seqs[piece]) for piece in pieces]
    for masked in (False, True):
        for asked in (queries[:1], queries):
            scan = Scan(space, asked, count)
            for number, (piece, segment) in enumerate(zip(pieces, segments, strict=True)):
                scan.add(number, segment, mask[piece] if masked else None)
            found = scan.candidates()
            rows = np.flatnonzero(mask) if masked else np.arange(len(vectors))
            for owner, query in enumerate(asked):
                mine = [(number, item, item.owners == owner) for number, item in found]
                got = np.concatenate([pieces[n].start + item.rows[own] for n, item, own in mine])
                distances = np.concatenate([item.distances[own] for _, item, own in mine])
                order = np.lexsort((seqs[got], distances))[:count]
                true = exact(space, query, vectors[rows])
                nearest = np.lexsort((seqs[rows], true))[:count]
                assert got[order].tolist() == rows[nearest].tolist()
                assert distances[order].tobytes() == true[nearest].tobytes()
    coded = [segment.coded.size_bytes > 0 for segment in segments]
    assert coded == [True, False, True]


def test_a_scan_by_codes_looks_at_few_vectors() -> None:
    vectors = _drawn(6, 50_000, 64, "unit")
    segment: Any = _Vectors(vectors, np.arange(50_000))
    scan = Scan("l2", _drawn(7, 3, 64, "unit"), 10)
    scan.add(0, segment, None)
    ((_, found),) = scan.candidates()
    assert 30 <= len(found.rows) <= 250


def _coded(rows: int) -> tuple[CodesOnUse, Callable[..., Codes | None], list[int]]:
    """With room for 2 MB: what was asked for is in the list."""
    vectors = _drawn(8, rows, 200, "normal")
    coded = CodesOnUse(is_useful=is_enough(rows, 200))
    asked: list[int] = []

    def has_room(size_bytes: int) -> bool:
        asked.append(size_bytes)
        return size_bytes < 2_000_000

    return coded, partial(coded.find, "l2", lambda: (vectors, _norms(vectors)), has_room), asked


def test_codes_are_made_at_the_second_scan() -> None:
    coded, find, asked = _coded(5_000)
    assert coded.is_useful and not coded.is_settled
    assert find() is None and not asked
    assert find(makes=False) is None and not asked
    made = find()
    assert made is not None and coded.is_settled
    assert asked == [memory_bytes(5_000, 200)]
    # How rows are padded depends on the processor.
    assert 0.5 * asked[0] < coded.size_bytes == made.size_bytes < 1.1 * asked[0]
    assert find() is made and find(makes=False) is made
    coded.drop()
    assert coded.size_bytes == 0 and not coded.is_settled
    assert find() is None and find() is not None


def test_without_room_vectors_are_scanned() -> None:
    coded, find, asked = _coded(9_000)
    coded.expect()
    assert find() is None and find() is None
    assert len(asked) == 2 and asked[0] > 2_000_000
    assert coded.is_useful and coded.size_bytes == 0


def test_nobody_waits_for_codes_that_another_makes() -> None:
    vectors = _drawn(8, 5_000, 200, "normal")
    coded = CodesOnUse(is_useful=True)
    coded.expect()
    begun, may_end = threading.Event(), threading.Event()

    def read() -> tuple[Float32s, Float32s]:
        begun.set()
        assert may_end.wait(30)
        return vectors, _norms(vectors)

    maker = threading.Thread(target=coded.find, args=("l2", read))
    maker.start()
    assert begun.wait(30)
    assert coded.find("l2", read) is None and not coded.is_settled
    may_end.set()
    maker.join()
    assert coded.find("l2", read) is not None


def test_codes_that_are_expected_are_made_at_once() -> None:
    coded, find, _ = _coded(5_000)
    coded.expect()
    assert find() is not None


def test_few_rows_have_none() -> None:
    coded, find, _ = _coded(4_999)
    for _ in range(3):
        assert find() is None
    assert coded.is_settled and not coded.is_useful and coded.size_bytes == 0


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    ("kind", "is_useful"),
    [("unit", True), ("uneven", False), ("far query", True), ("many equal", True), ("zeros", True)],
)
def test_codes_that_tell_rows_not_apart_are_given_up(
    space: Space, kind: str, is_useful: bool
) -> None:
    """One component that takes all 8 bits. Not for a query to which float32 tells no more."""
    vectors = _drawn(12, 20_000, 64, "unit")
    query = vectors[:1].copy()
    if kind == "uneven":
        vectors[:, 0] = 30
        query = vectors[:1].copy()
    elif kind == "far query":
        query *= np.float32(1e-6 if space == "ip" else 1e6)
    elif kind == "many equal":
        vectors[::10] = query
    elif kind == "zeros":
        vectors[1::12] = 0
    segment: Any = _Vectors(vectors, np.arange(len(vectors)))
    for _ in range(2):
        scan = Scan(space, query, 10)
        scan.add(0, segment, None)
        ((_, found),) = scan.candidates()
        true = exact(space, query[0], vectors)
        assert np.sort(found.distances)[:10].tobytes() == np.sort(true)[:10].tobytes()
    assert segment.coded.is_useful == is_useful
    assert (segment.coded.size_bytes > 0) == is_useful


def test_huge_vectors_have_none() -> None:
    vectors = np.full((5_000, 2), 1e19, np.float32)
    coded = CodesOnUse(is_useful=True)
    coded.expect()
    with np.errstate(over="ignore"):
        assert coded.find("l2", lambda: (vectors, _norms(vectors))) is None
    assert not coded.is_useful


def _chunk(vectors: Float32s, memory: TailMemory, batches: list[int]) -> Chunk:
    chunk, first = Chunk(vectors.shape[1], 16, memory.share()), 0
    for count in batches:
        ids = [f"id-{row}" for row in range(first, first + count)]
        none: list[Any] = [None] * count
        own = vectors[first : first + count]
        chunk.append(ids, np.arange(first, first + count), own, none, none, none)
        chunk.freeze()
        first += count
    return chunk


def test_ranges_of_a_tail_that_lie_side_by_side_are_scanned_as_one() -> None:
    vectors = _drawn(9, 6_000, 8, "normal")
    chunk = _chunk(vectors, TailMemory(1 << 30), [3_000, 1_000, 500, 200])
    segments = [view.segment for view in chunk.freeze()]
    assert len(segments) > 2
    query = vectors[4_600:4_601]
    scan = Scan("l2", query, 20)
    for number, segment in enumerate(segments):
        scan.add(number, segment, None)
    with pytest.MonkeyPatch.context() as monkeypatch:
        products: list[int] = []
        multiply = distance.products

        def counted(*arguments: Any) -> Float32s:
            products.append(1)
            return multiply(*arguments)

        monkeypatch.setattr(scan_module, "products", counted)
        found = scan.candidates()
    assert len(products) == 1
    starts = [segment.start for segment in segments if isinstance(segment, TailSegment)]
    rows = np.concatenate([starts[number] + item.rows for number, item in found])
    seqs = np.concatenate([item.seqs for _, item in found])
    distances = np.concatenate([item.distances for _, item in found])
    order = np.lexsort((seqs, distances))[:20]
    true = exact("l2", query[0], vectors[:4_700])
    nearest = np.lexsort((np.arange(4_700), true))[:20]
    assert rows[order].tolist() == seqs[order].tolist() == nearest.tolist()
    assert distances[order].tobytes() == true[nearest].tobytes()


def test_codes_of_a_tail_are_made_ahead() -> None:
    memory = TailMemory(1 << 30)
    vectors = _drawn(10, 8_000, 128, "normal")
    chunk = _chunk(vectors, memory, [8_000])
    before = memory.size_bytes
    (view,) = chunk.freeze()
    segment = view.segment
    assert isinstance(segment, TailSegment)
    assert segment.coded.size_bytes == 0 and not segment.coded.is_settled
    segment.code_ahead("l2")
    assert segment.coded.is_settled and segment.coded.is_useful
    assert segment.coded.size_bytes > 8_000 * 128
    assert memory.size_bytes == before  # What is not needed takes no room from what is.
    assert segment.codes("l2") is segment.codes("l2") is not None


def test_a_scan_in_another_space_has_codes_of_its_own() -> None:
    vectors = _drawn(11, 50, 4, "normal")
    coded = CodesOnUse(is_useful=True)
    coded.expect()

    def find(space: Space) -> Codes | None:
        return coded.find(space, lambda: (vectors, _norms(vectors)))

    first = find("l2")
    second = find("ip")
    assert first is not None and second is not None and first is not second
    assert find("ip") is second
