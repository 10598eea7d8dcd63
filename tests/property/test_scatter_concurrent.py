"""Shares of one read are of one snapshot, while others write, fold, merge and collect. (I3, I4)

A writer moves amounts between records, two in one request; so the sum of all never changes, though
the two lie in parts of different nodes, or in the tail. And it counts: who begins to read after a
write was acknowledged sees at least its number.
"""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ochredb.cancel import Cancel
from ochredb.configuration import resolve
from ochredb.peers import GetRequest, QueryRequest
from ochredb.types import Field, Op, Operations
from ochredb_compactor import scheduler
from ochredb_node.node import Node
from ochredb_query.config import QueryConfig

from .drivers import node_config
from .query_nodes import QueryNodes

_RECORDS, _DIM, _MOVES, _READERS = 120, 4, 150, 3


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", range(2))
def test_no_read_sees_half_of_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 1 << 60)
    monkeypatch.setattr(scheduler, "TIER_ROWS_MIN", 4)
    rng = random.Random(number)
    node = Node(node_config(str(tmp_path / "store")))
    node.start(background=False)
    nodes = QueryNodes(node, _READERS, QueryConfig(spread_bytes=0))
    configuration, schema = resolve(None, {"hnsw": {"space": "l2"}}, None, num_threads=1)
    collection = node.namespace.create_collection(
        "default_tenant", "default_database", "accounts", configuration=configuration,
        schema=schema, metadata=None, get_or_create=False,
    ).id  # fmt: skip
    held = dict.fromkeys(range(_RECORDS), 0)
    acknowledged, ended = 0, threading.Event()
    checked = [0] * _READERS

    def write(op: Op, records: list[int], move: int) -> None:
        vectors = np.array([[record, 1, 2, 3] for record in records], np.float32)
        operations = Operations(
            op=op,
            ids=[f"r{record}" for record in records],
            embeddings=None if op is Op.UPDATE else vectors,
            metadatas=[
                json.dumps({"held": held[record], "move": move}).encode() for record in records
            ],
        )
        node.log.append(collection, operations, cancel=Cancel())

    for first in range(0, _RECORDS, 20):
        write(Op.ADD, list(range(first, first + 20)), 0)
        node.compactor.fold_now(collection)

    def read(reader: int) -> None:
        service = nodes.services[reader]
        while not ended.is_set() or not checked[reader]:
            at_least = acknowledged
            if checked[reader] % 2:
                request = GetRequest(fields=Field.METADATA)
                found = service.get(collection, request, cancel=Cancel(60.0))
            else:
                nearest = QueryRequest(
                    embeddings=np.ones((1, _DIM), np.float32), n_results=1_000,
                    fields=Field.METADATA,
                )  # fmt: skip
                found = service.query(collection, nearest, cancel=Cancel(60.0)).records[0]
            assert found.metadatas is not None
            metadatas = [json.loads(each or b"") for each in found.metadatas]
            assert sorted(found.ids) == sorted(f"r{record}" for record in range(_RECORDS))
            assert sum(each["held"] for each in metadatas) == 0
            assert max(each["move"] for each in metadatas) >= at_least
            checked[reader] += 1

    def maintain() -> None:
        while not ended.is_set():
            node.compactor.fold_now(collection)
            node.compactor.compact_now(collection)
            node.compactor.collect_now(sweep_orphans=True)

    with ThreadPoolExecutor(_READERS + 1) as pool:
        others = [pool.submit(read, reader) for reader in range(_READERS)]
        others.append(pool.submit(maintain))
        try:
            for move in range(1, _MOVES + 1):
                one, other = rng.sample(range(_RECORDS), 2)
                amount = rng.randrange(1, 100)
                held[one] -= amount
                held[other] += amount
                write(rng.choice([Op.UPDATE, Op.UPSERT]), [one, other], move)
                acknowledged = move
        finally:
            ended.set()
        for each in others:
            each.result()
    assert all(checked)
    assert sum(nodes.shares()) > 0
    nodes.close()
    node.close()
