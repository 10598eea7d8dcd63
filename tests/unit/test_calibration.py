"""Calibrating graphs: a curve of recall over ef that holds for queries it has not seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hnswlib
import numpy as np
import pytest
from numpy.typing import NDArray

from ochredb.configuration import IndexSettings, Space
from ochredb.errors import Corrupt
from ochredb.parts import calibration
from ochredb.parts import graph as graphs
from ochredb.parts.calibration import (
    LADDER,
    QUERIES_OF_A_KIND,
    QUERIES_OF_A_KIND_MEANWHILE,
    RECALL_ENOUGH,
    Calibration,
    Curve,
    calibrate,
    calibration_of,
    ef_for,
    list_for,
)
from ochredb.parts.manifest import Manifest
from ochredb.types import Float32s


def _no_step() -> None:
    pass


def _index(vectors: Float32s, space: Space = "l2", *, neighbors: int = 16) -> hnswlib.Index:
    settings = IndexSettings(space=space, max_neighbors=neighbors)
    return graphs.inserted(vectors, settings, threads=1, step=_no_step)


def _hard(count: int, queries: int, seed: int) -> tuple[Float32s, Float32s]:
    """Unit vectors in overlapping clusters of about 50, each of which spreads in its own way."""
    rng = np.random.default_rng(seed)
    clusters, dimension, rank = count // 50, 64, 16
    centers = 0.35 * rng.standard_normal((clusters, dimension))
    bases = rng.standard_normal((clusters, rank, dimension)) / np.sqrt(rank)
    chosen = rng.integers(0, clusters, count + queries)
    spread = rng.standard_normal((count + queries, rank))
    x = centers[chosen] + np.einsum("nr,nrd->nd", spread, bases[chosen])
    x += 0.4 * rng.standard_normal(x.shape)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x[:count].astype(np.float32), x[count:].astype(np.float32)


def _calibrate(index: Any, vectors: Float32s, **more: Any) -> Curve:
    options: dict[str, Any] = {"rows": None, "space": "l2", "seed": 1, "threads": 1}
    return calibrate(index, vectors, step=_no_step, **(options | more))


def _ef(curve: Curve, target: float) -> int:
    ef = ef_for(curve, target)
    assert ef is not None
    return ef


def _recall(
    index: hnswlib.Index, vectors: Float32s, queries: Float32s, space: Space, ef: int
) -> float:
    """Of the ten truly nearest, the share that a search with this ef finds."""
    dots = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    norms = (vectors.astype(np.float64) ** 2).sum(axis=1)
    scores = {"l2": norms - 2 * dots, "ip": -dots, "cosine": -dots / np.sqrt(norms)}[space]
    truth = np.argpartition(scores, 9, axis=1)[:, :10]
    index.set_ef(ef)
    found = index.knn_query(queries, k=10, num_threads=1)[0]
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(truth, found, strict=True))
    return hits / truth.size


# -- the curve that is read


@pytest.mark.parametrize(
    ("target", "ef"),
    [(0.0, 0), (-1.0, 0), (0.5, 50), (0.8, 50), (0.85, 75), (0.9, 100), (0.95, 156), (0.99, 200)],
)
def test_ef_for_interpolates(target: float, ef: int) -> None:
    assert ef_for(((50, 0.8), (100, 0.9), (200, 0.99)), target) == ef


@pytest.mark.parametrize("target", [0.9901, 1.0])
def test_ef_for_knows_no_list_for_more_than_was_measured(target: float) -> None:
    assert ef_for(((50, 0.8), (100, 0.9), (200, 0.99)), target) is None
    assert ef_for(((50, 0.5),), target) is None


def test_ef_for_knows_nothing_without_a_curve() -> None:
    assert ef_for((), 0.95) == 0


@pytest.mark.parametrize(
    ("target", "ef"),
    [
        (0.0, 0),
        (0.8, 61),  # 0.82, and a little for rounding.
        (0.85, 83),
        (0.9, 112),
        (0.989, 199),  # Nothing was measured for more than 0.99.
        (0.99, 200),
        (0.991, None),
    ],
)
def test_a_search_aims_at_a_tenth_fewer_misses_where_it_can(target: float, ef: int | None) -> None:
    assert list_for(((50, 0.8), (100, 0.9), (200, 0.99)), target) == ef
    assert list_for((), target) == 0


def test_ef_for_is_not_led_down_by_a_dent() -> None:
    curve = ((50, 0.8), (100, 0.9), (150, 0.85), (200, 1.0))
    assert ef_for(curve, 0.9) == 100
    assert ef_for(curve, 0.95) == 175
    efs = [_ef(curve, target / 100) for target in range(1, 101)]
    assert efs == sorted(efs)


# -- the curve that is measured


@pytest.mark.parametrize("space", ["l2", "cosine", "ip"])
def test_the_calibrated_ef_about_reaches_the_target_on_unseen_queries(space: Space) -> None:
    """The graph is poor on purpose. Strangers fare a little worse than the calibration's queries.

    How much worse: docs/decisions/0009-calibrated-graphs.md.
    """
    vectors, queries = _hard(6_000, 300, seed=7)
    index = _index(vectors, space, neighbors=5)
    curve = _calibrate(index, vectors, space=space)
    assert _recall(index, vectors, queries, space, 100) < 0.88
    assert 150 < _ef(curve, 0.95) < 600
    assert _recall(index, vectors, queries, space, _ef(curve, 0.95)) >= 0.925
    assert _recall(index, vectors, queries, space, _ef(curve, 0.97)) >= 0.95
    assert _recall(index, vectors, queries, space, _ef(curve, 0.8)) < 0.85


def test_a_curve_ascends_and_stops_when_it_is_enough() -> None:
    vectors, _ = _hard(3_000, 1, seed=3)
    index = _index(vectors)
    curve = _calibrate(index, vectors)
    efs, recalls = [ef for ef, _ in curve], [recall for _, recall in curve]
    assert efs == list(LADDER[: len(efs)])
    assert recalls == sorted(recalls)
    assert all(recall < RECALL_ENOUGH for recall in recalls[:-1])
    assert recalls[-1] >= RECALL_ENOUGH
    assert len(_calibrate(index, vectors, recall_enough=0.5)) == 1


def test_the_same_seed_gives_the_same_curve_and_another_one_another() -> None:
    vectors, _ = _hard(4_000, 1, seed=5)
    index = _index(vectors, neighbors=5)
    curve = _calibrate(index, vectors)
    assert _calibrate(index, vectors) == curve
    assert _calibrate(index, vectors, seed=2) != curve


@pytest.mark.parametrize("count", [1, 10])
def test_where_there_are_no_ten_neighbours_nothing_is_known(count: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((count, 8)).astype(np.float32)
    assert _calibrate(_index(vectors), vectors) == ()


@pytest.mark.parametrize("count", [11, 12, 60, 150])
@pytest.mark.parametrize("space", ["l2", "cosine", "ip"])
def test_tiny_graphs_are_measured_with_fewer_queries(count: int, space: Space) -> None:
    vectors = np.random.default_rng(count).standard_normal((count, 8)).astype(np.float32)
    curve = _calibrate(_index(vectors, space), vectors, space=space)
    assert curve[-1][1] >= 0.99


@pytest.mark.parametrize("space", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_vectors_are_all_as_near_as_the_tenth(space: Space, value: float) -> None:
    vectors = np.full((500, 16), value, np.float32)
    assert _calibrate(_index(vectors, space), vectors, space=space) == ((50, 1.0),)


def test_values_that_float32_cannot_square_leave_the_graph_unmeasured() -> None:
    vectors = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    vectors *= np.float32(1e30)
    assert _calibrate(_index(vectors), vectors) == ()


def test_far_from_the_origin_recall_is_measured_just_as_well() -> None:
    """Squared distances of 1 between vectors of length 3,000 are lost in a float32 product."""
    vectors, _ = _hard(2_000, 1, seed=11)
    near, far = _index(vectors, neighbors=4), _index(vectors + 400, neighbors=4)
    curves = [dict(_calibrate(near, vectors)), dict(_calibrate(far, vectors + 400))]
    assert curves[1][50] == pytest.approx(curves[0][50], abs=0.04)


class _Exact:
    """An index that always knows, and what was asked of it."""

    def __init__(self, vectors: Float32s, wrong_below_ef: int = 0) -> None:
        self._vectors, self._wrong_below_ef = vectors, wrong_below_ef
        self._ef = 0
        self.asked: dict[int, int] = {}

    def set_ef(self, ef: int) -> None:
        self._ef = ef

    def knn_query(
        self, data: Float32s, k: int = 1, num_threads: int = -1
    ) -> tuple[NDArray[np.uint64], Float32s]:
        self.asked[self._ef] = self.asked.get(self._ef, 0) + len(data)
        squares = ((self._vectors[None] - data[:, None]) ** 2).sum(axis=2)
        order = np.argsort(squares, axis=1)
        order = order[:, -k:] if self._ef < self._wrong_below_ef else order[:, :k]
        return order.astype(np.uint64), np.take_along_axis(squares, order, axis=1)


def test_dead_labels_are_neither_wanted_nor_counted() -> None:
    """Every second label is dead, and its vector is the very one of the living before it."""
    vectors = np.random.default_rng(4).standard_normal((400, 8)).astype(np.float32)
    rows = np.full(800, -1, np.int32)
    rows[::2] = np.arange(400)
    index = _Exact(np.repeat(vectors, 2, axis=0))
    assert _calibrate(index, vectors, rows=rows) == ((50, 1.0),)
    graph = _index(np.repeat(vectors, 2, axis=0))
    assert _calibrate(graph, vectors, rows=rows)[-1][1] >= 0.99


def test_grown_graphs_label_rows_in_another_order() -> None:
    vectors = np.random.default_rng(4).standard_normal((300, 8)).astype(np.float32)
    rows = np.random.default_rng(5).permutation(300).astype(np.int32)
    assert _calibrate(_Exact(vectors[rows]), vectors, rows=rows) == ((50, 1.0),)


def test_queries_are_two_hundred_of_each_kind_and_asked_until_they_are_answered() -> None:
    vectors = np.random.default_rng(6).standard_normal((500, 4)).astype(np.float32)
    index = _Exact(vectors, wrong_below_ef=300)
    curve = _calibrate(index, vectors)
    assert curve == ((50, 0.0), (100, 0.0), (150, 0.0), (200, 0.0), (300, 1.0))
    asked = {ef: count for ef, count in index.asked.items() if ef >= LADDER[0]}
    # One kind is enough where it is answered no better than the other one was before.
    assert asked == {50: 200, 100: 200, 150: 200, 200: 200, 300: 2 * QUERIES_OF_A_KIND}
    good = _Exact(vectors)
    assert _calibrate(good, vectors) == ((50, 1.0),)
    assert good.asked[50] == 2 * QUERIES_OF_A_KIND


def test_few_reachable_nodes_are_no_answers_and_no_error() -> None:
    class Broken(_Exact):
        def knn_query(
            self, data: Float32s, k: int = 1, num_threads: int = -1
        ) -> tuple[NDArray[np.uint64], Float32s]:
            if (data[:, 0] > 0).any():
                raise RuntimeError("Cannot return the results in a contiguous 2D array")
            return super().knn_query(data, k, num_threads)

    vectors = np.random.default_rng(6).standard_normal((400, 4)).astype(np.float32)
    curve = _calibrate(Broken(vectors), vectors)
    assert 0.3 < curve[-1][1] < 0.7
    assert curve[-1][0] >= len(vectors)


def test_giving_up_between_pieces_is_possible() -> None:
    class GivenUp(Exception):
        pass

    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == 20:
            raise GivenUp

    vectors, _ = _hard(5_000, 1, seed=1)
    with pytest.raises(GivenUp):
        calibrate(_index(vectors), vectors, None, "l2", seed=1, threads=1, step=step)


# -- when it is measured


class TestWhen:
    """A graph is measured anew when it has grown enough, and more thoroughly when it settles."""

    vectors = np.random.default_rng(8).standard_normal((600, 4)).astype(np.float32)

    def _of(self, before: Calibration, *, settles: bool) -> Calibration:
        return calibration_of(
            _Exact(self.vectors), self.vectors, None, "l2",
            before=before, settles=settles, seed=1, threads=1, step=_no_step,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("labels", "queries", "settles", "expected"),
        [
            (0, 0, False, QUERIES_OF_A_KIND_MEANWHILE),
            (0, 0, True, QUERIES_OF_A_KIND),
            (301, QUERIES_OF_A_KIND_MEANWHILE, False, None),
            (300, QUERIES_OF_A_KIND_MEANWHILE, False, QUERIES_OF_A_KIND_MEANWHILE),
            (590, QUERIES_OF_A_KIND_MEANWHILE, True, QUERIES_OF_A_KIND),
            (401, QUERIES_OF_A_KIND, True, None),
            (400, QUERIES_OF_A_KIND, True, QUERIES_OF_A_KIND),
            (301, QUERIES_OF_A_KIND, False, None),
        ],
    )
    def test_it_depends_on_growth_and_on_what_is_known(
        self, labels: int, queries: int, settles: bool, expected: int | None
    ) -> None:
        before = Calibration(((50, 0.5),), labels, queries) if labels else Calibration()
        after = self._of(before, settles=settles)
        if expected is None:
            assert after == before
        else:
            assert after == Calibration(((50, 1.0),), 600, expected)

    def test_what_could_not_be_measured_is_tried_again(self) -> None:
        assert self._of(Calibration((), 599, 200), settles=False).curve == ((50, 1.0),)


def test_the_cost_of_a_step_is_bounded_in_wide_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are with blocks of at most 2^18 components."""
    sizes = []
    original = calibration._extended

    def seen(space: Any, block: Float32s) -> Float32s:
        sizes.append(block.size)
        return original(space, block)

    monkeypatch.setattr(calibration, "_extended", seen)
    vectors = np.random.default_rng(0).standard_normal((900, 768)).astype(np.float32)
    _calibrate(_Exact(vectors[:, :2]), vectors[:, :2], queries_of_a_kind=20)
    assert len(sizes) == 1
    sizes.clear()
    _calibrate(_index(vectors), vectors, queries_of_a_kind=20)
    assert len(sizes) == 3
    assert max(sizes) <= 1 << 18


# -- where it is kept


def test_manifests_keep_curves_and_old_ones_have_none() -> None:
    manifest = Manifest(
        id="x", rows=5, dimension=2, graph_labels=5, seq_min=1, seq_max=5, objects=(), sections={}
    )
    old = manifest.to_json()
    assert "graph_recall" not in old
    assert Manifest.from_json(old) == manifest
    assert Manifest.from_json(old).graph_recall == ()
    measured = replace(
        manifest,
        graph_recall=((50, 0.5), (100, 1.0)),
        graph_recall_labels=4,
        graph_recall_queries=200,
    )
    assert Manifest.from_json(measured.to_json()) == measured
    with pytest.raises(Corrupt):
        Manifest.from_json(measured.to_json().replace("[50,0.5]", '[50,"high"]'))
