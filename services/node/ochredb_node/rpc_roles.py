"""What a node's roles offer other processes over gRPC. Imported by processes of a cluster only."""

from __future__ import annotations

import random
from dataclasses import replace

from ochredb.clock import Clock
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.server import RpcServer
from ochredb_node.node import Node
from ochredb_node.roles import Role


def open_rpc(node: Node, config: RpcConfig, clock: Clock, rng: random.Random) -> RpcServer:
    """A server that has started. Raises Unavailable if the address cannot be had."""
    if not node.has(Role.QUERY):
        server = RpcServer(config, clock=clock)
    else:
        from ochredb_query.admission import Admission, AdmissionConfig
        from ochredb_query.admitted import AdmittedQuery
        from ochredb_query.grpc import QueryServicer

        admission = AdmissionConfig()
        config = replace(config, read_threads=admission.threads)
        server = RpcServer(config, clock=clock)
        admitted = AdmittedQuery(
            node.query,
            lambda collection_id: node.namespace.get_collection_by_id(collection_id).tenant,
            Admission(admission, clock, rng),
        )
        server.add(QueryServicer(admitted, config))
    if node.has(Role.LOG):
        from ochredb_log.grpc import LogServicer
        from ochredb_log.reader import LogReader

        server.add(LogServicer(node.log, LogReader(node.logs, node.store), config))
    server.start()
    return server
