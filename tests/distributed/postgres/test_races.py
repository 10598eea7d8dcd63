"""Processes that race on one catalog in PostgreSQL: as in the simulator, with the real server.

Each process is a Node of its own, with connections of its own, on the same directory of objects.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from ochredb.cancel import Cancel
from ochredb.catalog import objects as object_table
from ochredb.catalog.database import Database
from ochredb.catalog.migrate_postgres import open_postgres
from ochredb.catalog.namespace import DEFAULT_DATABASE, DEFAULT_TENANT, Namespace
from ochredb.catalog.pins import PinTable
from ochredb.catalog.postgres import PostgresDatabase
from ochredb.catalog.postgres_config import PostgresConfig
from ochredb.clock import SystemClock
from ochredb.errors import (
    AlreadyExists,
    Conflict,
    Exhausted,
    Gone,
    NotFound,
    OchreError,
    Unavailable,
)
from ochredb.ids import IdSource
from ochredb.types import Appended, Op
from ochredb_node.node import Node
from tests.components.postgres import PostgresServer
from tests.unit.kernel import (
    add_rows,
    ids_of,
    make_collection,
    object_keys,
    operations,
    running_node,
    sql,
)

pytestmark = pytest.mark.usefixtures("nodes_on_postgres")

_T = TypeVar("_T")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    """Three processes of one store; every write makes an object, which is garbage at once."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                running_node(str(tmp_path / "store"), inline_bytes_max=0, grace_s=0.2)
            )
            for _ in range(3)
        ]


@pytest.fixture
def no_deadlocks(server: PostgresServer) -> Iterator[None]:
    """The lock order is kept: the server has had to end nobody's wait."""
    text = "SELECT deadlocks FROM pg_stat_database WHERE datname = 'postgres'"
    before = server.execute(text)
    yield
    time.sleep(1.2)  # Each of its processes counts for itself for a second.
    assert server.execute(text) == before


def _at_once(works: Sequence[Callable[[], _T]]) -> list[_T | OchreError]:
    """What each gives or is refused with, begun at the same moment."""
    meeting = threading.Barrier(len(works))

    def run(work: Callable[[], _T]) -> _T | OchreError:
        meeting.wait(10)
        try:
            return work()
        except OchreError as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, works))


def _create(namespace: Namespace, name: str, get_or_create: bool = False) -> str:
    return namespace.create_collection(
        DEFAULT_TENANT,
        DEFAULT_DATABASE,
        name,
        configuration={},
        schema={},
        metadata=None,
        get_or_create=get_or_create,
    ).id


def _get_or_create(namespace: Namespace, name: str) -> str:
    return _create(namespace, name, get_or_create=True)


def _rename(namespace: Namespace, collection: str, name: str) -> str:
    return namespace.update_collection(collection, new_name=name).id


def _drop(namespace: Namespace, name: str) -> str:
    return namespace.delete_collection(DEFAULT_TENANT, DEFAULT_DATABASE, name)


def _tenant(namespace: Namespace, name: str) -> None:
    namespace.create_tenant(name)


def _database(namespace: Namespace, tenant: str) -> None:
    namespace.create_database(tenant, "name")


class TestNames:
    @pytest.fixture
    def names(self, url: str, config: PostgresConfig) -> Iterator[list[Namespace]]:
        with contextlib.ExitStack() as stack:
            found = []
            for _ in range(6):
                database, _ = open_postgres(url, SystemClock(), IdSource(), config)
                stack.enter_context(contextlib.closing(database))
                found.append(Namespace(database, database.clock, IdSource()))
            found[0].ensure_defaults()
            yield found

    def test_one_of_many_creates_a_name(self, names: list[Namespace]) -> None:
        one_of_six = {True: 1, False: 5}

        def all_try(work: Callable[..., object], *arguments: object) -> list[object]:
            return _at_once([partial(work, names_, *arguments) for names_ in names])

        for number in range(5):
            made = all_try(_create, f"c{number}")
            assert Counter(type(item) is str for item in made) == one_of_six
            assert Counter(type(item) is AlreadyExists for item in made)[True] == 5
            assert len(set(map(str, all_try(_get_or_create, f"g{number}")))) == 1
            tenant = f"tenant{number}"
            assert Counter(item is None for item in all_try(_tenant, tenant)) == one_of_six
            assert Counter(item is None for item in all_try(_database, tenant)) == one_of_six
            drops = all_try(_drop, f"c{number}")
            assert Counter(type(item) is NotFound for item in drops) == {False: 1, True: 5}

    def test_one_of_many_takes_a_name(self, names: list[Namespace]) -> None:
        """Renamed to it, or created under it."""
        for number in range(5):
            old = [_create(names[0], f"o{number}-{i}") for i in range(4)]
            name = f"new{number}"
            pairs = zip(names, old, strict=False)
            renames = [partial(_rename, namespace, known, name) for namespace, known in pairs]
            creations = [partial(_create, namespace, name) for namespace in names[4:]]
            done = _at_once([*renames, *creations])
            assert Counter(type(item) is AlreadyExists for item in done) == {False: 1, True: 5}

    def test_defaults_are_created_once_while_others_reset(self, names: list[Namespace]) -> None:
        for _ in range(5):
            done = _at_once(
                [*(n.reset for n in names[:3]), *(n.ensure_defaults for n in names[3:])]
            )
            assert done == [None] * 6
            assert len(names[0].list_databases(DEFAULT_TENANT)) == 1


