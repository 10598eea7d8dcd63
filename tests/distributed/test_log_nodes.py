"""Two log nodes on one PostgreSQL: dense, exactly once, exact limits, nobody kept (I1-I3, I8)."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest

from ochredb.cancel import Cancel
from ochredb.catalog.appends import BacklogLimits
from ochredb.catalog.logs import LogTable
from ochredb.catalog.migrate_postgres import open_postgres
from ochredb.catalog.namespace import LOCK_LOG, Namespace
from ochredb.catalog.postgres import PostgresDatabase
from ochredb.clock import SystemClock
from ochredb.configuration import resolve
from ochredb.errors import Exhausted, NotFound, OutcomeUnknown, Unavailable
from ochredb.ids import IdSource
from ochredb.replay import read_operations
from ochredb.storage.memory import MemoryStore
from ochredb.types import Appended, Op, Operations
from ochredb_log.config import LogConfig
from ochredb_log.service import LogService
from tests.components.postgres import PostgresServer
from tests.unit.kernel import unexpected

CLOCK, IDS = SystemClock(), IdSource()
LARGE = 1_000  # Rows of a request that goes to the object store.
WAIT_S = 60.0
_CONNECTIONS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'ochredb'"


@dataclass
class LogNode:
    """What a process of the log role has."""

    database: PostgresDatabase
    logs: LogTable
    log: LogService
    namespace: Namespace

    def close(self) -> None:
        self.log.close()
        self.database.close()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(CLOCK)


@pytest.fixture
def start(
    postgres: PostgresServer, store: MemoryStore, request: pytest.FixtureRequest
) -> Iterator[Callable[..., LogNode]]:
    """Log nodes that share an empty catalog and a store."""
    url = postgres.create_database(f"log{IDS.uuid7()}")
    started: list[LogNode] = []

    def start(limits: BacklogLimits | None = None, **config: Any) -> LogNode:
        database, _ = open_postgres(url, CLOCK, IDS)
        logs = LogTable(database, CLOCK, limits or BacklogLimits())
        log = LogService(database, logs, store, IDS, LogConfig(**config))
        namespace = Namespace(database, CLOCK, IDS)
        namespace.ensure_defaults()
        started.append(LogNode(database, logs, log, namespace))
        return started[-1]

    yield start
    for node in started:
        node.close()


def _collection(node: LogNode, name: str = "records") -> str:
    configuration, schema = resolve(None, {"hnsw": {"space": "l2"}}, None, num_threads=1)
    return node.namespace.create_collection(
        "default_tenant", "default_database", name,
        configuration=configuration, schema=schema, metadata=None, get_or_create=False,
    ).id  # fmt: skip


def _add(name: str, rows: int = 1) -> Operations:
    ids = [f"{name}/{number}" for number in range(rows)]
    return Operations(op=Op.ADD, ids=ids, embeddings=np.ones((rows, 16), np.float32))


def _append(node: LogNode, collection: str, operations: Operations, **more: Any) -> Appended:
    return node.log.append(collection, operations, cancel=Cancel(WAIT_S, CLOCK), **more)


def _submit(node: LogNode, collection: str, operations: Operations, **more: Any) -> Appended:
    told: list[Appended | BaseException] = []
    done = threading.Event()

    def deliver(outcome: Appended | BaseException) -> None:
        told.append(outcome)
        done.set()

    cancel = Cancel(WAIT_S, CLOCK)
    node.log.submit(collection, operations, cancel=cancel, deliver=deliver, **more)
    assert done.wait(WAIT_S)
    (outcome,) = told
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _log(node: LogNode, store: MemoryStore, collection: str) -> list[tuple[int, list[str]]]:
    """First offsets and ids of all requests, read back."""
    snapshot = node.logs.snapshot(collection)
    last, dimension = snapshot.last_offset, snapshot.dimension
    found = read_operations(node.logs, store, collection, 1, last, dimension, unexpected)
    return [(first, list(operations.ids)) for first, operations in found]


def _is_dense(log: list[tuple[int, list[str]]]) -> bool:
    expected = 1
    for first, ids in log:
        if first != expected:
            return False
        expected += len(ids)
    return True


def test_two_nodes_write_the_same_and_other_collections(
    start: Callable[..., LogNode], store: MemoryStore
) -> None:
    nodes = [start(), start()]
    collections = [_collection(nodes[0], name) for name in ("one", "two", "three")]

    def write(writer: int) -> list[tuple[str, Appended, list[str]]]:
        rng, done = random.Random(writer), []
        for number in range(25):
            node, collection = nodes[writer % 2], rng.choice(collections)
            operations = _add(f"{writer}-{number}", LARGE if rng.random() < 0.1 else 1 + number % 3)
            send = rng.choice((_append, _submit))
            done.append((collection, send(node, collection, operations), operations.ids))
        return done

    with ThreadPoolExecutor(8) as pool:
        acknowledged = [item for done in pool.map(write, range(8)) for item in done]
    reader = start()
    for collection in collections:
        log = _log(reader, store, collection)
        assert _is_dense(log)
        assert dict(log) == {
            told.first_offset: ids for where, told, ids in acknowledged if where == collection
        }
    objects = {item.key for item in store.list("fragments/")}
    assert objects, "large ones went to the store"


@pytest.mark.parametrize("large", [False, True])
def test_exactly_once_while_connections_are_ended(
    start: Callable[..., LogNode], store: MemoryStore, postgres: PostgresServer, large: bool
) -> None:
    nodes = [start(inline_bytes_max=0 if large else None) for _ in range(2)]
    collection = _collection(nodes[0])
    over = threading.Event()
    ended = 0

    def end_connections() -> None:
        nonlocal ended
        rng = random.Random(7)
        while not over.is_set():
            rows = postgres.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'ochredb'"
            )
            for (pid,) in rng.sample(rows, min(2, len(rows))):
                postgres.execute(f"SELECT pg_terminate_backend({pid})")
                ended += 1
            over.wait(0.05)

    def write(writer: int) -> dict[str, Appended]:
        done = {}
        for number in range(40):
            name = f"{writer}-{number}"
            with_key = {"idempotency_key": name} if number % 2 else {"request_id": name}
            deadline = time.monotonic() + WAIT_S
            while True:  # As a frontend does: the same write under its name, at any node.
                node = nodes[(writer + number) % 2]
                try:
                    done[name] = _append(node, collection, _add(name), **with_key)
                    break
                except (Unavailable, OutcomeUnknown):
                    assert time.monotonic() < deadline
        return done

    killer = threading.Thread(target=end_connections)
    killer.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            told = {k: v for done in pool.map(write, range(6)) for k, v in done.items()}
    finally:
        over.set()
        killer.join()
    assert ended > 5
    log = _log(start(), store, collection)
    assert _is_dense(log)
    assert len(log) == len(told) == 240, "each was applied once"
    assert {ids[0]: first for first, ids in log} == {
        f"{name}/0": answer.first_offset for name, answer in told.items()
    }


def test_the_backlog_is_exact_with_two_nodes(start: Callable[..., LogNode]) -> None:
    limits = BacklogLimits(tail_rows_max=100, tail_bytes_max=1 << 40)
    nodes = [start(limits), start(limits)]
    collection = _collection(nodes[0])

    def write(writer: int) -> int:
        taken = 0
        for number in range(40):
            with suppress(Exhausted):
                _append(nodes[writer % 2], collection, _add(f"{writer}-{number}"))
                taken += 1
        return taken

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(8))) == 100
    assert nodes[0].logs.snapshot(collection).last_offset == 100


class _Held:
    """The lock of a collection's log, held by another transaction of another process."""

    def __init__(self, node: LogNode, collection: str) -> None:
        self._node, self._collection = node, collection
        self._held, self._let_go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold)

    def _hold(self) -> None:
        with self._node.database.write("held") as session:
            assert session.one(LOCK_LOG, collection=self._collection) is not None
            self._held.set()
            assert self._let_go.wait(WAIT_S)

    def __enter__(self) -> _Held:
        self._thread.start()
        assert self._held.wait(WAIT_S)
        return self

    def let_go(self) -> None:
        self._let_go.set()
        self._thread.join()

    def __exit__(self, *_: object) -> None:
        self.let_go()


