"""What a process shares with others beside the store: hints, hot bytes, limits."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ochredb.clock import Clock
from ochredb.hints.base import Hints, InProcessHints
from ochredb.hints.hot import HotFragments, NoHotFragments
from ochredb.hints.limits import Limits, LimitsConfig, LocalLimits

if TYPE_CHECKING:
    from ochredb.hints.limits import SharedLimits
    from ochredb.hints.link import RedisConfig, RedisLink


class Shared:
    """Through Redis where there is a configuration for it, else within the process.

    `hints`, `hot` and `limits` (None: nobody is limited) may be used before `start`.
    """

    def __init__(
        self,
        redis: RedisConfig | None,
        limits: LimitsConfig,
        *,
        store_id: str,
        owner: str,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        """owner: unique to this process. Raises InvalidArgument for a Redis that cannot be."""
        self.hints: Hints = InProcessHints()
        self.hot: HotFragments = NoHotFragments()
        self.limits: Limits | None = None if limits.is_none else LocalLimits(limits, clock)
        self._link: RedisLink | None = None
        self._balanced: SharedLimits | None = None
        if redis is None:
            return
        from ochredb.hints.hot import RedisHotFragments
        from ochredb.hints.limits import SharedLimits
        from ochredb.hints.link import RedisLink
        from ochredb.hints.redis import RedisHints

        self._link = RedisLink(redis, store_id, clock, rng)
        self.hints = RedisHints(self._link, owner)
        self.hot = RedisHotFragments(self._link)
        if not limits.is_none:
            self.limits = self._balanced = SharedLimits(self._link, limits, clock, owner)

    def start(self) -> None:
        """Begin to talk to others; whoever listens to hints has subscribed."""
        if self._link is not None:
            self._link.start()
        self.hints.start()
        if self._balanced is not None:
            self._balanced.start()

    def close(self) -> None:
        if self._balanced is not None:
            self._balanced.close()
        self.hints.close()
        if self._link is not None:
            self._link.close()
