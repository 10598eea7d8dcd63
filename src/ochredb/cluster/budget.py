"""Token buckets that keep repeats from becoming a storm.

When everything fails, every request would be sent several times: just then, load multiplies. So a
repeat needs a token, and tokens are earned by requests: what is sent in all stays below a fixed
multiple of what was asked for.
"""

from __future__ import annotations

import threading

from ochredb.clock import Clock

_RETRY_SHARE, _RETRIES_PER_S, _RETRY_TOKENS_MAX = 0.2, 5.0, 50.0


class TokenBucket:
    """Thread-safe. Each request earns `share` of a token, each second `per_s`; at most `most`."""

    def __init__(
        self, clock: Clock, *, share: float, per_s: float, most: float, first: float
    ) -> None:
        """first: tokens to begin with."""
        self._clock, self._lock = clock, threading.Lock()
        self._share, self._per_s, self._most = share, per_s, most
        self._tokens = first
        self._filled_s = clock.monotonic_s()

    def earn(self) -> None:
        with self._lock:
            self._tokens = min(self._most, self._tokens + self._share)

    def take(self) -> bool:
        """Whether there was a token; it is gone."""
        with self._lock:
            if self._per_s:
                now = self._clock.monotonic_s()
                earned = (now - self._filled_s) * self._per_s
                self._tokens = min(self._most, self._tokens + earned)
                self._filled_s = now
            if self._tokens < 1.0:
                return False
            self._tokens -= 1.0
            return True


class Counted:
    """Calls to other processes since the start. Thread-safe.

    repeats: made after another attempt had failed. hedges: reads, and shares of them, made beside
        one that took long.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.repeats = self.hedges = 0

    def repeat(self) -> None:
        with self._lock:
            self.repeats += 1

    def hedge(self) -> None:
        with self._lock:
            self.hedges += 1


class RetryBudget(TokenBucket):
    """Of one process, for all that it repeats: a fifth of its requests, and five a second.

    counted: what was sent beyond the first attempts, whatever paid for it.
    """

    def __init__(self, clock: Clock) -> None:
        self.counted = Counted()
        super().__init__(
            clock,
            share=_RETRY_SHARE,
            per_s=_RETRIES_PER_S,
            most=_RETRY_TOKENS_MAX,
            first=_RETRY_TOKENS_MAX,
        )
