"""Several query nodes in one process: the same catalog and store, caches of their own."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ochredb.cancel import Cancel
from ochredb.clock import Clock
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.membership import StaticMembership
from ochredb.cluster.nodes import Nodes
from ochredb.parts.open_parts import OpenParts
from ochredb.peers import DistantQueryNode, PartsAnswer, PartsRequest
from ochredb.proto.v1 import query_pb2 as pb
from ochredb.rpc import reads
from ochredb.rpc.columns import answers_of, columns_of
from ochredb.storage.base import LocalStore
from ochredb_node.node import Node
from ochredb_query.config import QueryConfig
from ochredb_query.scatter import Scatter
from ochredb_query.service import QueryService

_CHUNK_BYTES = 1_000


@dataclass
class Line:
    """The way to one node. fails: raised instead of a share, by whoever asks next, in order."""

    service: QueryService | None = None
    fails: list[BaseException] = field(default_factory=list)
    always: BaseException | None = None
    shares: Counter[str] = field(default_factory=Counter)  # Part -> how often it was asked for.

    def search_parts(
        self, collection_id: str, request: PartsRequest, *, cancel: Cancel
    ) -> PartsAnswer:
        self.shares.update(request.part_ids)
        if self.fails:
            raise self.fails.pop(0)
        if self.always is not None:
            raise self.always
        assert self.service is not None
        # As over a network, but for the network.
        message = pb.SearchPartsRequest()
        message.ParseFromString(reads.encode_parts(collection_id, request).SerializeToString())
        collection_id, request = reads.decode_parts(message)
        answer = self.service.search_parts(collection_id, request, cancel=cancel)
        answers = list(answers_of(reads.encode_parts_answer(answer), _CHUNK_BYTES))
        return reads.decode_parts_answer(columns_of(iter(answers)))

    def begin_search_parts(
        self, collection_id: str, request: PartsRequest, *, cancel: Cancel
    ) -> Callable[[], PartsAnswer]:
        return lambda: self.search_parts(collection_id, request, cancel=cancel)

    def keep_copies(self, objects: Sequence[tuple[str, int]], *, cancel: Cancel) -> None:
        if self.always is not None:
            raise self.always
        assert self.service is not None
        self.service.keep_copies(objects, cancel=cancel)


class QueryNodes:
    """Query nodes `query-0`, `query-1` and so on, beside a node's own."""

    def __init__(
        self,
        node: Node,
        count: int,
        config: QueryConfig,
        *,
        clock: Clock | None = None,
        store_of: Callable[[str], LocalStore] | None = None,
        **scatter: Any,
    ) -> None:
        """clock: the scatters', the node's if None. store_of: of a node by its name, likewise."""
        clock = clock or node.clock
        self.lines: dict[str, Line] = {f"query-{number}": Line() for number in range(count)}
        self.services: list[QueryService] = []
        self._scatters: list[Scatter] = []
        for name, line in self.lines.items():
            nodes: Nodes[DistantQueryNode] = Nodes(
                StaticMembership({name: name for name in self.lines}),
                lambda address: self.lines[address],  # type: ignore[arg-type, return-value]
                clock=clock,
                rng=random.Random(1),
            )
            each = Scatter(nodes, name, RetryBudget(clock), clock, **scatter)
            store = node.store if store_of is None else store_of(name)
            line.service = QueryService(
                node.logs,
                node.versions,
                node.namespace,
                store,
                OpenParts(store),
                node.clock,
                config,
                scatter=each,
            )
            self.services.append(line.service)
            self._scatters.append(each)
        # With the node's own: what opens parts ahead reads its catalog.
        self._close_query = node.query.close
        node.query.close = self._close_services  # type: ignore[method-assign]

    def _close_services(self) -> None:
        for service in self.services:
            service.close()
        self._close_query()

    def shares(self) -> Sequence[int]:
        """How many shares each node was asked for so far."""
        return [sum(line.shares.values()) for line in self.lines.values()]

    def close(self) -> None:
        for each in self._scatters:
            each.close()
