"""`ochredb.peers.Compactor` over compactors: hints go to the one that owns the collection.

Compactors find their work by themselves, and any may take any: what is said here only hurries them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from ochredb.cancel import Cancel
from ochredb.clock import Clock
from ochredb.cluster.attempts import Attempts, RoutingConfig
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.nodes import Nodes
from ochredb.errors import Unavailable
from ochredb.peers import Compactor

_T = TypeVar("_T")

log = logging.getLogger("ochredb.cluster")


class RoutedCompactor:
    """Thread-safe."""

    def __init__(
        self,
        nodes: Nodes[Compactor],
        *,
        budget: RetryBudget,
        clock: Clock,
        config: RoutingConfig | None = None,
    ) -> None:
        self._nodes, self._budget, self._clock = nodes, budget, clock
        self._config = config or RoutingConfig()

    def compact_now(self, collection_id: str) -> None:
        """Raises Unavailable if no compactor can be reached.

        One that is lost meanwhile may have done all of it; the next then has nothing to do.
        """
        self._ask(collection_id, lambda compactor: compactor.compact_now(collection_id))

    def rebuild_part(self, part_id: str, step: Callable[[], None] | None = None) -> bool:
        """As `compact_now`."""
        return self._ask(part_id, lambda compactor: compactor.rebuild_part(part_id, step))

    def _ask(self, key: str, ask: Callable[[Compactor], _T]) -> _T:
        cancel = Cancel(clock=self._clock)
        attempts = Attempts(self._nodes, key, cancel, self._budget, self._config)
        node = attempts.first()
        while True:
            try:
                return node.ask(ask)
            except Unavailable as error:
                node = attempts.next_node(error, self._clock)

    def hint(self, collection_id: str, last_offset: int, /) -> None:
        """To one compactor, and not again: the next hint, or a poll, makes up for a lost one."""
        for node in self._nodes.ordered(collection_id)[:1]:
            try:
                node.ask(lambda compactor: compactor.hint(collection_id, last_offset))
            except Exception as error:
                log.debug("a hint was lost: %s", error)
