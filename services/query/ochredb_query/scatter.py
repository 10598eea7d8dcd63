"""Shares of a read, sent to the nodes that own its parts.

Each part has an owner, the first node of its rendezvous order that has not more than its share of
the others, which keeps it in its caches. A node that cannot be reached is passed over for the next
of the order, and this one at last. If one takes longer than most did lately the next is asked
beside it, as for whole reads (`ochredb.cluster.hedge`). Any node can serve any part, so who owns
what is a matter of speed only (I11).

    scatter = Scatter(nodes, "query-0", budget, clock)
    scatter.owners({part_id: size_bytes})  # {"query-0": (...), "query-1": (...)}
    shares = scatter.gather(collection_id, own, others, local, cancel)
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ochredb.cancel import Cancel, Cancelled
from ochredb.clock import Clock
from ochredb.cluster.attempts import RoutingConfig
from ochredb.cluster.budget import RetryBudget, TokenBucket
from ochredb.cluster.latencies import Latencies
from ochredb.cluster.nodes import Node, Nodes
from ochredb.cluster.timer import Helpers, Timer
from ochredb.errors import OchreError, Unavailable, Unimplemented
from ochredb.peers import DistantQueryNode, PartsAnswer, PartsRequest

_HELPERS_MAX = 16  # Threads that ask second nodes.
_PATIENCE_S = 1.0
_ROUTING = RoutingConfig()  # Shares are hedged as whole reads are.
_HEDGES_MAX = 10.0  # Saved up for a moment in which many shares take long.
_LOOK_AGAIN_S_MIN = 0.1
# A node that is being replaced may be older than this one, and not know what it is asked.
_PASSED_OVER = (Unavailable, Unimplemented)
_KEEP_S = 5.0  # Nobody waits for it, but it must end.
_KEPT_AT_ONCE = 1_000  # Objects named in one message.
_SHARE_MAX = 1.15  # Of the bytes of all parts, as a multiple of an even share.


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
        nodes: Nodes[DistantQueryNode],
        name: str,
        budget: RetryBudget,
        clock: Clock,
        *,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """nodes: all query nodes, this one too, whose name is given; its client is never called.

        budget: of what is asked for again. patience_s: a share that takes so long, and three times
            what most do, has failed for now.
        """
        self.name = name
        self._nodes, self._budget, self._clock = nodes, budget, clock
        self.patience_s = patience_s
        self._latencies: defaultdict[tuple[type, bool], Latencies] = defaultdict(Latencies)
        self._hedges = TokenBucket(
            clock, share=_ROUTING.hedge_share, per_s=0.0, most=_HEDGES_MAX, first=0.0
        )
        self._timer, self._helpers = Timer(clock), Helpers(_HELPERS_MAX)

    def close(self) -> None:
        """After the last read."""
        self._helpers.close()
        self._timer.close()

    def owners(
        self, sizes: Mapping[str, int], *, without: str | None = None
    ) -> dict[str, tuple[str, ...]]:
        """The parts of each owner, by its name; first this node's, which may be none.

        sizes: bytes of each part. A node that has its share already, and a little more, is passed
        over: the busiest one says how long a read takes. Older parts choose first, so they stay
        where they are. All nodes find the same, as long as they know the same parts and members.

        without: as if this node were gone.
        """
        owned: dict[str, list[str]] = {self.name: []}
        taken: dict[str, int] = {}
        bytes_max = 0.0
        for part_id in sorted(sizes):
            order = [
                node
                for node in self._nodes.ordered(part_id)
                if not node.is_open and node.name != without
            ]
            if not bytes_max:
                bytes_max = sum(sizes.values()) / max(1, len(order)) * _SHARE_MAX
            names = [node.name for node in order] or [self.name]
            size = sizes[part_id]
            free = (name for name in names if taken.get(name, 0) + size <= bytes_max)
            name = next(free, names[0])
            taken[name] = taken.get(name, 0) + size
            owned.setdefault(name, []).append(part_id)
        return {name: tuple(ids) for name, ids in owned.items()}

    def heirs(self, sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
        """The parts that each node would own if their owner were gone, by its name.

        Cost: one `owners` for each owner.
        """
        found: defaultdict[str, list[str]] = defaultdict(list)
        for owner, part_ids in self.owners(sizes).items():
            if part_ids:
                for name, ids in self.owners(sizes, without=owner).items():
                    if name != owner:
                        found[name] += sorted(set(ids).intersection(part_ids))
        return {name: tuple(ids) for name, ids in found.items() if ids}

    def others(self, key: str) -> list[Node[DistantQueryNode]]:
        """All nodes in the order of a key, without this one and such as are passed over."""
        ordered = self._nodes.ordered(key)
        return [node for node in ordered if node.name != self.name and not node.is_open]

    def ask_to_keep(
        self,
        nodes: Sequence[Node[DistantQueryNode] | None],
        objects: Sequence[tuple[str, int]],
        cancel: Cancel,
    ) -> bool:
        """Have the first of some nodes keep copies; whether one of them was there to be asked.

        Raises Cancelled.
        """
        for node in nodes:
            if node is None:
                continue
            own = Cancel(_KEEP_S, self._clock)
            take_back = cancel.when_cancelled(own.cancel)
            try:
                node.ask(partial(_have_kept, objects=objects, cancel=own))
            except _PASSED_OVER:
                continue
            finally:
                take_back()
            return True
        return False

    def gather(
        self,
        collection_id: str,
        own: PartsRequest,
        others: Sequence[tuple[str, PartsRequest]],
        local: Local,
        cancel: Cancel,
    ) -> list[Share]:
        """The shares: first this node's own, with the tail, then the others in their order.

        others: who is asked, for which parts. Raises what a share raises, once the others are
            called off.
        """
        call = _Call(collection_id, local, cancel.child())
        self._budget.earn()
        asked: list[_Asked] = []
        try:
            for name, request in others:
                self._hedges.earn()
                asked.append(_Asked(self, call, request, name))
            return [self.here(call, own, True), *(each.answer() for each in asked)]
        finally:
            call.cancel.cancel()
            for each in asked:
                each.end()

    # -- for `_Asked`

    def latencies(self, request: PartsRequest) -> Latencies:
        """Of shares of this kind: pages, their keys alone, or searches."""
        return self._latencies[type(request.request), request.keys_only]

    def call_later(
        self, delay_s: float, call: Callable[[], None], is_void: Callable[[], bool]
    ) -> None:
        self._timer.call_later(delay_s, call, is_void)

    def may_hedge(
        self, node: Node[DistantQueryNode], request: PartsRequest, failed_at_s: float
    ) -> bool:
        """Whether the next node may be asked for a share that this one has not answered."""
        second = self.next(request, frozenset([node.name]))
        if second is not None and (second.is_open or second.is_exhausted):
            return False
        if node.is_open or self.now_s() >= failed_at_s:
            return self._budget.take()
        return self._hedges.take()

    def help(self, work: Callable[[], None]) -> bool:
        """Whether a thread is there to do it."""
        return self._helpers.run(work)

    def next(self, request: PartsRequest, passed: frozenset[str]) -> Node[DistantQueryNode] | None:
        """Who is to be asked for a share; None: this node. Its parts stay together: a page is of
        the rows of all of them."""
        return self._next(request.part_ids[0], passed)

    def named(self, name: str) -> Node[DistantQueryNode] | None:
        """The node of this name; None if it is this one, or has left."""
        if name == self.name:
            return None
        return next((node for node in self._nodes.ordered(name) if node.name == name), None)

    def ask_others(
        self,
        call: _Call,
        request: PartsRequest,
        passed: frozenset[str],
        *,
        is_hedge: bool = False,
    ) -> Share:
        """Another node's answer, or this one's; `passed` did not answer.

        is_hedge: not yet, that is; the first token has been taken.
        """
        counted = self._budget.counted
        if not is_hedge:
            self._nodes.refresh()
        # Without a token no second node is bothered: this one can do it.
        while (node := self.next(request, passed)) is not None and (
            is_hedge or self._budget.take()
        ):
            (counted.hedge if is_hedge else counted.repeat)()
            is_hedge = False
            started_s = self.now_s()
            try:
                answer = node.ask(partial(_search, call=call, request=request))
            except _PASSED_OVER:
                call.cancel.check()
                passed = passed | {node.name}
            else:
                return Share(node.name, request, answer, 1e6 * (self.now_s() - started_s))
        return self.here(call, request, False)

    def here(self, call: _Call, request: PartsRequest, with_tail: bool) -> Share:
        started_s = self.now_s()
        answer = call.local(request, with_tail)
        return Share(self.name, request, answer, 1e6 * (self.now_s() - started_s))

    def now_s(self) -> float:
        return self._clock.monotonic_s()

    def _next(self, part_id: str, passed: frozenset[str]) -> Node[DistantQueryNode] | None:
        """The first node of a part's order that was not passed over; None: this one."""
        for node in self._nodes.ordered(part_id):
            if node.name == self.name:
                return None
            if node.name not in passed:
                return node
        return None


