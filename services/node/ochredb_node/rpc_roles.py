"""What a node's roles offer other processes over gRPC. Imported by processes of a cluster only."""

from __future__ import annotations

import random
from dataclasses import replace

from ochredb.clock import Clock
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.server import RpcServer
from ochredb_compactor.service import CompactorService
from ochredb_node.node import Node
from ochredb_node.roles import Role
from ochredb_node.supervisor import Supervisor


def open_rpc(
    node: Node,
    config: RpcConfig,
    clock: Clock,
    rng: random.Random,
    supervisor: Supervisor | None,
) -> RpcServer:
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
    if node.has(Role.COMPACTOR):
        from ochredb_compactor.grpc import CompactorServicer

        compactor = node.compactor
        supervised = None if supervisor is None else SupervisedCompactor(compactor, supervisor)
        server.add(CompactorServicer(supervised or compactor))
    server.start()
    return server


class SupervisedCompactor:
    """A `ochredb.peers.CompactorNode` whose background work is done by worker processes.

    What a call asks for is done here, in the caller's thread, under the same leases.
    """

    def __init__(self, compactor: CompactorService, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self.compact_now = compactor.compact_now
        self.rebuild_now = compactor.rebuild_now
        self.rebuild_part = compactor.rebuild_part
        self.settle = compactor.settle
        self.status = compactor.status
        self.hint = compactor.hint
        self._compactor = compactor

    def pause(self) -> None:
        self._compactor.pause()  # So that its status says so.
        self._supervisor.pause(True)

    def resume(self) -> None:
        self._compactor.resume()
        self._supervisor.pause(False)
