"""Writers and readers at once, while tails are folded, parts merged and garbage collected.

Each thread owns a range of ids and a model of it. Whatever a thread has been answered, its next
read must show (I4), through the same node; at the end the whole collection equals the models.

    OCHREDB_CONCURRENT_SECONDS  of each run (default 2)
    OCHREDB_CONCURRENT_SEED     to start a run from the same random numbers
"""

from __future__ import annotations

import json
import os
import random
import secrets
import threading
from typing import Any

import numpy as np
import orjson
import pytest

from ochredb.testing import strategies
from ochredb.testing.model import CollectionModel, canonical
from ochredb_compactor.config import CompactorConfig
from ochredb_node.node import Node, NodeConfig

from .compare import Recall, check_equal, check_get, check_query
from .drivers import COLLECTIONS, make_small

Json = dict[str, Any]
_SECONDS = float(os.environ.get("OCHREDB_CONCURRENT_SECONDS", "2"))
_THREADS = 4
_IDS = 60  # Of each thread.
_DIM = 4
_EVERYTHING = ["documents", "metadatas", "embeddings", "uris"]


class _Thread(threading.Thread):
    """Works until `stopping` is set; an error sets it for all."""

    def __init__(self, name: str, stopping: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self.stopping = stopping
        self.failure: BaseException | None = None

    def work(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self.work()
        except BaseException as error:
            self.failure = error
            self.stopping.set()


class Worker(_Thread):
    """One writer and reader of its own ids."""

    def __init__(self, number: int, node: Node, path: str, stop: threading.Event, seed: int):
        super().__init__(f"worker-{number}", stop)
        self.number, self.node, self.path = number, node, path
        self.model = CollectionModel("c")
        self.random = random.Random(f"{seed} {number}")
        self.vectors = np.random.default_rng((seed, number))
        self.steps = 0

    @property
    def mine(self) -> Json:
        return {"owner": self.number}

    def work(self) -> None:
        self.random.choices([self.write, self.delete, self.read], [4, 2, 4])[0]()
        self.steps += 1

    def call(self, verb: str, body: Json) -> Any:
        status, _, answer = self.node.handle(
            "POST",
            f"{self.path}/{verb}",
            "",
            {"content-type": "application/json"},
            json.dumps(body).encode(),
        )
        assert status in (200, 201), f"{verb} {body}: {status} {answer!r}"
        return orjson.loads(answer)

    def names(self, count: int) -> list[str]:
        rows = self.random.sample(range(_IDS), count)
        return [f"{self.number}-{row}" for row in rows]

    def write(self) -> None:
        verb = self.random.choice(["add", "upsert", "upsert", "update"])
        ids = self.names(self.random.choice([1, 3, 20]))
        vectors = self.vectors.standard_normal((len(ids), _DIM)).astype(np.float32)
        change: Json = {"n": self.random.randrange(5), "gone": 1 if verb == "add" else None}
        body = {
            "ids": ids,
            "embeddings": [strategies.encoded(vector, True) for vector in vectors],
            "documents": [self.random.choice(strategies.WORDS) for _ in ids],
            "metadatas": [{**self.mine, **change} for _ in ids],
        }
        assert self.call(verb, body) == {}
        self.model.write(verb, body)
        self.check({"ids": ids, "include": _EVERYTHING})

    def delete(self) -> None:
        body: Json = {"ids": self.names(self.random.choice([1, 4]))}
        if self.random.random() < 0.5:
            body = {"where": {"$and": [self.mine, {"n": self.random.randrange(5)}]}}
            body["limit"] = self.random.choice([1, 3, 100])
        expected = self.model.delete(body)
        check_equal(self.call("delete", body), {"deleted": expected}, f"delete {body}")
        self.check({"where": self.mine, "include": _EVERYTHING})

    def read(self) -> None:
        where = {"$and": [self.mine, {"n": {"$lte": self.random.randrange(5)}}]}
        if self.random.random() < 0.5:
            self.check({"where": where, "include": _EVERYTHING})
            return
        vector = self.vectors.standard_normal(_DIM).astype(np.float32)
        body = {"query_embeddings": [vector.tolist()], "where": where, "n_results": 8}
        check_query(self.model, body, self.call("query", body), False, Recall())

    def check(self, body: Json) -> None:
        check_get(self.model, body, self.call("get", body))


class Upkeep(_Thread):
    """Folds, merges and collects until told to stop."""

    def __init__(self, node: Node, collection: str, stop: threading.Event, seed: int) -> None:
        super().__init__("upkeep", stop)
        self.node, self.collection = node, collection
        self.random = random.Random(seed)
        self.rounds = 0

    def work(self) -> None:
        compactor = self.node.compactor
        match self.random.randrange(3):
            case 0:
                compactor.fold_now(self.collection)
            case 1:
                compactor.compact_now(self.collection)
            case _:
                compactor.collect_now(sweep_orphans=self.random.random() < 0.5)
        self.rounds += 1
        self.stopping.wait(self.random.choice([0.0, 0.002, 0.02]))


@pytest.mark.parametrize("background", [False, True], ids=["upkeep", "upkeep-and-background"])
@pytest.mark.parametrize("memory", [False, True], ids=["directory", "memory"])
def test_reads_see_acknowledged_writes(
    memory: bool, background: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch, graphs=False, steps=memory)
    seed = int(os.environ.get("OCHREDB_CONCURRENT_SEED", "0")) or secrets.randbits(32)
    print(f"OCHREDB_CONCURRENT_SEED={seed}")
    config = NodeConfig(
        path=None if memory else str(tmp_path / "store"),
        compactor=CompactorConfig(
            grace_s=0, tail_rows_due=30, idle_due_s=0.05, collect_period_s=0.1, graph_threads=1
        ),
    )
    node = Node(config)
    node.start(background=background)
    status, _, answer = node.handle(
        "POST", COLLECTIONS, "", {"content-type": "application/json"}, b'{"name": "shared"}'
    )
    assert status == 200
    collection = orjson.loads(answer)["id"]
    path = f"{COLLECTIONS}/{collection}"
    stop = threading.Event()
    workers = [Worker(number, node, path, stop, seed) for number in range(_THREADS)]
    upkeep = [Upkeep(node, collection, stop, seed + number) for number in range(2)]
    threads: list[_Thread] = [*workers, *upkeep]
    for thread in threads:
        thread.start()
    stop.wait(_SECONDS)
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), f"{thread.name} does not end"
    for thread in threads:
        if thread.failure is not None:
            raise AssertionError(f"{thread.name} failed") from thread.failure
    print(f"{sum(worker.steps for worker in workers)} steps, {upkeep[0].rounds} rounds of upkeep")
    for _ in range(2):
        _check_whole(workers)
        node.compactor.compact_now(collection)
    node.close()
    if not memory:
        node = Node(config)
        node.start(background=False)
        for worker in workers:
            worker.node = node
        _check_whole(workers)
        node.close()
    assert min(worker.steps for worker in workers) > 0
    assert sum(thread.rounds for thread in upkeep) > 1


def _check_whole(workers: list[Worker]) -> None:
    answer = workers[0].call("get", {"include": _EVERYTHING})
    assert len(answer["ids"]) == sum(len(worker.model.records) for worker in workers)
    for worker in workers:
        worker.check({"where": worker.mine, "include": _EVERYTHING})
        ids = [name for name in answer["ids"] if name.startswith(f"{worker.number}-")]
        assert canonical(ids) == canonical(list(worker.model.records))
