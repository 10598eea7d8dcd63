"""The state machine: random requests, folds, merges, collections of garbage and restarts.

After each step the answer equals the model's. One class for all drivers: `run_steps` binds it
to one. `Run` counts what a run did, so that a test can require that it did something.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from ochredb.testing import strategies
from ochredb.testing.model import HNSW_DEFAULTS, CollectionModel, Refusal, canonical

from .compare import Recall, check_equal, check_get, check_query, check_refusal
from .drivers import COLLECTIONS, DATABASE, Driver, GraphProbe

Json = dict[str, Any]
_NAMES = ("first", "second.2", "third-3")
_DIMENSIONS = (1, 2, 3, 8, 17)
_BULK_IDS = 120
RECALL_MIN = 0.9
_MORE_STEPS = 6
_STEPS_PER_EXAMPLE = 30
_SHRINK = os.environ.get("OCHREDB_STATE_SHRINK", "") == "1"
_PHASES = (Phase.generate, Phase.shrink) if _SHRINK else (Phase.generate,)
# Ids of bulk writes are asked for, changed and deleted too.
_KINDS = [
    kind
    for kind, weight in {
        "write": 7, "write_many": 3, "delete": 4, "get": 5, "query": 7, "query_all": 7,
        "everything": 2, "maintain": 8, "restart": 1, "refuse": 2, "describe": 1, "modify": 2,
        "create": 1, "drop": 1,
    }.items()
    for _ in range(weight)
]  # fmt: skip
_ids = st.one_of(strategies.ids, st.integers(0, _BULK_IDS - 1).map("bulk-{}".format))


@dataclass
class Run:
    """What one run of the machine has done."""

    driver: Callable[[str], Driver]
    probe: GraphProbe
    recall: Recall = field(default_factory=Recall)
    steps: Counter[str] = field(default_factory=Counter)

    @property
    def step_count(self) -> int:
        return self.steps["step"]


@dataclass
class Known:
    """A collection of the engine beside its model. dim: of the vectors that are sent."""

    id: str
    dim: int
    model: CollectionModel

    @property
    def path(self) -> str:
        return f"{COLLECTIONS}/{self.id}"


class Machine(RuleBasedStateMachine):
    """Bound to a run by `run_steps`."""

    run: Run

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="ochredb-machine-")
        self.driver = self.run.driver(self.directory.name)
        self.known: dict[str, Known] = {}
        self.folded = False

    def teardown(self) -> None:
        try:
            self.driver.close()
        finally:
            self.directory.cleanup()

    # One rule that draws the kind of step: hypothesis would switch off whole rules per example.
    @rule(data=st.data(), kind=st.sampled_from(_KINDS))
    def step(self, data: st.DataObject, kind: str) -> None:
        self.run.steps["step"] += 1
        getattr(self, kind)(data)

    # -- helpers

    def call(self, step: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        self.run.steps[step] += 1
        self.run.probe.reset()
        return self.driver.call(method, path, body)

    def expect(self, step: str, method: str, path: str, body: Any, expected: Refusal | int) -> Any:
        """The answer, after checking that it has the status or is the refusal."""
        status, answer = self.call(step, method, path, body)
        what = f"{method} {path} {canonical(body)}"
        if isinstance(expected, Refusal):
            check_refusal(status, answer, expected, what)
        else:
            assert status == expected, f"{what}: {status} {answer}"
        return answer

    def pick(self, data: st.DataObject) -> Known:
        return self.known[data.draw(st.sampled_from(sorted(self.known)), label="collection")]

    # -- collections

    @initialize(
        dim=st.sampled_from(_DIMENSIONS),
        hnsw=strategies.configurations,
        rows=st.sampled_from([0, 30, 80, 80, 80]),
        seed=st.integers(0, 1000),
        compact=st.sampled_from([True, True, False]),
    )
    def first_collection(self, dim: int, hnsw: Json, rows: int, seed: int, compact: bool) -> None:
        known = self._create("first", dim, hnsw, None, False)
        assert known is not None
        self._write(known, "add", bulk("add", dim, 0, rows, seed))
        if compact:
            self.driver.compactor.compact_now(known.id)

    def create(self, data: st.DataObject) -> None:
        metadata = data.draw(st.one_of(st.none(), strategies.collection_metadatas))
        self._create(
            data.draw(st.sampled_from(_NAMES)),
            data.draw(st.sampled_from(_DIMENSIONS)),
            data.draw(strategies.configurations),
            metadata,
            data.draw(st.booleans()),
        )

    def _create(
        self, name: str, dim: int, hnsw: Json, metadata: Json | None, get_or_create: bool
    ) -> Known | None:
        body = {
            "name": name,
            "configuration": {"hnsw": hnsw},
            "metadata": metadata,
            "get_or_create": get_or_create,
        }
        known = self.known.get(name)
        if known is not None and not get_or_create:
            refusal = Refusal(409, "ChromaError", f"Collection [{name}] already exists")
            self.expect("create", "POST", COLLECTIONS, body, refusal)
            return None
        answer = self.expect("create", "POST", COLLECTIONS, body, 200)
        if known is None:
            assert answer["id"] not in [other.id for other in self.known.values()]
            model = CollectionModel(name, {**HNSW_DEFAULTS, **hnsw}, metadata)
            known = self.known[name] = Known(answer["id"], dim, model)
        self._check_collection(known, answer)
        return known

    def drop(self, data: st.DataObject) -> None:
        if len(self.known) == 1:
            return
        known = self.pick(data)
        self.expect("drop", "DELETE", f"{COLLECTIONS}/{known.model.name}", None, 200)
        del self.known[known.model.name]
        gone = Refusal(404, "NotFoundError", "does not exist")
        self.expect("get", "POST", f"{known.path}/get", {}, gone)
        self.expect("add", "POST", f"{known.path}/add", {"ids": [], "embeddings": []}, gone)

    def modify(self, data: st.DataObject) -> None:
        known = self.pick(data)
        new_name = data.draw(st.one_of(st.none(), st.sampled_from(_NAMES)))
        metadata = data.draw(st.one_of(st.none(), strategies.collection_metadatas))
        hnsw = data.draw(st.one_of(st.none(), strategies.configuration_changes))
        model = known.model
        body: Json = {"new_name": new_name, "new_metadata": metadata}
        if hnsw is not None:
            body["new_configuration"] = {"hnsw": hnsw}
        if new_name not in (None, model.name) and new_name in self.known:
            refusal = Refusal(409, "ChromaError", f"Collection [{new_name}] already exists")
            self.expect("modify", "PUT", known.path, body, refusal)
        else:
            assert self.expect("modify", "PUT", known.path, body, 200) == {}
            del self.known[model.name]
            model.name = new_name or model.name
            self.known[model.name] = known
            model.metadata = metadata or model.metadata
            model.hnsw.update(hnsw or {})
        self.describe(data, known)

    def _check_collection(self, known: Known, answer: Json) -> None:
        model = known.model
        check_equal(
            [answer[name] for name in ("id", "name", "metadata", "dimension")],
            [known.id, model.name, model.metadata, model.dimension],
            "the collection",
        )
        check_equal(answer["configuration_json"]["hnsw"], model.hnsw, "configuration")
        keys = {key: set(types) for key, types in answer["schema"]["keys"].items() if key[0] != "#"}
        assert keys == model.schema_keys()
        index = answer["schema"]["keys"]["#embedding"]["float_list"]["vector_index"]["config"]
        shown = {name: index["hnsw"][name] for name in model.hnsw if name != "space"}
        check_equal({"space": index["space"], **shown}, model.hnsw, "schema")

    def describe(self, data: st.DataObject, known: Known | None = None) -> None:
        known = known or self.pick(data)
        name = known.model.name
        by_name = self.expect("describe", "GET", f"{COLLECTIONS}/{name}", None, 200)
        self._check_collection(known, by_name)
        listed = self.expect("list", "GET", COLLECTIONS, None, 200)
        assert {item["name"] for item in listed} == set(self.known)
        check_equal([item for item in listed if item["name"] == name], [by_name], "list")
        count = self.expect("list", "GET", f"{DATABASE}/collections_count", None, 200)
        check_equal(count, len(self.known), "collections_count")
        status = self.expect("status", "GET", f"{known.path}/indexing_status", None, 200)
        total = known.model.operations
        parts = status["num_indexed_ops"] + status["num_unindexed_ops"]
        assert (status["total_ops"], parts) == (total, total), status

    # -- records

    def write(self, data: st.DataObject) -> None:
        known = self.pick(data)
        verb = data.draw(st.sampled_from(["add", "upsert", "upsert", "update"]))
        self._write(known, verb, data.draw(strategies.writes(verb, known.dim, names=_ids)))

    def write_many(self, data: st.DataObject) -> None:
        known = self.pick(data)
        verb = data.draw(st.sampled_from(["add", "upsert", "update"]))
        first = data.draw(st.integers(0, _BULK_IDS - 1))
        count = data.draw(st.sampled_from([17, 40, 80]))
        seed = data.draw(st.integers(0, 1000))
        self._write(known, verb, bulk(verb, known.dim, first, count, seed))

    def _write(self, known: Known, verb: str, body: Json) -> None:
        expected: Refusal | int = 201 if verb == "add" else 200
        try:
            known.model.write(verb, body)
        except Refusal as refusal:
            expected = refusal
        answer = self.expect(verb, "POST", f"{known.path}/{verb}", body, expected)
        if isinstance(expected, int):
            assert answer == {}

    def delete(self, data: st.DataObject) -> None:
        known = self.pick(data)
        body = data.draw(strategies.deletes(names=_ids))
        deleted = known.model.delete(body)
        answer = self.expect("delete", "POST", f"{known.path}/delete", body, 200)
        check_equal(answer, {"deleted": deleted}, f"delete {body}")

    def get(self, data: st.DataObject) -> None:
        known = self.pick(data)
        body = data.draw(strategies.gets(names=_ids))
        answer = self.expect("get", "POST", f"{known.path}/get", body, 200)
        check_get(known.model, body, answer)

    def query(self, data: st.DataObject) -> None:
        known = self.pick(data)
        wrong_dim = data.draw(st.sampled_from([False] * 9 + [True]))
        self._query(known, data.draw(strategies.queries(known.dim + wrong_dim, names=_ids)))

    def query_all(self, data: st.DataObject) -> None:
        """No filter, few results: what a graph is used for."""
        known = self.pick(data)
        vector = data.draw(strategies.vectors(known.dim))
        body = {"query_embeddings": [vector.tolist()], "n_results": 5}
        self._query(known, body)

    def _query(self, known: Known, body: Json) -> None:
        try:
            known.model.query(body)
        except Refusal as refusal:
            self.expect("query", "POST", f"{known.path}/query", body, refusal)
            return
        answer = self.expect("query", "POST", f"{known.path}/query", body, 200)
        by_graph = self.run.probe.graph_uses > 0
        check_query(known.model, body, answer, by_graph, self.run.recall)

    def refuse(self, data: st.DataObject) -> None:
        known = self.pick(data)
        if known.model.dimension is None:
            return
        case = data.draw(strategies.malformed(known.dim))
        refusal = Refusal(case.status, case.error, case.message)
        self.expect("refuse", "POST", f"{known.path}/{case.verb}", case.body, refusal)

    # -- what must change no answer

    def maintain(self, data: st.DataObject) -> None:
        known = self.pick(data)
        kind = data.draw(st.sampled_from(["fold", "fold", "compact", "compact", "collect"]))
        self.run.steps[kind] += 1
        compactor = self.driver.compactor
        if kind == "fold":
            compactor.fold_now(known.id)
        elif kind == "compact":
            compactor.compact_now(known.id)
            status = self.expect("status", "GET", f"{known.path}/indexing_status", None, 200)
            assert status["num_unindexed_ops"] == 0, status
            assert status["op_indexing_progress"] == 1.0, status
        else:
            compactor.collect_now(sweep_orphans=True)

    def restart(self, _data: st.DataObject) -> None:
        if not self.driver.persistent:
            return
        self.run.steps["restart"] += 1
        self.driver.restart()

    @invariant()
    def counts_are_equal(self) -> None:
        for known in self.known.values():
            status, answer = self.driver.call("GET", f"{known.path}/count")
            check_equal([status, answer], [200, len(known.model.records)], "count")

    def everything(self, data: st.DataObject) -> None:
        """All records in full."""
        known = self.pick(data)
        body = {"include": ["embeddings", "documents", "uris", "metadatas"]}
        answer = self.expect("everything", "POST", f"{known.path}/get", body, 200)
        check_get(known.model, body, answer)


def bulk(verb: str, dim: int, first: int, count: int, seed: int) -> Json:
    """Many records at little cost: ids from `first` on, around a circle; pooled vectors."""
    rng = np.random.default_rng(seed)
    embeddings = [
        strategies.vector(
            int(rng.integers(0, 7)),
            float(rng.choice(strategies.LENGTHS)),
            float(rng.choice([0.0, 1e-6, 0.3, 1.0])),
            int(rng.integers(0, 50)),
            dim,
        )
        for _ in range(count)
    ]
    words = strategies.WORDS
    return {
        "ids": [f"bulk-{(first + number) % _BULK_IDS}" for number in range(count)],
        "embeddings": [strategies.encoded(item, True) for item in embeddings],
        "documents": [
            None if number % 7 == 0 and verb != "add" else " ".join(rng.choice(words, 3))
            for number in range(count)
        ],
        "metadatas": [
            {"i": int(rng.integers(0, 5)), "s": str(rng.choice(words)), "f": float(number) / 2}
            for number in range(count)
        ],
    }


def run_steps(
    run: Run,
    steps: float,
    number: int,
    *,
    examples: int = 6,
    until: Callable[[], bool] = lambda: True,
) -> None:
    """At least as many steps, from the seed `number` on.

    examples: of one seed, of up to 30 steps each; each begins with an empty engine. until: has
    happened what the caller wants to see? A short run goes on until it has, for six times the
    steps at most.
    """
    # Hypothesis cuts examples short now and then.
    while run.step_count < steps or (run.step_count < _MORE_STEPS * steps and not until()):
        print(f"OCHREDB_STATE_SEED={number}")
        machine: type[Machine] = seed(number)(type("BoundMachine", (Machine,), {"run": run}))
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=_STEPS_PER_EXAMPLE + 1,  # The first creates a collection.
                database=None,
                deadline=None,
                phases=_PHASES,
                suppress_health_check=list(HealthCheck),
                print_blob=True,
            ),
        )
        number += 1
    print(f"{run.step_count} steps: {dict(sorted(run.steps.items()))}")
    print(f"by graph: {run.recall.answers} answers, recall {run.recall.share:.4f}")


__all__ = ["RECALL_MIN", "Machine", "Run", "bulk", "run_steps"]