@dataclass(frozen=True, slots=True)
class _Call:
    """One read that is being gathered."""

    collection_id: str
    local: Local
    cancel: Cancel


def _search(node: DistantQueryNode, call: _Call, request: PartsRequest) -> PartsAnswer:
    return node.search_parts(call.collection_id, request, cancel=call.cancel.child())


def _have_kept(node: DistantQueryNode, objects: Sequence[tuple[str, int]], cancel: Cancel) -> None:
    for first in range(0, len(objects), _KEPT_AT_ONCE):
        node.keep_copies(objects[first : first + _KEPT_AT_ONCE], cancel=cancel)


class _Asked:
    """One share that another node was asked for, and perhaps a second one."""

    def __init__(self, scatter: Scatter, call: _Call, request: PartsRequest, name: str) -> None:
        """The request is on its way when this returns."""
        self._scatter, self._call, self._request = scatter, call, request
        self._lock = threading.Lock()
        self._is_over = self._has_ended = False
        self._second_ended: threading.Event | None = None
        self._second: Share | None = None  # If it was first.
        self._delay_s = self._failed_at_s = 0.0
        self._latencies = scatter.latencies(request)
        self._node = scatter.named(name)
        self._cancel = call.cancel.child()
        self._started_s = scatter.now_s()
        if self._node is not None:
            self._node.trying()
            self._wait = self._begin(self._node)

    def _begin(self, node: Node[DistantQueryNode]) -> Callable[[], PartsAnswer]:
        try:
            return node.client.begin_search_parts(
                self._call.collection_id, self._request, cancel=self._cancel
            )
        except OchreError as error:
            failure = error

        def fail() -> PartsAnswer:
            raise failure

        return fail

    def end(self) -> None:
        """The read is over, though nobody may have waited for this."""
        self._is_over = True
        if self._node is not None and not self._has_ended:
            self._node.failed(Cancelled("another share of the read failed"))

    def answer(self) -> Share:
        node, scatter = self._node, self._scatter
        if node is None:
            return scatter.here(self._call, self._request, False)
        self._expect()
        self._has_ended = True
        try:
            answer = self._wait()
        except BaseException as error:
            node.failed(error)
            self._wait_for_second()
            if self._second is not None:
                self._latencies.note(scatter.now_s() - self._started_s)
                return self._second
            self._call.cancel.check()
            if not isinstance(error, _PASSED_OVER):
                raise
            return scatter.ask_others(self._call, self._request, frozenset([node.name]))
        finally:
            self._is_over = True
        node.succeeded()
        taken_s = scatter.now_s() - self._started_s
        self._latencies.note(taken_s)
        return Share(node.name, self._request, answer, 1e6 * taken_s)

    def _expect(self) -> None:
        """It is waited for from now on: have another node asked when it takes long."""
        now_s, usual_s = self._scatter.now_s(), self._latencies.p95_s
        patience_s = max(self._scatter.patience_s, 3.0 * (usual_s or 0.0))
        self._failed_at_s = now_s + patience_s
        # What came meanwhile is not late, but has yet to be read.
        left_s = patience_s if usual_s is None else usual_s - (now_s - self._started_s)
        self._delay_s = max(left_s, _ROUTING.hedge_delay_s_min)
        self._look_later(self._delay_s)

    def _look_later(self, delay_s: float) -> None:
        self._scatter.call_later(delay_s, self._due, lambda: self._is_over)

    def _wait_for_second(self) -> None:
        with self._lock:
            self._is_over = True  # No second one is begun any more.
            ended = self._second_ended
        if ended is not None:
            ended.wait()  # It ends when the read does.

    # -- in other threads

    def _due(self) -> None:
        """The node takes its time: ask another, or look again later."""
        assert self._node is not None
        may_hedge = self._scatter.may_hedge(self._node, self._request, self._failed_at_s)
        if not may_hedge or not self._begin_second():
            self._look_later(max(2.0 * self._delay_s, _LOOK_AGAIN_S_MIN))

    def _begin_second(self) -> bool:
        """False if no thread is free for it."""
        ended = threading.Event()
        with self._lock:
            if self._is_over:
                return True
            self._second_ended = ended
        if self._scatter.help(lambda: self._ask_second(ended)):
            return True
        with self._lock:
            self._second_ended = None
        ended.set()
        return False

    def _ask_second(self, ended: threading.Event) -> None:
        node = self._node
        assert node is not None
        passed = frozenset([node.name])
        try:
            share = self._scatter.ask_others(self._call, self._request, passed, is_hedge=True)
            with self._lock:
                if self._is_over:
                    return
                self._second = share
            node.outrun()
            self._cancel.cancel()
        except OchreError:
            pass  # The first one decides.
        finally:
            ended.set()
