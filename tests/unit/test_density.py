"""Graphs become denser where their calibration says that they are hard to search."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ochredb.catalog.versions import VersionPart
from ochredb.configuration import IndexSettings, resolve
from ochredb.parts import density
from ochredb.parts.calibration import Calibration, Curve, calibrate, ef_for
from ochredb.parts.density import built, neighbors_for
from ochredb.types import Float32s, Op
from ochredb_compactor import scheduler
from ochredb_node.node import Node

from .kernel import append, operations, running_node

_TENANT = ("default_tenant", "default_database")
_EASY: Curve = ((50, 0.99),)
_NEVER: Curve = ((50, 0.4), (3_200, 0.9))


def _hard(count: int, seed: int = 1) -> Float32s:
    """Gaussian, without structure, of many dimensions: near rows are hardly nearer than others."""
    return np.random.default_rng(seed).standard_normal((count, 96)).astype(np.float32)


def _easy(count: int, seed: int = 1) -> Float32s:
    """Of 96 components, on a curved sheet of 4 dimensions."""
    rng = np.random.default_rng(seed)
    flat = rng.standard_normal((count, 4))
    sheet = flat @ rng.standard_normal((4, 96)) + np.sin(flat @ rng.standard_normal((4, 96)))
    return sheet.astype(np.float32)


# -- what is decided


@pytest.mark.parametrize(
    ("curve", "known", "labels", "neighbors"),
    [
        ((), 0, 100_000, 16),
        (_EASY, 10_000, 10_000_000, 16),
        (((50, 0.8), (100, 0.95)), 20_000, 20_000, 16),
        (((50, 0.8), (100, 0.95)), 20_000, 40_000, 16),
        (((50, 0.8), (100, 0.95)), 20_000, 100_000, 16),  # 200 expected: not more.
        (((50, 0.8), (101, 0.95)), 20_000, 100_000, 24),
        (((50, 0.8), (200, 0.95)), 20_000, 10_000, 16),  # Fewer than were measured.
        (((50, 0.5), (300, 0.95)), 20_000, 10_000_000, 24),  # Foretold for four times as many.
        (((50, 0.5), (400, 0.95)), 20_000, 80_000, 32),
        (_NEVER, 20_000, 20_000, 32),
    ],
)
def test_the_longer_the_list_that_is_expected_the_more_neighbours(
    curve: Curve, known: int, labels: int, neighbors: int
) -> None:
    assert neighbors_for(IndexSettings(), Calibration(curve, known, 100), labels) == neighbors


def test_a_graph_is_never_made_thinner() -> None:
    assert neighbors_for(IndexSettings(), Calibration(_EASY, 100, 100), 100, present=24) == 24


@pytest.mark.parametrize("asked", [4, 15, 17, 48])
def test_who_asks_for_a_number_gets_it(asked: int) -> None:
    settings = IndexSettings(max_neighbors=asked)
    assert neighbors_for(settings, Calibration(_NEVER, 100, 100), 1_000) == asked
    assert neighbors_for(settings, Calibration(_NEVER, 100, 100), 1_000, present=16) == max(
        asked, 16
    )


# -- a new graph


def _no_step() -> None:
    pass


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at after 500 rows; hard if a list of 60 finds less than nearly all."""
    monkeypatch.setattr(density, "_FIRST_ROWS", 500)
    monkeypatch.setattr(density, "_RECALL", 0.9975)
    monkeypatch.setattr(density, "_STEPS", ((60, 24),))


def _curve(index: Any, vectors: Float32s) -> Curve:
    return calibrate(index, vectors, None, "l2", seed=1, threads=1, step=_no_step)


@pytest.mark.usefixtures("early")
def test_a_new_graph_is_measured_as_it_is_built_and_made_denser() -> None:
    vectors = _hard(3_000)
    index = built(vectors, IndexSettings(), Calibration(), threads=1, step=_no_step)
    assert index.M == 24
    assert index.get_current_count() == len(vectors)
    labels, distances = index.knn_query(vectors, k=1, num_threads=1)
    assert np.mean((labels[:, 0] == np.arange(3_000)) & (distances[:, 0] == 0.0)) > 0.95
    as_configured = replace(IndexSettings(), max_neighbors=15)  # Asked for: as it is.
    thin = built(vectors, as_configured, Calibration(), threads=1, step=_no_step)
    assert thin.M == 15
    needed = ef_for(_curve(index, vectors), 0.98)
    assert needed is not None
    assert needed < 0.85 * (ef_for(_curve(thin, vectors), 0.98) or math.inf)


