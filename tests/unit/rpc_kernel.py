"""What tests of the calls between processes share: a served node, and clients of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ochredb.clock import SystemClock
from ochredb.rpc.channel import channel
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.log_client import LogClient
from ochredb.rpc.query_client import QueryClient
from ochredb.rpc.server import RpcServer
from ochredb_log.grpc import LogServicer
from ochredb_log.reader import LogReader
from ochredb_node.node import Node
from ochredb_query.grpc import QueryServicer


@dataclass(frozen=True, slots=True)
class Remote:
    """A server on a free loopback port, and a client for each of its roles."""

    server: RpcServer
    config: RpcConfig
    log: LogClient
    query: QueryClient


@contextlib.contextmanager
def serving(node: Node, config: RpcConfig | None = None) -> Iterator[Remote]:
    """The node's roles, served in this process and called through the loopback."""
    config = config or RpcConfig()
    server = RpcServer(config, clock=node.clock)
    server.add(LogServicer(node.log, LogReader(node.logs, node.store), config))
    server.add(QueryServicer(node.query, config))
    server.start()
    try:
        with connected(server.address, config) as (log, query):
            yield Remote(server, config, log, query)
    finally:
        server.stop()


@contextlib.contextmanager
def connected(
    address: str, config: RpcConfig | None = None
) -> Iterator[tuple[LogClient, QueryClient]]:
    config = config or RpcConfig()
    log = LogClient(channel(address, config), config)
    query = QueryClient(channel(address, config), config)
    try:
        yield log, query
    finally:
        log.close()
        query.close()


@contextlib.contextmanager
def served_role(role: Any, config: RpcConfig) -> Iterator[tuple[RpcServer, LogClient, QueryClient]]:
    """A stand-in for the log and query roles, served in this process."""
    server = RpcServer(config, clock=SystemClock())
    server.add(LogServicer(role, role, config))
    server.add(QueryServicer(role, config))
    server.start()
    try:
        with connected(server.address, config) as (log, query):
            yield server, log, query
    finally:
        server.stop()


def probe(opened: grpc.Channel, service: str = "") -> bool:
    """Whether the server says that it serves; `service` "" is the process as a whole."""
    stub: Any = health_pb2_grpc.HealthStub(opened)
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        reply = stub.Check(request, timeout=30)
    except grpc.RpcError:
        return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
