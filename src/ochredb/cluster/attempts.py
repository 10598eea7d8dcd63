"""Whom to ask next, when, and when to give up: the one place that decides on repeats.

attempts = Attempts(nodes, collection_id, cancel, budget, config)
node = attempts.first()
...                              # It failed with an error that another node may not have:
node, delay_s = attempts.after(error)  # Raises `error` when enough has been tried.
...                              # No node: wait so long and ask again.

A pass asks the first nodes of the order, one after the other. When it found nobody, the membership
is asked again, and for some seconds the request waits, longer each time and never as long as
another, for a node that there is hope for: one whose circuit has closed, or lets one call through.
So while a role is gone its requests wait for it to come back, and hardly any is sent.

What reached a node that then failed may have cost it something, so its repeat needs a token of the
process's budget: however much fails, what is sent stays in proportion to what was asked for. What
reached nobody is repeated free.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from ochredb.cancel import Cancel
from ochredb.clock import Clock
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.nodes import GONE, Node, Nodes
from ochredb.errors import OchreError, OutcomeUnknown, Unavailable

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """attempts_max: of one request that reach a node, hedges not counted.
    pass_nodes_max: so many nodes are asked without a pause.

    pause_s: before the second pass; doubles with each up to `pause_s_max`, times a half to one and
        a half.
    wait_s_max: of all pauses of a request.
    read_patience_s, write_patience_s: after so long without an answer another node is asked as if
        the first had failed; a read that is as usual may take three times what most do.
    hedge_share: of the requests that may be sent to a second node too.
    hedge_delay_s_min: a request that takes less is not hedged, whatever the others take.
    """

    attempts_max: int = 8
    pass_nodes_max: int = 3
    pause_s: float = 0.1
    pause_s_max: float = 0.25
    wait_s_max: float = 5.0
    read_patience_s: float = 2.0
    write_patience_s: float = 8.0
    hedge_share: float = 0.05
    hedge_delay_s_min: float = 0.01

    def __post_init__(self) -> None:
        if self.attempts_max < 1 or self.pass_nodes_max < 1:
            raise ValueError("attempts_max and pass_nodes_max must be at least 1")
        if not 0 <= self.hedge_share <= 1:
            raise ValueError("hedge_share must be between 0 and 1")
        if not 0 < self.pause_s <= self.pause_s_max:
            raise ValueError("pause_s must be above 0 and at most pause_s_max")
        for name in ("read_patience_s", "write_patience_s", "hedge_delay_s_min"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")


class Attempts(Generic[T]):
    """Of one request. Not thread-safe."""

    def __init__(
        self,
        nodes: Nodes[T],
        key: str,
        cancel: Cancel,
        budget: RetryBudget,
        config: RoutingConfig,
    ) -> None:
        self._nodes, self._key, self._cancel = nodes, key, cancel
        self._budget, self._config = budget, config
        self._made = self._passes = 1
        self._waited_s, self._is_waiting = 0.0, False
        self._left: deque[Node[T]] = deque()

    def first(self) -> Node[T]:
        """Raises Unavailable if no member is known."""
        self._budget.earn()
        self._begin_pass()
        if not self._left:
            self._nodes.refresh()
            raise Unavailable("no member is known that could do this")
        return self._left.popleft()

    def spare(self) -> Node[T] | None:
        """Who would be asked next in this pass."""
        return self._left[0] if self._left else None

    def skip(self, node: Node[T]) -> None:
        """It has been asked by a hedge."""
        if node in self._left:
            self._left.remove(node)

    def after(self, error: OchreError, *, is_paid: bool = False) -> tuple[Node[T] | None, float]:
        """The next node, or None and the seconds after which to ask for it again.

        is_paid: the budget's token has been taken. Raises `error`, DeadlineExceeded, Cancelled.
        """
        self._cancel.check()
        remaining_s = self._cancel.remaining_s()
        if remaining_s is not None and remaining_s <= 0.0:
            raise error
        if not self._is_waiting:
            self._nodes.refresh()
            if not _reached_nobody(error):
                self._made += 1
                is_over = self._made > self._config.attempts_max
                if is_over or not (is_paid or self._budget.take()):
                    raise error
        if self._is_waiting:
            self._begin_pass()
        while self._left:
            node = self._left.popleft()
            if self._passes == 1 or not node.is_open:
                self._is_waiting = False
                self._budget.counted.repeat()
                return node, 0.0
        pause_s = self._pause_s()
        self._waited_s += pause_s
        if self._waited_s > self._config.wait_s_max or pause_s >= (remaining_s or math.inf):
            raise error
        self._passes += 1
        self._is_waiting = True
        return None, pause_s

    def next_node(self, error: OchreError, clock: Clock, *, is_paid: bool = False) -> Node[T]:
        """The same for a caller that may wait: returns when the node is to be asked."""
        node, delay_s = self.after(error, is_paid=is_paid)
        while node is None:
            clock.sleep(delay_s)
            node, delay_s = self.after(error)
        return node

    def _pause_s(self) -> float:
        longest_s = self._config.pause_s * 2.0 ** min(self._passes - 1, 10)
        return min(longest_s, self._config.pause_s_max) * self._nodes.rng.uniform(0.5, 1.5)

    def _begin_pass(self) -> None:
        self._left.extend(self._nodes.ordered(self._key)[: self._config.pass_nodes_max])


def _reached_nobody(error: OchreError) -> bool:
    return not isinstance(error, OutcomeUnknown) and not GONE.isdisjoint(error.detail)
