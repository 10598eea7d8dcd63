"""`ochredb.peers.Query` over query nodes: a collection is read where it is kept warm.

The first node of the collection's order is asked. What becomes of a failure:

* Unavailable (not reached, draining, something that node depends on): the next node is asked.
* NotFound, InvalidArgument, TooLarge: that is the answer.
* Exhausted (429) is raised: the client comes back after `retry_after_s`. If other nodes were asked
  instead, load would move from one to the next until all are overloaded.
* Internal, Corrupt are raised: they would most likely happen again, and a request that breaks one
  node must not be taken to the others.
* DeadlineExceeded, Cancelled are raised: there is no time left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

from ochredb.cancel import Cancel
from ochredb.clock import Clock
from ochredb.cluster.attempts import Attempts, RoutingConfig
from ochredb.cluster.budget import RetryBudget, TokenBucket
from ochredb.cluster.hedge import Hedging, Race
from ochredb.cluster.latencies import Latencies
from ochredb.cluster.nodes import Node, Nodes
from ochredb.cluster.timer import Helpers, Timer
from ochredb.errors import Unavailable, Unimplemented
from ochredb.peers import Batch, GetRequest, Query, QueryRequest, QuickRead
from ochredb.types import IndexingStatus, QueryAnswer, Records

R = TypeVar("R")

_HEDGES_MAX = 10.0  # Saved up for a moment in which many requests take long.


class RoutedQuery:
    """Thread-safe. Adds about 10 microseconds to a call."""

    def __init__(
        self,
        nodes: Nodes[Query],
        *,
        budget: RetryBudget,
        clock: Clock,
        config: RoutingConfig | None = None,
    ) -> None:
        self._nodes, self._budget, self._clock = nodes, budget, clock
        self._config = config or RoutingConfig()
        self._latencies: defaultdict[str, Latencies] = defaultdict(Latencies)
        self._hedging = Hedging(
            clock,
            Timer(clock),
            Helpers(),
            TokenBucket(
                clock, share=self._config.hedge_share, per_s=0.0, most=_HEDGES_MAX, first=0.0
            ),
            budget,
        )

    def close(self) -> None:
        """After the last call; the nodes are the caller's to close."""
        self._hedging.timer.close()
        self._hedging.helpers.close()

    # -- peers.Query

    def get(self, collection_id: str, request: GetRequest, *, cancel: Cancel) -> Records:
        return self._read(
            "get", collection_id, cancel, lambda query, own: query.get(
                collection_id, request, cancel=own
            )
        )  # fmt: skip

    def query(self, collection_id: str, request: QueryRequest, *, cancel: Cancel) -> QueryAnswer:
        return self._read(
            "query", collection_id, cancel, lambda query, own: query.query(
                collection_id, request, cancel=own
            )
        )  # fmt: skip

    def count(self, collection_id: str, *, cancel: Cancel) -> int:
        return self._read(
            "count", collection_id, cancel, lambda query, own: query.count(
                collection_id, cancel=own
            )
        )  # fmt: skip

    def match(
        self, collection_id: str, request: GetRequest, *, cancel: Cancel
    ) -> tuple[list[str], int]:
        return self._read(
            "match", collection_id, cancel, lambda query, own: query.match(
                collection_id, request, cancel=own
            )
        )  # fmt: skip

    def indexing_status(self, collection_id: str, *, cancel: Cancel) -> IndexingStatus:
        return self._read(
            "indexing_status", collection_id, cancel, lambda query, own: query.indexing_status(
                collection_id, cancel=own
            )
        )  # fmt: skip

    def quick(
        self,
        collection_id: str,  # noqa: ARG002
        request: GetRequest | QueryRequest | None,  # noqa: ARG002
    ) -> QuickRead | None:
        """Nothing behind a network is answered without waiting."""
        return None

    def together(self, reads: Sequence[QuickRead]) -> Batch:  # noqa: ARG002
        raise Unimplemented("there are no quick reads here")

    # -- routing

    def _read(
        self, method: str, collection_id: str, cancel: Cancel, call: Callable[[Query, Cancel], R]
    ) -> R:
        """The answer of the first node that has one."""
        attempts = Attempts(self._nodes, collection_id, cancel, self._budget, self._config)
        self._hedging.bucket.earn()
        node = attempts.first()
        while True:
            try:
                return self._ask(method, node, attempts, cancel, call)
            except Unavailable as error:
                node = attempts.next_node(error, self._clock)

    def _ask(
        self,
        method: str,
        node: Node[Query],
        attempts: Attempts[Query],
        cancel: Cancel,
        call: Callable[[Query, Cancel], R],
    ) -> R:
        """One attempt, with a hedge if it takes long and there is somebody to ask."""
        config, latencies = self._config, self._latencies[method]
        second, usual_s = attempts.spare(), latencies.p95_s
        started_s = self._clock.monotonic_s()
        if second is not None:
            race = Race(self._hedging, node, second, call, cancel)
            patience_s = max(config.read_patience_s, 3.0 * (usual_s or 0.0))
            delay_s = max(usual_s or patience_s, config.hedge_delay_s_min)
            try:
                answer = race.run(delay_s, patience_s)
            finally:
                if race.has_hedge:
                    attempts.skip(second)
        else:
            answer = node.ask(lambda query: call(query, cancel))
        latencies.note(self._clock.monotonic_s() - started_s)
        return answer