@pytest.mark.parametrize("flushes_max", [2, 4])
@pytest.mark.parametrize("send", [_append, _submit])
def test_a_locked_collection_keeps_nobody_else(
    start: Callable[..., LogNode],
    store: MemoryStore,
    flushes_max: int,
    send: Callable[..., Appended],
) -> None:
    node, other = start(flushes_max=flushes_max), start()
    busy, free = _collection(node, "busy"), _collection(node, "free")
    with _Held(other, busy) as held, ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(send, node, busy, _add(f"busy-{number}")) for number in range(4)]
        for number in range(20):
            assert send(node, free, _add(f"free-{number}")).first_offset == number + 1
        assert not any(one.done() for one in waiting)
        held.let_go()
        assert sorted(one.result(WAIT_S).first_offset for one in waiting) == [1, 2, 3, 4]
    assert _is_dense(_log(node, store, busy))


def test_what_waits_for_a_lock_is_not_uploaded_again(
    start: Callable[..., LogNode], store: MemoryStore
) -> None:
    node, other = start(flushes_max=1, inline_bytes_max=0), start()
    busy, free = _collection(node, "busy"), _collection(node, "free")
    in_store = threading.Event()
    create = store.create

    def slow_create(key: str, data: Any) -> None:
        create(key, data)
        assert in_store.wait(WAIT_S)

    store.create = slow_create  # type: ignore[method-assign]
    with _Held(other, busy) as held, ThreadPoolExecutor(4) as pool:
        first = pool.submit(_append, node, free, _add("first"))
        while not list(store.list("fragments/")):
            time.sleep(0.005)
        both = [pool.submit(_append, node, name, _add(name)) for name in (busy, free)]
        while len(node.log._commits.line.requests) < 2:
            time.sleep(0.005)
        in_store.set()
        assert first.result(WAIT_S).first_offset == 1
        assert both[1].result(WAIT_S).first_offset == 2, "beside the one that is locked"
        assert not both[0].done()
        assert len(list(store.list("fragments/"))) == 2, "one for both"
        held.let_go()
        assert both[0].result(WAIT_S).first_offset == 1
    assert len(list(store.list("fragments/"))) == 2
    for name in (busy, free):
        assert _is_dense(_log(node, store, name))


