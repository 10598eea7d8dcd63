"""The roles do the same in this process and through gRPC, by one suite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from ochredb.rpc.config import RpcConfig
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
