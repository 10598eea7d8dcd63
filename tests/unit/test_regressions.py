"""Errors that were found once, each as the smallest test that shows it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import orjson
import pytest

from ochredb.cancel import Cancel
from ochredb.parts.manifest import Manifest
from ochredb.peers import QueryRequest
from ochredb.types import Op, QueryAnswer
from ochredb_compactor.config import CompactorConfig
from ochredb_node.node import Node, NodeConfig

from .kernel import ids_of, make_collection, operations, running_node, submit

_COLLECTIONS = "/api/v2/tenants/default_tenant/databases/default_database/collections"
_HEADERS = {"content-type": "application/json"}


def test_a_part_swept_before_its_commit_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compact_now raised NotFound: opening the new part for readers found that it was gone."""
    node = Node(NodeConfig(path=str(tmp_path / "store"), compactor=CompactorConfig(grace_s=0)))
    node.start(background=False)
    prepare = node.query.prepare
    swept: list[int] = []

    def sweep_first(collection: str, manifest: Manifest) -> None:
        if not swept:
            swept.append(node.compactor.collect_now(sweep_orphans=True))
        prepare(collection, manifest)

    monkeypatch.setattr(node.query, "prepare", sweep_first)
    collection = _one_record(node)
    node.compactor.compact_now(collection)
    assert swept == [1]
    assert node.query.indexing_status(collection, cancel=Cancel()).progress == 1.0
    path = f"{_COLLECTIONS}/{collection}/get"
    assert orjson.loads(node.handle("POST", path, "", _HEADERS, b"{}")[2])["ids"] == ["a"]
    node.close()


def test_a_quick_query_for_no_results_is_empty() -> None:
    """It was 500: the limit of an empty set of rows was asked for. Only over HTTP, on the loop."""
    node = Node(NodeConfig())
    node.start(background=False)
    collection = _one_record(node)
    request = QueryRequest(embeddings=np.ones((2, 2), np.float32), n_results=0)
    answer = node.query.quick(collection, request)
    assert answer is not None
    found = answer.run(Cancel())
    assert isinstance(found, QueryAnswer)
    assert [records.ids for records in found.records] == [[], []]
    node.close()


def _one_record(node: Node) -> str:
    """The id of a new collection that readers have loaded; its record is "a", [1, 2]."""
    status, _, answer = node.handle("POST", _COLLECTIONS, "", _HEADERS, b'{"name": "abc"}')
    assert status == 200
    collection = str(orjson.loads(answer)["id"])
    path = f"{_COLLECTIONS}/{collection}"
    record = orjson.dumps({"ids": ["a"], "embeddings": [[1, 2]]})
    assert node.handle("POST", f"{path}/add", "", _HEADERS, record)[0] == 201
    assert node.handle("GET", f"{path}/count", "", {}, b"")[2] == b"1"
    return collection


def test_submitters_that_come_at_once_start_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would wait for ever, and closing would wait for it."""
    with running_node() as node:
        collection = make_collection(node)
        together = threading.Barrier(8)
        started: list[threading.Thread] = []
        start = threading.Thread.start

        def slow_start(thread: threading.Thread) -> None:
            if thread.name == "ochredb-log":
                started.append(thread)
                time.sleep(0.05)  # Long enough for the others to come.
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", slow_start)

        def write(number: int) -> None:
            together.wait()
            submit(node, collection, operations(Op.ADD, [str(number)], [[1.0]]))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(8)))
        assert len(started) == 1
        assert sorted(ids_of(node, collection)) == [str(number) for number in range(8)]