@pytest.mark.usefixtures("early")
def test_a_new_graph_of_easy_vectors_stays_as_it_was() -> None:
    vectors = _easy(3_000)
    index = built(vectors, IndexSettings(), Calibration(), threads=1, step=_no_step)
    assert index.M == 16
    assert index.get_current_count() == 3_000


@pytest.mark.parametrize(("count", "measured"), [(600, []), (2_100, [500]), (4_000, [500, 2_000])])
@pytest.mark.usefixtures("early")
def test_it_is_measured_at_fourfold_sizes(
    count: int, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(index: Any, vectors: Float32s, *_: Any, **_more: Any) -> Curve:
        assert index.get_current_count() == len(vectors)
        sizes.append(len(vectors))
        return _EASY

    monkeypatch.setattr(density, "calibrate", counted)
    built(_easy(count), IndexSettings(), Calibration(), threads=1, step=_no_step)
    assert sizes == measured
    sizes.clear()
    built(_easy(count), IndexSettings(max_neighbors=8), Calibration(), threads=1, step=_no_step)
    assert sizes == [], "nothing would follow from it"
    known = Calibration(_NEVER, count, 100)
    index = built(_easy(count), IndexSettings(), known, threads=1, step=_no_step)
    assert (index.M, sizes) == (24, []), "of the graph that is replaced all is known"


def test_building_may_be_given_up_between_pieces() -> None:
    class GivenUpError(Exception):
        pass

    def give_up() -> None:
        raise GivenUpError

    with pytest.raises(GivenUpError):
        built(_easy(100), IndexSettings(), Calibration(), threads=1, step=give_up)


# -- through merges


def _collection(node: Node, **hnsw: int) -> str:
    configuration, schema = resolve(None, {"hnsw": hnsw}, None, num_threads=2)
    return node.namespace.create_collection(
        *_TENANT, "made", configuration=configuration, schema=schema, metadata=None,
        get_or_create=False,
    ).id  # fmt: skip


def _add(node: Node, collection: str, vectors: Float32s, start: int, stop: int) -> None:
    ids = [f"id-{number}" for number in range(start, stop)]
    append(node, collection, operations(Op.ADD, ids, vectors[start:stop]))
    node.compactor.compact_now(collection)


def _graph(node: Node, collection: str) -> VersionPart:
    version = node.logs.snapshot(collection).version
    (part,) = [p for p in node.versions.parts(collection, version) if p.manifest.has_graph]
    return part


@pytest.mark.usefixtures("early")
def test_a_hard_graph_grows_denser_and_is_built_anew_as_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 1)
    monkeypatch.setattr(scheduler, "GRAPH_ROWS_MIN", 400)
    vectors = _hard(2_700)
    with running_node() as node:
        collection = _collection(node)
        _add(node, collection, vectors, 0, 900)
        assert _graph(node, collection).manifest.graph_neighbors == 16
        _add(node, collection, vectors, 900, 2_700)
        grown = _graph(node, collection).manifest
        assert grown.graph_neighbors == 24
        assert grown.graph_labels == node.compactor.graph_insertions == 2_700, "once each"
        part = node.open_parts.open(grown, IndexSettings())
        assert part.graph_neighbors == part.graph_index().M == 24
        ids = [f"id-{number}" for number in range(0, 2_700, 3)]
        append(node, collection, operations(Op.DELETE, ids))
        node.compactor.compact_now(collection)
        again = _graph(node, collection).manifest
        assert again.graph_labels == 1_800
        assert again.graph_neighbors == 24


@pytest.mark.usefixtures("early")
def test_settings_that_were_asked_for_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 1)
    monkeypatch.setattr(scheduler, "GRAPH_ROWS_MIN", 400)
    vectors = _hard(2_700)
    with running_node() as node:
        collection = _collection(node, max_neighbors=12)
        _add(node, collection, vectors, 0, 900)
        _add(node, collection, vectors, 900, 2_700)
        assert _graph(node, collection).manifest.graph_neighbors == 12
