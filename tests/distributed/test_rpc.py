"""The suite of log and query roles on PostgreSQL, in this process and through gRPC."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from ochredb.testing.peers_suite import PeersSuite, Roles
from ochredb_log.reader import LogReader
from ochredb_node.config import NodeConfig
from ochredb_node.node import Node
from ochredb_node.roles import Role
from tests.components.postgres import PostgresServer
from tests.unit.kernel import make_collection
from tests.unit.rpc_kernel import serving

_names = itertools.count()


@pytest.fixture(scope="module")
def nodes(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Node, Node]]:
    """A log node and a query node, on one catalog and one directory of objects."""
    path, url = tmp_path_factory.mktemp("store"), postgres.create_database("rpc")
    log, query = (_node(path, url, role) for role in (Role.LOG, Role.QUERY))
    yield log, query
    query.close()
    log.close()


def _node(path: Path, url: str, role: Role) -> Node:
    node = Node(NodeConfig(path=str(path), catalog_url=url, roles=frozenset({role})))
    node.start(background=False)
    return node


def _new_collection(log: Node) -> str:
    return make_collection(log, f"records-{next(_names)}")


class TestOnPostgres(PeersSuite):
    @pytest.fixture
    def roles(self, nodes: tuple[Node, Node]) -> Roles:
        log, query = nodes
        reader = LogReader(log.logs, log.store)
        return Roles(log.log, reader, query.query, partial(_new_collection, log))


class TestOnPostgresThroughGrpc(PeersSuite):
    @pytest.fixture
    def roles(self, nodes: tuple[Node, Node]) -> Iterator[Roles]:
        log, query = nodes
        new = partial(_new_collection, log)
        with serving(log) as log_node, serving(query) as query_node:
            yield Roles(log_node.log, log_node.log, query_node.query, new)
