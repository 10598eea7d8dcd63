"""Clients of a simulated cluster: they write, read, try again, and tell the oracle everything."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import orjson

from ochredb.cancel import Cancel
from ochredb.catalog.namespace import DEFAULT_DATABASE, DEFAULT_TENANT
from ochredb.configuration import resolve
from ochredb.errors import (
    DeadlineExceeded,
    Exhausted,
    NotFound,
    OchreError,
    OutcomeUnknown,
    Unavailable,
)
from ochredb.peers import GetRequest, QueryRequest
from ochredb.testing.simulation.threads import SimulatedQueue
from ochredb.types import Appended, Field, Operations, QueryAnswer, Records
from ochredb.where import Compare
from ochredb_frontend.wire import Deletion

from .cluster import Cluster, Lost, Node
from .oracle import Reading, State, Value, random_write, rows

_T = TypeVar("_T")
IDS = [f"id-{number}" for number in range(8)]
NAMES = ("one", "two")
_PASSING = (Unavailable, DeadlineExceeded, Exhausted)  # Nothing was done.
_UNKNOWN = (Lost, OutcomeUnknown)
_ATTEMPTS_MAX = 8
FIELDS = Field.DOCUMENT | Field.METADATA | Field.EMBEDDING


class Client:
    """A few dozen operations, one after the other."""

    def __init__(self, cluster: Cluster, number: int, operations: int) -> None:
        self.cluster, self.number, self.operations = cluster, number, operations
        self.oracle = cluster.oracle
        self.rng = random.Random(cluster.rng.getrandbits(64))
        self.known: dict[str, str] = {}  # Names of collections and their ids.

    def run(self) -> None:
        actions: list[tuple[float, Callable[[str], None]]] = [
            (10.0, self.write),
            (1.5, self.delete_where),
            (3.0, self.get),
            (1.0, self.get_some),
            (1.0, self.count),
            (1.5, self.get_where),
            (1.5, self.search),
            (0.15, self.drop),
        ]
        weights, choices = zip(*actions, strict=True)
        for step in range(self.operations):
            self.step = step
            name = self.rng.choice(NAMES)
            collection = self.known.get(name) or self.create(name)
            if collection is None:
                continue
            action = self.rng.choices(choices, weights)[0]
            try:
                action(collection)
            except NotFound as error:
                if not self.oracle.collections[collection].is_dropped:
                    self.oracle.violated(f"{action.__name__}: {error}")
                self.known.pop(name, None)
            self.cluster.scheduler.sleep(self.rng.expovariate(20.0))

    def server(self) -> Node:
        while not self.cluster.servers:
            self.cluster.scheduler.sleep(0.1)
        return self.rng.choice(self.cluster.servers)

    def again(self, work: Callable[[Node], _T]) -> _T | None:
        """Of something that may be repeated: until it is answered, or for too long."""
        for _ in range(_ATTEMPTS_MAX):
            node = self.server()
            try:
                return self.cluster.call(node, partial(work, node))
            except (*_PASSING, *_UNKNOWN):
                self.cluster.scheduler.sleep(self.rng.expovariate(5.0))
        return None

    # -- collections

    def create(self, name: str) -> str | None:
        configuration, schema = resolve(None, {"hnsw": {"space": "l2"}}, None, num_threads=1)
        info = self.again(
            lambda node: node.namespace.create_collection(
                DEFAULT_TENANT,
                DEFAULT_DATABASE,
                name,
                configuration=configuration,
                schema=schema,
                metadata=None,
                get_or_create=True,
            )
        )
        if info is None:
            return None
        if info.id not in self.oracle.collections:
            self.oracle.violated(f"I1: collection {info.id} was created, and is not there")
        self.known[name] = info.id
        return info.id

    def drop(self, collection: str) -> None:
        name = next(name for name, known in self.known.items() if known == collection)
        node = self.server()
        try:
            self.cluster.call(
                node,
                lambda: node.namespace.delete_collection(DEFAULT_TENANT, DEFAULT_DATABASE, name),
            )
        except (NotFound, *_PASSING, *_UNKNOWN):
            return
        self.known.pop(name)

    # -- writes

    def write(self, collection: str) -> None:
        token = f"client {self.number} write {self.step}"
        sent = random_write(self.rng, token, IDS)
        key = f"key-{self.number}-{self.step}" if self.rng.random() < 0.7 else None
        by_submit = self.rng.random() < 0.5
        doubtful = False
        if key is not None and self.rng.random() < 0.15:  # Sent twice, as by an impatient proxy.
            doubtful = True
            again = partial(self._append_once, collection, sent, key)
            self.cluster.scheduler.spawn(self.cluster.world, again)
        for _ in range(_ATTEMPTS_MAX):
            node = self.server()
            try:
                appended = self.cluster.call(
                    node,
                    partial(self._append, node, collection, sent, key, by_submit),
                )
            except _PASSING:
                pass
            except _UNKNOWN:
                doubtful = True
                if key is None:
                    return
            else:
                self.oracle.acknowledged(
                    collection, appended.first_offset, appended.last_offset, sent
                )
                return
            self.cluster.scheduler.sleep(self.rng.expovariate(5.0))
        if not doubtful:
            self.oracle.refused(sent)

    def _append_once(self, collection: str, sent: Operations, key: str) -> None:
        """Beside another attempt with the same key."""
        node = self.server()
        try:
            appended = self.cluster.call(
                node, partial(self._append, node, collection, sent, key, False)
            )
        except (NotFound, *_PASSING, *_UNKNOWN):
            return
        self.oracle.acknowledged(collection, appended.first_offset, appended.last_offset, sent)

    def _append(
        self, node: Node, collection: str, sent: Operations, key: str | None, by_submit: bool
    ) -> Appended:
        cancel = Cancel(30.0, node.clock)
        if not by_submit:
            return node.written_to.append(collection, sent, idempotency_key=key, cancel=cancel)
        outcomes = SimulatedQueue(self.cluster.scheduler)
        node.written_to.submit(
            collection, sent, idempotency_key=key, cancel=cancel, deliver=outcomes.put
        )
        outcome = outcomes.get()
        if isinstance(outcome, BaseException):
            raise outcome
        assert isinstance(outcome, Appended)
        return outcome

    def delete_where(self, collection: str) -> None:
        number = self.rng.randint(0, 9)
        deletion = Deletion(
            collection,
            None,
            Compare("n", "$gte", number),
            None,
            f"key-{self.number}-{self.step}",
            f"where n >= {number}".encode(),
        )
        reading = self.oracle.begin(collection)
        deleted = self.again(lambda node: node.frontend.delete(deletion, Cancel(30.0, node.clock)))
        if deleted is None:
            return
        truth = reading.truth
        first = truth.keys.get(deletion.idempotency_key or "")
        if first is None:
            if deleted:
                self.oracle.violated(f"I1: {deleted} deletions acknowledged, none written")
            self.oracle.end(reading, "delete where", lambda state: not _matching(state, number))
            return
        found, wanted = truth.requests[first].ids, _matching(truth.before(first), number)
        if found != wanted or deleted != len(wanted):
            self.oracle.violated(
                f"I4: delete where at {first}: {deleted} as {found} instead of {wanted}"
            )
        truth.acknowledged = max(truth.acknowledged, first + len(found) - 1)

    # -- reads

    def read(
        self,
        collection: str,
        what: str,
        work: Callable[[Node], _T],
        agrees: Callable[[_T, State], bool],
    ) -> None:
        reading: Reading = self.oracle.begin(collection)
        try:
            answer = self.again(work)
        except NotFound:
            raise
        except OchreError as error:
            self.oracle.failed(reading, what, error)
            return
        if answer is not None:
            self.oracle.end(reading, what, lambda state: agrees(answer, state))

    def _get(self, collection: str, request: GetRequest) -> Callable[[Node], Records]:
        quickly = self.rng.random() < 0.5

        def work(node: Node) -> Records:
            cancel = Cancel(30.0, node.clock)
            found = node.query.quick(collection, request) if quickly else None
            if found is None:
                return node.query.get(collection, request, cancel=cancel)
            answer = found.run(cancel)
            assert isinstance(answer, Records)
            return answer

        return work

    def get(self, collection: str) -> None:
        request = GetRequest(fields=FIELDS)
        self.read(
            collection,
            "get",
            self._get(collection, request),
            lambda answer, state: shows(answer, rows(state)),
        )

    def get_some(self, collection: str) -> None:
        chosen = self.rng.sample(IDS, 3)
        self.read(
            collection,
            "get by id",
            self._get(collection, GetRequest(ids=chosen, fields=FIELDS)),
            lambda answer, state: shows(answer, [row for row in rows(state) if row[0] in chosen]),
        )

    def get_where(self, collection: str) -> None:
        number = self.rng.randint(0, 9)
        self.read(
            collection,
            "get where",
            self._get(
                collection, GetRequest(where=Compare("n", "$gte", number), fields=Field.NONE)
            ),
            lambda answer, state: answer.ids == _matching(state, number),
        )

    def count(self, collection: str) -> None:
        self.read(
            collection,
            "count",
            lambda node: node.query.count(collection, cancel=Cancel(30.0, node.clock)),
            lambda answer, state: answer == len(state),
        )

    def search(self, collection: str) -> None:
        vector = [self.rng.randint(0, 9), self.rng.randint(0, 9)]
        request = QueryRequest(embeddings=np.array([vector], np.float32), n_results=3)
        self.read(
            collection,
            "query",
            lambda node: node.query.query(collection, request, cancel=Cancel(30.0, node.clock)),
            lambda answer, state: _found(answer) == _nearest(state, vector, 3),
        )


def _matching(state: State, number: int) -> list[str]:
    return [
        name for name, value in rows(state) if value.number is not None and value.number >= number
    ]


def shows(answer: Records, expected: Sequence[tuple[str, Value]]) -> bool:
    assert answer.documents is not None and answer.metadatas is not None
    assert answer.embeddings is not None
    if answer.ids != [name for name, _ in expected]:
        return False
    for place, (_, value) in enumerate(expected):
        metadata = answer.metadatas[place]
        number = None if metadata is None else orjson.loads(metadata)["n"]
        vector = tuple(answer.embeddings[place].tolist())
        if (answer.documents[place], number, vector) != value[1:]:
            return False
    return True


def _found(answer: QueryAnswer) -> list[tuple[str, float]]:
    pairs = zip(answer.records[0].ids, answer.distances[0].tolist(), strict=True)
    return list(pairs)


def _nearest(state: State, vector: Sequence[float], count: int) -> list[tuple[str, float]]:
    ranked = sorted(
        (sum((a - b) ** 2 for a, b in zip(value.vector, vector, strict=True)), value.seq, name)
        for name, value in state.items()
    )
    return [(name, float(distance)) for distance, _, name in ranked[:count]]