def test_a_collection_that_is_not_there_is_refused_alone(start: Callable[..., LogNode]) -> None:
    node = start()
    collection = _collection(node)
    absent = IDS.uuid7()
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(_append, node, collection, _add(str(number))) for number in range(10)]
        bad = [pool.submit(_append, node, absent, _add("lost")) for _ in range(3)]
        assert sorted(one.result(WAIT_S).first_offset for one in good) == list(range(1, 11))
        for one in bad:
            with pytest.raises(NotFound, match=absent):
                one.result(WAIT_S)


def test_closing_finishes_every_flush_and_everybody_in_line(start: Callable[..., LogNode]) -> None:
    node, other = start(), start()
    names = [_collection(node, f"c-{number}") for number in range(6)]
    outcomes: list[Appended | BaseException] = []
    with _Held(other, names[0]) as held:
        for number in range(60):
            node.log.submit(
                names[number % 6], _add(str(number)), cancel=Cancel(), deliver=outcomes.append
            )
        closing = threading.Thread(target=partial(node.log.close, WAIT_S))
        closing.start()
        while len(outcomes) < 50:  # All but those of the collection that is locked.
            time.sleep(0.005)
        assert closing.is_alive()
        held.let_go()
        closing.join(WAIT_S)
    assert len(outcomes) == 60
    assert all(isinstance(outcome, Appended) for outcome in outcomes)
    for name in names:
        assert other.logs.snapshot(name).last_offset == 10
    with pytest.raises(Unavailable, match="closed"):
        _append(node, names[0], _add("late"))


@pytest.mark.timeout(300)  # A killed server syncs every file of its data before it serves again.
def test_the_server_restarts_under_the_writers(
    start: Callable[..., LogNode], store: MemoryStore, postgres: PostgresServer
) -> None:
    nodes = [start(), start()]
    collection = _collection(nodes[0])
    stop = threading.Event()

    def write(writer: int) -> list[str]:
        done, number = [], 0
        while not stop.is_set():
            name = f"{writer}-{number}"
            try:
                _append(nodes[writer % 2], collection, _add(name), request_id=name)
                done.append(name)
                number += 1
            except Unavailable:
                time.sleep(0.05)
        return done

    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(write, writer) for writer in range(4)]
        time.sleep(0.5)
        postgres.kill()
        time.sleep(0.2)
        postgres.restart()
        before = nodes[0].logs
        deadline = time.monotonic() + WAIT_S
        reached = None
        while time.monotonic() < deadline:
            with suppress(Unavailable):
                last = before.snapshot(collection).last_offset
                reached = last if reached is None else reached
                if last > reached + 20:
                    break
            time.sleep(0.05)
        stop.set()
        acknowledged = [name for one in writing for name in one.result(WAIT_S)]
    log = _log(start(), store, collection)
    assert _is_dense(log)
    names = [ids[0] for _, ids in log]
    assert len(set(names)) == len(names), "nothing twice"
    assert {f"{name}/0" for name in acknowledged} <= set(names), "nothing lost"
    assert len(acknowledged) > 20
