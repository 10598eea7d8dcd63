"""The roles of other processes, as a node uses them; made only where a node needs some.

Each is routed: a client for each member, the collection's own member first (`ochredb.cluster`).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ochredb.clock import Clock
from ochredb.ids import IdSource
from ochredb.peers import Compactor, Log, Query
from ochredb_node.config import NodeConfig
from ochredb_node.roles import Role

if TYPE_CHECKING:
    from ochredb.cluster.budget import Counted
    from ochredb.cluster.nodes import Nodes
    from ochredb.peers import DistantQueryNode
    from ochredb.rpc.query_client import QueryClient
    from ochredb.rpc.tls import ClientFiles
    from ochredb_query.scatter import Scatter

log = logging.getLogger("ochredb.node")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """None: this process has the role itself, or does not need it.

    scatter: of a query node, to all others. counted: what was sent to any of them.
    """

    log: Log | None = None
    query: Query | None = None
    compactor: Compactor | None = None
    scatter: Scatter | None = None
    counted: Counted | None = None
    nodes: Sequence[Nodes[Any]] = ()
    files: ClientFiles | None = None
    closing: ExitStack = field(default_factory=ExitStack)

    def renew(self) -> None:
        """Connect anew if certificates were replaced. Cost: a look at each file."""
        if self.files is not None and self.files.are_renewed():
            log.info("certificates were replaced: connections to other processes are made anew")
            for nodes in self.nodes:
                nodes.renew()

    def close(self) -> None:
        """Let go of all clients. Idempotent."""
        self.closing.close()


def connect(config: NodeConfig, *, clock: Clock, ids: IdSource, rng: random.Random) -> Peers:
    """The peers that the configuration names and the roles need; connects to none of them yet.

    Raises InvalidArgument for a list of nodes that cannot be read.
    """
    roles = config.roles
    is_frontend = Role.FRONTEND in roles
    log_nodes = config.log_nodes if is_frontend and Role.LOG not in roles else None
    query_nodes = config.query_nodes if is_frontend or Role.QUERY in roles else None
    asks_to_rebuild = Role.QUERY in roles and Role.COMPACTOR not in roles
    compactor_nodes = config.compactor_nodes if config.hurries or asks_to_rebuild else None
    if log_nodes is None and query_nodes is None and compactor_nodes is None:
        return Peers()
    assert config.rpc is not None, "peers need the settings of calls to them"
    return _Connecting(config, clock, ids, rng).connect(log_nodes, query_nodes, compactor_nodes)


class _Connecting:
    """gRPC and the cluster's modules are imported here."""

    def __init__(self, config: NodeConfig, clock: Clock, ids: IdSource, rng: random.Random) -> None:
        from ochredb.cluster.budget import RetryBudget
        from ochredb.rpc.config import RpcConfig

        self._roles, self._rpc = config.roles, config.rpc or RpcConfig()
        self._name = config.name
        self._clock, self._ids, self._rng = clock, ids, rng
        self._budget = RetryBudget(clock)
        self._made: list[Nodes[Any]] = []
        self._closing = ExitStack()

    def connect(
        self, log_nodes: str | None, query_nodes: str | None, compactor_nodes: str | None
    ) -> Peers:
        try:
            is_reader = Role.QUERY in self._roles
            return Peers(
                log=self._log(log_nodes),
                query=None if is_reader else self._query(query_nodes),
                compactor=self._compactor(compactor_nodes),
                scatter=self._scatter(query_nodes) if is_reader else None,
                counted=self._budget.counted,
                nodes=self._made,
                files=self._files(),
                closing=self._closing,
            )
        except BaseException:
            self._closing.close()
            raise

    def _files(self) -> ClientFiles | None:
        if not self._rpc.has_tls:
            return None
        from ochredb.rpc.tls import ClientFiles

        return ClientFiles(self._rpc)

    def _log(self, setting: str | None) -> Log | None:
        if setting is None:
            return None
        from ochredb.cluster.routed_log import RoutedLog
        from ochredb.rpc.channel import channel
        from ochredb.rpc.log_client import LogClient

        def client(address: str) -> Log:
            return LogClient(channel(address, self._rpc), self._rpc)

        routed = RoutedLog(
            self._nodes(setting, client), budget=self._budget, ids=self._ids, clock=self._clock
        )
        self._closing.callback(routed.close)
        return routed

    def _scatter(self, setting: str | None) -> Scatter | None:
        """For the parts of a large collection that other nodes keep."""
        if setting is None:
            return None
        from ochredb_query.scatter import Scatter

        nodes: Nodes[DistantQueryNode] = self._nodes(setting, self._query_client)
        scatter = Scatter(nodes, self._name, self._budget, self._clock)
        self._closing.callback(scatter.close)
        return scatter

    def _query(self, setting: str | None) -> Query | None:
        if setting is None:
            return None
        from ochredb.cluster.routed_query import RoutedQuery

        nodes: Nodes[Query] = self._nodes(setting, self._query_client)
        routed = RoutedQuery(nodes, budget=self._budget, clock=self._clock)
        self._closing.callback(routed.close)
        return routed

    def _query_client(self, address: str) -> QueryClient:
        from ochredb.rpc.channel import channel
        from ochredb.rpc.query_client import QueryClient

        return QueryClient(channel(address, self._rpc), self._rpc)

    def _compactor(self, setting: str | None) -> Compactor | None:
        if setting is None:
            return None
        from ochredb.cluster.routed_compactor import RoutedCompactor
        from ochredb.rpc.channel import channel
        from ochredb.rpc.compactor_client import CompactorClient

        def client(address: str) -> Compactor:
            return CompactorClient(channel(address, self._rpc), self._rpc, clock=self._clock)

        return RoutedCompactor(self._nodes(setting, client), budget=self._budget, clock=self._clock)

    def _nodes(self, setting: str, client: Callable[[str], _T]) -> Nodes[_T]:
        from ochredb.cluster.membership import open_membership
        from ochredb.cluster.nodes import Nodes

        membership = open_membership(setting, clock=self._clock, rng=self._rng)

        def close(one: Any) -> None:
            one.close()

        nodes = Nodes(membership, client, clock=self._clock, rng=self._rng, close=close)
        self._closing.callback(nodes.close)
        self._made.append(nodes)
        return nodes
