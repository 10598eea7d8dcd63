"""How often a vector enters a graph, counted, under the compactor's own policies."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from ochredb.cancel import Cancel
from ochredb.metrics import Metrics
from ochredb.parts.reader import Part
from ochredb.peers import QueryRequest
from ochredb.types import Op
from ochredb_compactor import scheduler
from ochredb_node.node import Node

from .kernel import ManualClock, append, make_collection, operations, running_node

ROWS, DIMENSION, BATCH = 30_000, 32, 500
INSERTIONS_PER_ROW_MAX = 1.6


def _write(node: Node, collection: str, op: Op, first: int, count: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype(np.float32)
    ids = [f"id-{number}" for number in range(first, first + count)]
    append(node, collection, operations(op, ids, vectors))


def _work(node: Node, clock: ManualClock) -> None:
    """What the two threads do in one round."""
    clock.advance(0.1)
    node.compactor._compact_due()
    node.compactor._merge_due()


def test_a_stored_row_enters_a_graph_at_most_1_6_times(monkeypatch: pytest.MonkeyPatch) -> None:
    # As many growths as if vectors had 320 components; the rest is as configured.
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", scheduler.GRAPH_COMPONENTS_MIN // 10)
    clock = ManualClock()
    with running_node(clock=clock) as node:
        collection = make_collection(node)
        for first in range(0, ROWS, BATCH):
            _write(node, collection, Op.ADD, first, BATCH, first)
            _work(node, clock)
        for _ in range(20):
            clock.advance(1.0)
            _work(node, clock)
        assert node.logs.status(collection)[2] == 0
        parts = node.versions.parts(collection, node.logs.snapshot(collection).version)
        graph = max(parts, key=lambda part: part.manifest.graph_labels).manifest
        assert graph.graph_labels >= 0.8 * ROWS
        assert graph.graph_labels <= node.compactor.graph_insertions
        assert node.compactor.graph_insertions <= ROWS  # Only added to: once each.
        assert graph.graph_recall[0][0] == 50
        assert graph.graph_labels / 2 < graph.graph_recall_labels <= graph.graph_labels

        for first in range(0, ROWS // 10, BATCH):  # A tenth of them is replaced.
            _write(node, collection, Op.UPSERT, first, BATCH, ROWS + first)
            _work(node, clock)
        node.compactor.compact_now(collection)
        assert ROWS < node.compactor.graph_insertions <= INSERTIONS_PER_ROW_MAX * ROWS


def test_readers_go_on_with_the_graph_that_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Putting it together again would be for nothing; what is read back answers the same."""
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 1)
    loads: list[str] = []
    load = Part.graph_index

    def counted(part: Part, *, room: int = 0, max_neighbors: int = 0) -> Any:
        if not room:  # Else it is going to be grown.
            loads.append(part.id)
        return load(part, room=room, max_neighbors=max_neighbors)

    monkeypatch.setattr(Part, "graph_index", counted)
    queries = np.random.default_rng(0).standard_normal((20, DIMENSION)).astype(np.float32)
    request = QueryRequest(embeddings=queries, n_results=10)
    with running_node() as node:
        collection = make_collection(node)
        for first in (0, 3_000):  # A new graph, then a grown one with dead labels.
            _write(node, collection, Op.ADD, first, 3_000, first)
            append(node, collection, operations(Op.DELETE, [f"id-{first + i}" for i in range(50)]))
            node.query.query(collection, request, cancel=Cancel())
            node.compactor.compact_now(collection)
            answer = node.query.query(collection, request, cancel=Cancel())
            assert not loads
            node.query.drop(collection)
            gc.collect()
            again = node.query.query(collection, request, cancel=Cancel())
            assert len(loads) == 1
            loads.clear()
            assert [one.ids for one in again.records] == [one.ids for one in answer.records]


def test_counters_are_shown_in_full() -> None:
    metrics = Metrics()
    metrics.counter("ochredb_graph_insertions_total", "Insertions.", lambda: 12_345_678)
    lines = metrics.text().decode().splitlines()
    assert "# TYPE ochredb_graph_insertions_total counter" in lines
    assert "ochredb_graph_insertions_total 12345678" in lines
