"""The query role's settings: data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryConfig:
    """memory_bytes: for graphs and tails of loaded collections; the least recently used go first.

    quick_us: a read predicted to cost less than this on a warm view may run on an event loop.
    """

    memory_bytes: int = 1 << 30
    quick_us: float = 1_000.0

    def __post_init__(self) -> None:
        if self.memory_bytes < 1 << 20:
            raise ValueError("memory_bytes must be at least 1 MiB")
