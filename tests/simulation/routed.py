"""Calls between simulated processes: logs of other servers, and members that are known late."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ochredb.cancel import Cancel
from ochredb.cluster.attempts import RoutingConfig
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.membership import Members
from ochredb.cluster.nodes import Nodes
from ochredb.cluster.routed_log import RoutedLog
from ochredb.errors import OchreError, OutcomeUnknown, Unavailable
from ochredb.ids import IdSource
from ochredb.peers import Log
from ochredb.types import Appended, Operations

if TYPE_CHECKING:
    from .cluster import Cluster, Node

_T = TypeVar("_T")
# As patient as a process that stalls for ten seconds now and then deserves.
_CONFIG = RoutingConfig(write_patience_s=3.0)


class RemoteLog:
    """`ochredb.peers.Log` of a server in another process, as a client sees it."""

    def __init__(self, cluster: Cluster, address: str) -> None:
        self._cluster, self._address = cluster, address

    def append(
        self, collection_id: str, operations: Operations, *, cancel: Cancel, **more: Any
    ) -> Appended:
        return self._call(
            lambda node, own: node.log.append(collection_id, operations, cancel=own, **more),
            cancel,
        )

    def submit(
        self,
        collection_id: str,
        operations: Operations,
        *,
        cancel: Cancel,
        deliver: Callable[[Appended | BaseException], None],
        **more: Any,
    ) -> None:
        scheduler = self._cluster.scheduler

        def work() -> None:
            outcome: Appended | BaseException
            try:
                outcome = self.append(collection_id, operations, cancel=cancel, **more)
            except OchreError as error:
                outcome = error
            deliver(outcome)

        caller = scheduler.current
        assert caller is not None
        scheduler.spawn(caller.process, work)

    def append_evaluated(
        self,
        collection_id: str,
        evaluate: Callable[[], Operations],
        *,
        cancel: Cancel,
        **more: Any,
    ) -> Appended:
        return self._call(
            lambda node, own: node.log.append_evaluated(
                collection_id, evaluate, cancel=own, **more
            ),
            cancel,
        )

    def record_nothing(
        self, collection_id: str, key: str, request_hash: bytes, *, cancel: Cancel
    ) -> Appended:
        return self._call(
            lambda node, own: node.log.record_nothing(collection_id, key, request_hash, cancel=own),
            cancel,
        )

    def repeated(
        self, collection_id: str, key: str, request_hash: bytes, *, cancel: Cancel
    ) -> Appended | None:
        return self._call(
            lambda node, own: node.log.repeated(collection_id, key, request_hash, cancel=own),
            cancel,
        )

    def _call(self, work: Callable[[Node, Cancel], _T], cancel: Cancel) -> _T:
        from .cluster import Lost

        cancel.check()
        node = self._cluster.servers_by_name.get(self._address)
        if node is None:
            raise Unavailable("no route to host", unreachable=True)
        own = Cancel(cancel.remaining_s(), node.clock)
        try:
            return self._cluster.call(node, lambda: work(node, own), cancel)
        except Lost:
            raise OutcomeUnknown("the answer was lost", unreachable=True) from None


class LateMembership:
    """The servers as they were when somebody last asked to look again."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.members = Members()
        self.refresh()

    def refresh(self) -> None:
        names = [node.process.name for node in self._cluster.servers]
        self.members = self.members.then({name: name for name in names})

    def close(self) -> None:
        """There is nothing to close."""


def routed_log(cluster: Cluster, node: Node, rng: random.Random) -> Log:
    """What the frontend of a server writes to: the logs of all servers."""
    nodes: Nodes[Log] = Nodes(
        LateMembership(cluster),
        lambda address: RemoteLog(cluster, address),
        clock=node.clock,
        rng=rng,
    )
    return RoutedLog(
        nodes,
        budget=RetryBudget(node.clock),
        ids=IdSource(node.clock, rng),
        clock=node.clock,
        config=_CONFIG,
    )