@pytest.fixture
def shared(url: str, config: PostgresConfig) -> Iterator[Database]:
    database, _ = open_postgres(url, SystemClock(), IdSource(), config)
    with contextlib.closing(database):
        yield database


def test_of_many_who_let_go_of_one_object_the_last_one_is(
    shared: Database, no_deadlocks: None
) -> None:
    def let_go(holder: str) -> None:
        with shared.write() as session:
            object_table.release(
                session, kind="fragment", collection=holder, number_max=1, now_us=7
            )

    for round_ in range(20):
        keys = [f"fragments/{round_}-{number}" for number in range(5)]
        holders = [f"{round_}-{number}" for number in range(4)]
        with shared.write() as session:
            object_table.introduce(session, [(key, 1) for key in keys])
            for holder in holders:
                object_table.refer(session, keys, kind="fragment", collection=holder, number=1)
        assert _at_once([partial(let_go, holder) for holder in holders]) == [None] * 4
        with shared.read() as session:
            left = session.all(sql("SELECT key FROM objects WHERE unreferenced_us IS NULL"))
        assert left == []


class Hand:
    """What the race has one process do to the store; its node may be in another one."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def create(self, name: str) -> str:
        return make_collection(self._node, name)

    def write(self, collection: str, name: str) -> None:
        request = operations(Op.ADD, [name], [[1.0, 2.0]])
        self._node.log.append(collection, request, cancel=Cancel())

    def fill(self, collection: str) -> None:
        add_rows(self._node, collection, 0, 3)

    def drop(self, collection: str) -> None:
        namespace = self._node.namespace
        _drop(namespace, namespace.get_collection_by_id(collection).name)

    def pending(self) -> list[str]:
        """Collections that have something to fold."""
        return [work.collection for work in self._node.logs.pending()]

    def compact(self, collection: str) -> None:
        self._node.compactor.compact_now(collection)

    def collect(self, sweeps: bool) -> None:
        self._node.compactor.collect_now(sweep_orphans=sweeps)
        self._node.versions.release_replaced(self._node.clock.now_us(), 10)

    def pin(self, name: str) -> None:
        pins = PinTable(self._node.database, self._node.clock)
        # A quick machine takes more within their life than there may be.
        with contextlib.suppress(Exhausted), pins.take(name, "test", 0.05):
            pass
        pins.release_expired()

    def ids(self, collection: str) -> list[str]:
        return ids_of(self._node, collection)

    def settle(self) -> None:
        """Everything is folded, and every object gone that may go."""
        node = self._node
        time.sleep(0.1)
        PinTable(node.database, node.clock).release_expired()
        for collection in self.pending():
            node.compactor.compact_now(collection)
        node.versions.release_replaced(node.clock.now_us(), 100)
        time.sleep(0.3)
        node.compactor.collect_now(sweep_orphans=True)
        with node.database.write() as session:
            session.run(sql("DELETE FROM objects WHERE state = 'swept'"))

    def objects(self) -> tuple[set[str], set[str], set[str]]:
        """Those that lie in the store, that are referred to, and that the catalog knows."""
        with self._node.database.read() as session:
            referenced = {key for (key,) in session.all(sql("SELECT key FROM object_references"))}
            known = {key for (key,) in session.all(sql("SELECT key FROM objects"))}
        return object_keys(self._node), referenced, known


@pytest.fixture
def hands(nodes: list[Node]) -> list[Hand]:
    return [Hand(node) for node in nodes]


def test_appends_drops_compactions_and_collections_at_once(
    hands: Sequence[Hand], no_deadlocks: None
) -> None:
    """Nothing acknowledged is missing (I1), offsets are dense (I2), no object too many (I6)."""
    stop = threading.Event()
    kept = [hands[0].create(f"kept-{number}") for number in range(3)]
    written: dict[str, set[str]] = {collection: set() for collection in kept}
    unexpected: list[BaseException] = []

    def until_stopped(work: Callable[[random.Random], None], seed: int) -> Callable[[], None]:
        def run() -> None:
            rng = random.Random(seed)
            while not stop.is_set():
                try:
                    work(rng)
                except (NotFound, Conflict, Gone, AlreadyExists):
                    pass  # Somebody else was quicker.
                except BaseException as error:
                    unexpected.append(error)
                    raise

        return run

    def write(rng: random.Random) -> None:
        """To several collections: flushes share objects."""
        hand, collection = rng.choice(hands), rng.choice(kept)
        name = f"{rng.getrandbits(60)}"
        hand.write(collection, name)
        written[collection].add(name)

    def come_and_go(rng: random.Random) -> None:
        collection = rng.choice(hands).create(f"short-{rng.randrange(3)}")
        rng.choice(hands).fill(collection)
        rng.choice(hands).drop(collection)

    def compact(rng: random.Random) -> None:
        work = hands[0].pending()
        if work:
            rng.choice(hands).compact(rng.choice(work))

    def collect(rng: random.Random) -> None:
        rng.choice(hands).collect(rng.random() < 0.3)

    def pin(rng: random.Random) -> None:
        rng.choice(hands).pin(f"{rng.getrandbits(60)}")

    works = [write] * 6 + [come_and_go] * 2 + [compact] * 2 + [collect, pin]
    threads = [
        threading.Thread(target=until_stopped(work, seed)) for seed, work in enumerate(works)
    ]
    for thread in threads:
        thread.start()
    time.sleep(6.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert not unexpected
    assert min(map(len, written.values())) > 5
    for hand in hands:
        assert {collection: set(hand.ids(collection)) for collection in kept} == written
    hands[0].settle()
    stored, referenced, known = hands[0].objects()
    assert stored == referenced == known


class TestLostConnections:
    @staticmethod
    def _write(node: Node, collection: str, name: str, key: str) -> Appended:
        """As a client does: again with the same key, until there is an answer."""
        deadline = time.monotonic() + 30.0
        while True:
            request = operations(Op.ADD, [name], [[1.0, 2.0]])
            try:
                return node.log.append(collection, request, idempotency_key=key, cancel=Cancel())
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _storm(self, nodes: list[Node], trouble: Callable[[], None]) -> None:
        collection = make_collection(nodes[0])
        stop, answers = threading.Event(), dict[str, Appended]()

        def write(writer: int) -> None:
            number = 0
            while not stop.is_set():
                name = f"{writer}-{number}"
                answers[name] = self._write(nodes[writer % len(nodes)], collection, name, name)
                number += 1

        with ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(write, writer) for writer in range(6)]
            try:
                trouble()
            finally:
                stop.set()
            for future in futures:
                future.result()
        assert len(answers) > 20
        offsets = sorted(answer.first_offset for answer in answers.values())
        assert offsets == list(range(1, len(answers) + 1)), "each exactly once, and dense (I2, I8)"
        for node in nodes:
            assert sorted(ids_of(node, collection)) == sorted(answers)
        for name in list(answers)[:20]:
            again = self._write(nodes[0], collection, name, name)
            assert (again.first_offset, again.repeated) == (answers[name].first_offset, True)

    def test_processes_of_the_server_are_ended_all_the_time(
        self, nodes: list[Node], server: PostgresServer
    ) -> None:
        rng = random.Random(11)

        def trouble() -> None:
            end = time.monotonic() + 5.0
            victims = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'ochredb' AND state <> 'idle'"
            )
            while time.monotonic() < end:
                server.execute(victims)
                time.sleep(rng.uniform(0.0, 0.03))

        self._storm(nodes, trouble)

    def test_the_server_dies_and_comes_back(
        self, nodes: list[Node], server: PostgresServer
    ) -> None:
        def trouble() -> None:
            for _ in range(2):
                time.sleep(1.0)
                server.kill()
                time.sleep(0.3)
                server.restart()
            time.sleep(1.0)

        self._storm(nodes, trouble)


def test_a_node_is_closed_and_opened_again(nodes: list[Node], tmp_path: Path) -> None:
    collection = make_collection(nodes[0])
    add_rows(nodes[0], collection, 0, 10)
    with running_node(str(tmp_path / "store")) as another:
        assert isinstance(another.database, PostgresDatabase)
        assert len(ids_of(another, collection)) == 10
    with pytest.raises(Unavailable, match="closed"):
        another.logs.snapshot(collection)
