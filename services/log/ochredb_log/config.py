"""The log role's settings: data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Sizes in bytes of encoded requests.

    Below `inline_bytes_max` a payload is stored in SQL: one fsync instead of three.
    """

    inline_bytes_max: int = 512 << 10
    flush_bytes_max: int = 8 << 20
    queue_requests_max: int = 1_000

    def __post_init__(self) -> None:
        if not 0 <= self.inline_bytes_max <= self.flush_bytes_max:
            raise ValueError("inline_bytes_max must lie between 0 and flush_bytes_max")
        if self.queue_requests_max < 1:
            raise ValueError("queue_requests_max must be at least 1")
