"""Shares of a read, sent to the nodes that own its parts.

Each part has an owner, the first node of its rendezvous order, which keeps it in its caches. A node
that cannot be reached, or is silent for long, is passed over for the next of the order, and this
one at last: any node can serve any part, so who owns what is a matter of speed only (I11).

    scatter = Scatter(nodes, "query-0", budget, clock)
    scatter.owners(part_ids)  # {"query-0": (...), "query-1": (...)}
    shares = scatter.gather(collection_id, own, others, local, cancel)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property

from ochredb.cancel import Cancel
from ochredb.clock import Clock
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.nodes import Node, Nodes
from ochredb.errors import Unavailable, Unimplemented
from ochredb.peers import PartsAnswer, PartsRequest, QueryNode

_THREADS_MAX = 64  # That wait for other nodes.
_PATIENCE_S = 1.0
# A node that is being replaced may be older than this one, and not know what it is asked.
_PASSED_OVER = (Unavailable, Unimplemented)
_NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Share:
    """What one node answered, and how long that took, seen from here."""

    node: str
    request: PartsRequest
    answer: PartsAnswer
    time_us: float


# Answers in this process, in any thread; with this read's tail or without.
Local = Callable[[PartsRequest, bool], PartsAnswer]


class Scatter:
    """Thread-safe."""

    def __init__(
        self,
        nodes: Nodes[QueryNode],
        name: str,
        budget: RetryBudget,
        clock: Clock,
        *,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """nodes: all query nodes, this one too, whose name is given; its client is never called.

        budget: of what a second node is asked for. patience_s: how long a share may take before the
            next node is asked for it too.
        """
        self._nodes, self._name, self._budget, self._clock = nodes, name, budget, clock
        self._patience_s = patience_s

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_THREADS_MAX, thread_name_prefix="ochredb-scatter")

    def close(self) -> None:
        """After the last read."""
        if "_pool" in self.__dict__:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def owns(self, part_id: str) -> bool:
        """Whether this node is the one that keeps a part."""
        return self._next(part_id, _NOBODY) is None

    def owners(self, part_ids: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The parts of each owner, by its name; first this node's, which may be none."""
        owned: dict[str, list[str]] = {self._name: []}
        for part_id in part_ids:
            node = self._next(part_id, _NOBODY)
            owned.setdefault(self._name if node is None else node.name, []).append(part_id)
        return {name: tuple(ids) for name, ids in owned.items()}

    def gather(
        self,
        collection_id: str,
        own: PartsRequest,
        others: Sequence[PartsRequest],
        local: Local,
        cancel: Cancel,
    ) -> list[Share]:
        """The shares: first this node's own, with the tail, then the others in their order.

        others: parts of one owner each. Raises what a share raises, once the others are called off.
        """
        call = _Call(collection_id, local, cancel.child())
        self._budget.earn()
        try:
            asked = [self._pool.submit(self._ask, call, request, _NOBODY) for request in others]
            due_s = self._clock.monotonic_s() + self._patience_s
            shares = [self._here(call, own, True)]
            shares += [
                self._first_of(call, request, first, due_s)
                for request, first in zip(others, asked, strict=True)
            ]
            return shares
        finally:
            call.cancel.cancel()

    def _first_of(
        self, call: _Call, request: PartsRequest, first: Future[Share], due_s: float
    ) -> Share:
        """What a node was asked for; or what the next one answers, if it is asked too and wins."""
        done, _ = wait([first], max(0.0, due_s - self._clock.monotonic_s()))
        if done or not self._budget.take():
            return first.result()
        silent = self._next(request.part_ids[0], _NOBODY)
        passed = _NOBODY if silent is None else frozenset([silent.name])
        second = self._pool.submit(self._ask, call, request, passed)
        done, _ = wait([first, second], return_when=FIRST_COMPLETED)
        if first in done and first.exception() is None:
            return first.result()
        if second in done and second.exception() is None:
            if silent is not None:
                silent.outrun()
            return second.result()
        return (second if first in done else first).result()

    def _ask(self, call: _Call, request: PartsRequest, passed: frozenset[str]) -> Share:
        """From the owner, or from the next that can be reached: all parts from the same one."""
        node = self._next(request.part_ids[0], passed)
        while node is not None:
            started_s = self._clock.monotonic_s()
            node.trying()
            try:
                answer = node.client.search_parts(
                    call.collection_id, request, cancel=call.cancel.child()
                )
            except _PASSED_OVER as error:
                node.failed(error)
                self._nodes.refresh()
            except BaseException as error:
                node.failed(error)
                raise
            else:
                node.succeeded()
                time_us = (self._clock.monotonic_s() - started_s) * 1e6
                return Share(node.name, request, answer, time_us)
            call.cancel.check()
            passed = passed | {node.name}
            # Without a token no second node is bothered: this one can do it.
            node = self._next(request.part_ids[0], passed) if self._budget.take() else None
        return self._here(call, request, False)

    def _next(self, part_id: str, passed: frozenset[str]) -> Node[QueryNode] | None:
        """The first node of a part's order that was not passed over; None: this one."""
        for node in self._nodes.ordered(part_id):
            if node.name == self._name:
                return None
            if node.name not in passed:
                return node
        return None

    def _here(self, call: _Call, request: PartsRequest, with_tail: bool) -> Share:
        started_s = self._clock.monotonic_s()
        answer = call.local(request, with_tail)
        time_us = (self._clock.monotonic_s() - started_s) * 1e6
        return Share(self._name, request, answer, time_us)


@dataclass(frozen=True, slots=True)
class _Call:
    """One read that is being gathered."""

    collection_id: str
    local: Local
    cancel: Cancel
