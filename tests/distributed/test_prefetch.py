"""A hint through Redis has a node open a new version before anybody reads it; without, reads do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ochredb.cancel import Cancel
from ochredb.hints.link import RedisConfig
from ochredb.parts.reader import Part
from ochredb.peers import QueryRequest
from ochredb_compactor import scheduler
from ochredb_compactor.config import CompactorConfig
from ochredb_node.config import NodeConfig
from ochredb_node.node import Node
from ochredb_node.roles import Role
from tests.components.redis import RedisServer
from tests.unit.kernel import add_rows, make_collection

_DIM, _ROWS = 16, 2_000


@contextlib.contextmanager
def _node(path: Path, url: str, *roles: Role) -> Iterator[Node]:
    config = NodeConfig(
        path=str(path),
        roles=frozenset(roles),
        redis=RedisConfig(url=url, timeout_s=1.0),
        compactor=CompactorConfig(paused=True),  # Only when it is told to.
    )
    node = Node(config)
    node.start()
    try:
        yield node
    finally:
        node.close()


def _search(node: Node, collection: str) -> list[str]:
    request = QueryRequest(embeddings=np.zeros((1, _DIM), np.float32))
    return node.query.query(collection, request, cancel=Cancel()).records[0].ids


def _opened(node: Node) -> list[Part]:
    return [part for part in node.open_parts._parts.values() if part.graph_is_loaded]


@pytest.mark.timeout(120)
def test_a_reader_is_told_of_a_new_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 1)
    monkeypatch.setattr(scheduler, "GRAPH_PART_ROWS_MAX", 1)  # A part for each fold.
    redis = RedisServer.start(tmp_path / "redis")
    data = tmp_path / "data"
    writes = (Role.LOG, Role.COMPACTOR)
    try:
        with (
            _node(data, redis.url, *writes) as writer,
            _node(data, redis.url, Role.QUERY) as reader,
        ):
            collection = make_collection(writer)
            add_rows(writer, collection, 0, _ROWS, _DIM)
            writer.compactor.compact_now(collection)
            _search(reader, collection)
            assert len(_opened(reader)) == 1
            add_rows(writer, collection, _ROWS, _ROWS, _DIM)
            writer.compactor.compact_now(collection)
            until_s = time.monotonic() + 60
            while len(_opened(reader)) < 2:
                assert time.monotonic() < until_s, "nobody told the reader, or it did not listen"
                time.sleep(0.02)
            assert reader.query.count(collection, cancel=Cancel()) == 2 * _ROWS
            assert len(_search(reader, collection)) == 10
            redis.stop()
            add_rows(writer, collection, 2 * _ROWS, _ROWS, _DIM)
            writer.compactor.compact_now(collection)
            assert reader.query.count(collection, cancel=Cancel()) == 3 * _ROWS
            assert len(_search(reader, collection)) == 10
            assert len(_opened(reader)) == 3
    finally:
        redis.stop()
