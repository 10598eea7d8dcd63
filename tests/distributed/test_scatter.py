"""Query nodes as real processes that share the parts of a collection: I5, also while one is down.

What they answer is compared, byte for byte, with a node in this process, on the same directory.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ochredb.cancel import Cancel
from ochredb.testing.server_process import free_port
from ochredb.types import Op, Operations
from ochredb_node.config import NodeConfig
from ochredb_node.node import Node

from .served import DATABASE, Served

_DIM, _PART_ROWS, _PARTS = 8, 120, 8
_NAMES = ("query-0", "query-1", "query-2")
_HEADERS = {"content-type": "application/json"}


class Cluster:
    """Three query nodes on fixed ports, one frontend with the log, and a node in this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.alone = Node(NodeConfig(path=str(folder / "data")))
        self.alone.start(background=False)
        self._ports = {name: free_port() for name in _NAMES}
        members = ",".join(f"{name}=127.0.0.1:{port}" for name, port in self._ports.items())
        self._members = ("--query-nodes", f"static:{members}")
        self.processes: dict[str, Served] = {}
        self._logs = 0
        for name in _NAMES:
            self.start(name)
        self.frontend = self._start("frontend,log", *self._members)

    def _start(self, roles: str, *arguments: str) -> Served:
        self._logs += 1
        log_path = self._folder / f"{self._logs}.log"
        where = ("--roles", roles, "--path", str(self._folder / "data"))
        return Served(log_path, *where, *arguments).ready()

    def start(self, name: str) -> None:
        self.processes[name] = self._start(
            "query", "--node-name", name, "--rpc-port", str(self._ports[name]),
            "--spread-bytes", "1", *self._members,
        )  # fmt: skip

    def close(self) -> None:
        for served in (*self.processes.values(), self.frontend):
            served.kill()
        self.alone.close()

    def ask(self, path: str, verb: str, body: Any) -> Any:
        return self.frontend.call("POST", f"{path}/{verb}", body)

    def check(self, path: str, reads: list[tuple[str, Any]]) -> None:
        for verb, body in reads:
            data = json.dumps(body).encode()
            url = f"{DATABASE}{path}/{verb}"
            status, _, expected = self.alone.handle("POST", url, "", _HEADERS, data)
            assert status == 200, expected
            found = self.frontend.http.post(url, content=data, headers=_HEADERS)
            assert found.status_code == 200, found.text
            assert found.content == expected, (verb, body)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    one = Cluster(tmp_path)
    yield one
    one.close()


def fill(cluster: Cluster) -> str:
    """A collection of some parts, and a tail that changes rows of most of them; its path."""
    made = cluster.frontend.call("POST", "/collections", {"name": "large"})
    collection = str(made["id"])
    rng = np.random.default_rng(3)
    for part in range(_PARTS):
        rows = range(part * _PART_ROWS, (part + 1) * _PART_ROWS)
        operations = Operations(
            op=Op.ADD,
            ids=[f"r{row}" for row in rows],
            embeddings=rng.standard_normal((_PART_ROWS, _DIM)).astype(np.float32),
            documents=[f"row {row} of part {part}" for row in rows],
            metadatas=[json.dumps({"n": row, "part": part}).encode() for row in rows],
        )
        cluster.alone.log.append(collection, operations, cancel=Cancel())
        cluster.alone.compactor.fold_now(collection)
    path = f"/collections/{collection}"
    change(cluster, path, random.Random(1))
    return path


def change(cluster: Cluster, path: str, rng: random.Random) -> None:
    rows = rng.sample(range(_PARTS * _PART_ROWS), 40)
    names = [f"r{row}" for row in rows]
    vectors = [[rng.uniform(-1, 1) for _ in range(_DIM)] for _ in rows]
    cluster.ask(path, "upsert", {"ids": names[:20], "embeddings": vectors[:20]})
    cluster.ask(path, "update", {"ids": names[20:30], "metadatas": [{"n": -1}] * 10})
    cluster.ask(path, "delete", {"ids": names[30:]})
    new = [f"new-{rng.randrange(10**9)}" for _ in range(5)]
    cluster.ask(path, "add", {"ids": new, "embeddings": vectors[:5]})


def reads(rng: random.Random) -> list[tuple[str, Any]]:
    everything = ["documents", "metadatas", "embeddings"]
    vectors = [[rng.uniform(-1, 1) for _ in range(_DIM)] for _ in range(3)]
    few = {"part": {"$in": [1, 4, 6]}}
    return [
        ("query", {"query_embeddings": vectors, "include": [*everything, "distances"]}),
        ("query", {"query_embeddings": vectors[:1], "n_results": 5_000}),
        ("query", {"query_embeddings": vectors[:1], "where": few, "n_results": 17}),
        ("query", {"query_embeddings": vectors[:1], "ids": ["r3", "r500", "nobody"]}),
        ("get", {"include": everything}),
        ("get", {"where": few, "limit": 30, "offset": rng.randrange(100)}),
        ("get", {"where_document": {"$contains": "7 of"}, "limit": 9}),
        ("get", {"ids": ["r900", "r1", "nobody", "r400"]}),
    ]


def nodes_of(cluster: Cluster, path: str) -> int:
    """How many nodes answered a query."""
    body = {"query_embeddings": [[0.5] * _DIM], "explain": True}
    plan = cluster.ask(path, "query", body)["plan"]
    found = [plan]
    for step in found:
        found += step["steps"]
    (scatter,) = [step for step in found if step["operator"] == "Scatter"]
    assert scatter["details"]["parts"] == _PARTS
    return int(scatter["details"]["nodes"])


@pytest.mark.timeout(300)
def test_nodes_share_a_collection_and_one_may_be_down(cluster: Cluster) -> None:
    rng = random.Random(2)
    path = fill(cluster)
    cluster.check(path, reads(rng))
    assert nodes_of(cluster, path) > 1
    for name in _NAMES:
        cluster.processes[name].kill()
        for _ in range(3):
            change(cluster, path, rng)
            cluster.check(path, reads(rng))
        cluster.start(name)
        cluster.check(path, reads(rng))
    cluster.alone.compactor.fold_now(path.rsplit("/", 1)[1])
    cluster.check(path, reads(rng))
    for served in (*cluster.processes.values(), cluster.frontend):
        assert served.stop() == 0, served.log_path.read_text()
        assert "Traceback" not in served.log_path.read_text()
