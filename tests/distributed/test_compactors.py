"""Several compactors on one PostgreSQL share the work, and one of them collects (I7, I9)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ochredb.catalog import pending
from ochredb.catalog.postgres import PostgresDatabase
from ochredb.catalog.postgres_session import DIALECT
from ochredb_compactor import service
from ochredb_compactor.config import CompactorConfig
from ochredb_node.config import NodeConfig
from ochredb_node.node import Node
from ochredb_node.roles import Role
from tests.components.postgres import PostgresServer
from tests.unit.kernel import add_rows, ids_of, make_collection

WAIT_S = 90.0


@pytest.fixture
def start(postgres: PostgresServer, tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Nodes on one empty catalog and one directory of objects; compactors have threads."""
    url = postgres.create_database(f"compactors-{tmp_path.name}")
    started: list[Node] = []

    def start(*, compacts: bool = True, config: CompactorConfig | None = None) -> Node:
        roles = {Role.COMPACTOR} if compacts else {Role.LOG, Role.QUERY}
        node = Node(
            NodeConfig(
                path=str(tmp_path / "store"),
                catalog_url=url,
                roles=frozenset(roles),
                compactor=config or CompactorConfig(graph_threads=1, merge_threads=2),
            )
        )
        node.start()
        started.append(node)
        return node

    yield start
    for node in started:
        node.close()


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.05)


def test_they_share_the_work_without_doing_it_twice(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = start(compacts=False)
    names = [make_collection(writer, f"c-{number}") for number in range(24)]
    for name in names:
        add_rows(writer, name, 0, 600)
    compactors = [start(), start()]
    by_whom: dict[str, list[Node]] = {name: [] for name in names}
    for node in compactors:
        _count(node, by_whom, monkeypatch)
    _until(lambda: writer.logs.pending() == [])
    for name in names:
        assert len(ids_of(writer, name)) == 600
    done = [node for nodes in by_whom.values() for node in nodes]
    # Each piece once, but for what one of them had folded before this began to count.
    assert all(len(nodes) <= 2 for nodes in by_whom.values())
    assert len(done) <= len(names) + 4
    # A fold that failed or a lease that was lost would be told here.
    assert [job for job in writer.world.jobs.status() if job.last_error] == []


def _count(node: Node, by_whom: dict[str, list[Node]], monkeypatch: pytest.MonkeyPatch) -> None:
    work = node.compactor._work
    compact_some = work.compact_some

    def counted(name: str, step: Callable[[], None]) -> bool | None:
        more = compact_some(name, step)
        if more is not None:
            by_whom[name].append(node)
        return more

    monkeypatch.setattr(work, "compact_some", counted)


def test_one_at_a_time_sweeps_and_collects(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, sweeps = 0, 0, 0
    lock = threading.Lock()

    def slow_sweep(*_: object) -> int:
        nonlocal running, most, sweeps
        with lock:
            running += 1
            sweeps += 1
            most = max(most, running)
        time.sleep(0.3)
        with lock:
            running -= 1
        return 0

    monkeypatch.setattr(service, "sweep", slow_sweep)
    config = CompactorConfig(sweep_period_s=2.0, graph_threads=1)
    nodes = [start(config=config) for _ in range(3)]
    begun = time.monotonic()
    _until(lambda: sweeps >= 2)
    assert most == 1
    # Each of them looks every two seconds; together they sweep about once in two.
    assert sweeps <= 2 + (time.monotonic() - begun) / 1.8
    assert len(nodes) == 3


def test_a_compactor_that_is_gone_is_replaced_when_its_lease_ends(
    start: Callable[..., Node],
) -> None:
    writer = start(compacts=False)
    name = make_collection(writer)
    add_rows(writer, name, 0, 600)
    lease = writer.world.jobs.acquire(name, "compact", "another-host/1/x", 3.0)
    assert lease is not None
    start()
    assert writer.logs.snapshot(name).indexed_offset == 0
    _until(lambda: writer.logs.snapshot(name).indexed_offset == 600)


def test_settling_from_two_processes_at_once_ends_with_nothing_due(
    start: Callable[..., Node],
) -> None:
    config = CompactorConfig(paused=True, graph_threads=1)
    writer, nodes = start(compacts=False), [start(config=config), start(config=config)]
    names = [make_collection(writer, f"c-{number}") for number in range(6)]
    for name in names:
        for first in range(0, 2_500, 500):
            add_rows(writer, name, first, 500)
    threads = [threading.Thread(target=node.compactor.settle) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert writer.logs.pending() == []
    for name in names:
        assert len(ids_of(writer, name)) == 2_500


def test_asking_for_work_does_not_look_at_collections_without_any(
    start: Callable[..., Node],
) -> None:
    writer = start(compacts=False)
    name = make_collection(writer)
    add_rows(writer, name, 0, 600)
    database = writer.database
    assert isinstance(database, PostgresDatabase)
    connection = database.connect()
    try:
        connection.execute(
            "INSERT INTO logs SELECT 'idle-' || n, 'live', 2, 0, 1, 2, 1, 1, 0, 0, 0"
            " FROM generate_series(1, 20000) n"
        )
        connection.execute("ANALYZE")
        for statement in (pending._TAILS, pending._UNSETTLED):
            text, literals = statement.compiled(DIALECT)
            asked = {"rows_min": 1, "bytes_min": 1, "quiet_since_us": 0, "after": ""}
            named = {key: value for key, value in asked.items() if f"%({key})" in text}
            plan = "\n".join(
                row[0] for row in connection.execute(f"EXPLAIN {text}", literals | named)
            )
            assert "logs" in plan
            assert "Seq Scan on logs" not in plan, plan
            assert "Seq Scan on fragments" not in plan or "with_tail" in plan
    finally:
        connection.close()
    assert [due.collection for due in writer.logs.tails(1, 1, 0)] == [name]


def test_closing_leaves_to_others_what_is_not_due(start: Callable[..., Node]) -> None:
    """A restart of all compactors in turn is quick, however much there is."""
    writer = start(compacts=False)
    name = make_collection(writer)
    late = CompactorConfig(idle_due_s=600.0, settle_due_s=600.0, busy_due_s=600.0, graph_threads=1)
    node = start(config=late)
    add_rows(writer, name, 0, 600)
    node.close()
    assert writer.logs.snapshot(name).indexed_offset == 0
    start()
    _until(lambda: writer.logs.snapshot(name).indexed_offset == 600)
