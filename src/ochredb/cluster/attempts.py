"""Whom to ask next, when, and when to give up: the one place that decides on repeats.

attempts = Attempts(nodes, collection_id, cancel, budget, config)
node = attempts.first()
...                              # It failed with an error that another node may not have:
node, delay_s = attempts.after(error)  # Raises `error` when enough has been tried.

A pass asks the first nodes of the order, one after the other. After a pass that found nobody, the
membership is asked again, and the next pass waits a little, longer each time, never as long as
another caller. Each repeat needs a token of the process's budget, so however much fails, what is
sent stays in proportion to what was asked for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from ochredb.cancel import Cancel
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.nodes import Node, Nodes
from ochredb.errors import OchreError, Unavailable

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """attempts_max: of one request, hedges not counted. pass_nodes_max: asked without a pause.

    pause_s: before the second pass; doubles with each up to `pause_s_max`, times a half to one and
        a half.
    read_patience_s, write_patience_s: after so long without an answer another node is asked as if
        the first had failed; a read that is as usual may take three times what most do.
    hedge_share: of the requests that may be sent to a second node too.
    hedge_delay_s_min: a request that takes less is not hedged, whatever the others take.
    """

    attempts_max: int = 8
    pass_nodes_max: int = 3
    pause_s: float = 0.1
    pause_s_max: float = 1.0
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

    def after(self, error: OchreError, *, is_paid: bool = False) -> tuple[Node[T], float]:
        """The next node, and the seconds to wait before it is asked. Raises `error`.

        is_paid: the budget's token has been taken.
        """
        self._nodes.refresh()
        self._cancel.check()
        if self._made >= self._config.attempts_max or not (is_paid or self._budget.take()):
            raise error
        self._made += 1
        delay_s = 0.0
        if not self._left:
            longest_s = self._config.pause_s * 2.0 ** (self._passes - 1)
            delay_s = min(longest_s, self._config.pause_s_max)
            delay_s *= self._nodes.rng.uniform(0.5, 1.5)
            self._passes += 1
            self._begin_pass()
        remaining_s = self._cancel.remaining_s()
        if not self._left or (remaining_s is not None and remaining_s <= delay_s):
            raise error
        return self._left.popleft(), delay_s

    def _begin_pass(self) -> None:
        self._left.extend(self._nodes.ordered(self._key)[: self._config.pass_nodes_max])
