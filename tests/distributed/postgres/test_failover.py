"""The primary dies and its standby is promoted: nodes that know both hosts go on (I1, I4)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ochredb.errors import OutcomeUnknown, Unavailable
from ochredb.testing.membership_suite import until
from ochredb.types import Op
from ochredb_node.node import Node, NodeConfig
from tests.components.postgres import PostgresServer
from tests.unit.kernel import append, ids_of, make_collection, operations

_SOME = 30  # Writes of each node: before the failure, and after it.


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[PostgresServer]:
    server = PostgresServer.start(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def standby(primary: PostgresServer, tmp_path: Path) -> Iterator[PostgresServer]:
    """Without which the primary commits nothing."""
    server = primary.standby(tmp_path)
    primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    primary.execute("SELECT pg_reload_conf()")
    state = "SELECT sync_state FROM pg_stat_replication"
    until(lambda: primary.execute(state) == [("sync",)])
    yield server
    server.stop()


def _url(first: PostgresServer, second: PostgresServer) -> str:
    hosts = f"{first.host}:{first.port},{second.host}:{second.port}"
    return f"postgresql://postgres@{hosts}/postgres"


@contextlib.contextmanager
def _node(path: Path, catalog_url: str) -> Iterator[Node]:
    node = Node(NodeConfig(path=str(path), catalog_url=catalog_url))
    node.start()
    try:
        yield node
    finally:
        node.close()


class _Writer:
    """Adds one record after the other by one node, until it is told to stop."""

    def __init__(self, node: Node, collection: str, name: str, stop: threading.Event) -> None:
        self._node, self._collection, self._name, self._stop = node, collection, name, stop
        self.acknowledged: set[str] = set()
        self.unknown: set[str] = set()
        self.refused = 0

    def run(self) -> None:
        number = 0
        while not self._stop.wait(0.005):
            number += 1
            record = f"{self._name}-{number}"
            try:
                append(self._node, self._collection, operations(Op.ADD, [record], [[1.0]]))
            except OutcomeUnknown:
                self.unknown.add(record)
            except Unavailable:
                self.refused += 1
            else:
                self.acknowledged.add(record)


def test_nodes_go_on_at_the_standby_that_was_promoted(
    primary: PostgresServer, standby: PostgresServer, tmp_path: Path
) -> None:
    """Whichever host comes first in their URLs, and with everything that was acknowledged."""
    with (
        _node(tmp_path / "store", _url(primary, standby)) as one,
        _node(tmp_path / "store", _url(standby, primary)) as two,
        ThreadPoolExecutor(2) as pool,
    ):
        collection, stop = make_collection(one), threading.Event()
        writers = [
            _Writer(one, collection, "one", stop),
            _Writer(two, collection, "two", stop),
        ]
        running = [pool.submit(writer.run) for writer in writers]
        try:
            until(lambda: all(len(writer.acknowledged) >= _SOME for writer in writers))
            primary.kill()
            until(lambda: all(writer.refused > 0 for writer in writers))
            standby.promote()
            before = [len(writer.acknowledged) for writer in writers]
            until(
                lambda: all(
                    len(writer.acknowledged) >= count + _SOME
                    for writer, count in zip(writers, before, strict=True)
                )
            )
        finally:
            stop.set()
        for each in running:
            each.result()
        acknowledged = set.union(*(writer.acknowledged for writer in writers))
        unknown = set.union(*(writer.unknown for writer in writers))
        for node in (one, two):
            found = set(ids_of(node, collection))
            assert acknowledged <= found <= acknowledged | unknown
