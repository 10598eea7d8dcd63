"""The roles do the same in this process and through gRPC, by one suite."""

from __future__ import annotations

import itertools
import random
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.membership import open_membership
from ochredb.cluster.nodes import Nodes
from ochredb.cluster.routed_log import RoutedLog
from ochredb.cluster.routed_query import RoutedQuery
from ochredb.rpc.channel import channel
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.log_client import LogClient
from ochredb.rpc.query_client import QueryClient
from ochredb.testing.peers_suite import PeersSuite, Roles
from ochredb_log.reader import LogReader
from ochredb_node.node import Node

from .kernel import make_collection, running_node
from .rpc_kernel import serving


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(str(tmp_path / "store")) as node:
        yield node


def _roles(node: Node) -> Roles:
    names = itertools.count()
    reader = LogReader(node.logs, node.store)
    new = partial(_new_collection, node, names)
    return Roles(log=node.log, reader=reader, query=node.query, new_collection=new)


def _new_collection(node: Node, names: Iterator[int]) -> str:
    return make_collection(node, f"records-{next(names)}")


class TestInProcess(PeersSuite):
    @pytest.fixture
    def roles(self, node: Node) -> Roles:
        return _roles(node)


class TestThroughGrpc(PeersSuite):
    @pytest.fixture
    def roles(self, node: Node) -> Iterator[Roles]:
        here = _roles(node)
        with serving(node) as remote:
            yield Roles(remote.log, remote.log, remote.query, here.new_collection)


class TestThroughGrpcInTinyMessages(PeersSuite):
    """Every answer takes several messages."""

    @pytest.fixture
    def roles(self, node: Node) -> Iterator[Roles]:
        here = _roles(node)
        with serving(node, RpcConfig(chunk_bytes=7)) as remote:
            yield Roles(remote.log, remote.log, remote.query, here.new_collection)


class TestRoutedThroughGrpc(PeersSuite):
    """Two of three members serve; nobody notices the third."""

    @pytest.fixture
    def roles(self, node: Node) -> Iterator[Roles]:
        here, clock, rng = _roles(node), node.clock, random.Random(1)
        with serving(node) as one, serving(node) as two, socket.create_server(("", 0)) as sock:
            dead = f"127.0.0.1:{sock.getsockname()[1]}"
            sock.close()
            members = f"static:a={one.server.address},b={dead},c={two.server.address}"
            config, budget = RpcConfig(), RetryBudget(clock)

            def nodes(client: Callable[..., Any]) -> Nodes[Any]:
                return Nodes(
                    open_membership(members, clock=clock, rng=rng),
                    lambda address: client(channel(address, config), config),
                    clock=clock,
                    rng=rng,
                    close=lambda one: one.close(),
                )

            logs, queries = nodes(LogClient), nodes(QueryClient)
            log = RoutedLog(logs, budget=budget, ids=node.ids, clock=clock)
            query = RoutedQuery(queries, budget=budget, clock=clock)
            try:
                yield Roles(log, one.log, query, here.new_collection)
            finally:
                log.close()
                query.close()
                logs.close()
                queries.close()
