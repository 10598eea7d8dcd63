"""The log role's settings: data only."""

from __future__ import annotations

from dataclasses import dataclass

_INLINE_BYTES_LOCAL = 512 << 10
_INLINE_BYTES_REMOTE = 32 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Sizes in bytes of encoded requests.

    inline_bytes_max: below it a payload is stored in SQL: one fsync instead of three. None: 512 KiB
        in a catalog of this machine, 32 KiB in one that others share.
    flushes_max: so many flushes at once; a catalog of this machine has one writer, and one flush.
    """

    inline_bytes_max: int | None = None
    flush_bytes_max: int = 8 << 20
    flushes_max: int = 4
    queue_requests_max: int = 1_000

    def __post_init__(self) -> None:
        if self.inline_bytes_max is not None:
            if not 0 <= self.inline_bytes_max <= self.flush_bytes_max:
                raise ValueError("inline_bytes_max must lie between 0 and flush_bytes_max")
        if self.flush_bytes_max < 1:
            raise ValueError("flush_bytes_max must be at least 1")
        if self.flushes_max < 1:
            raise ValueError("flushes_max must be at least 1")
        if self.queue_requests_max < 1:
            raise ValueError("queue_requests_max must be at least 1")

    def inline_bytes(self, is_local: bool) -> int:
        """The largest payload that is stored in SQL."""
        if self.inline_bytes_max is not None:
            return self.inline_bytes_max
        return _INLINE_BYTES_LOCAL if is_local else _INLINE_BYTES_REMOTE
