"""The query role's settings: data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryConfig:
    """memory_bytes: for graphs and tails of loaded collections; the least recently used go first.

    mapped_bytes: of mapped files whose pages may stay resident while nobody reads them; beyond, the
        pages of the least recently used are let go (they stay in the page cache).
    tail_bytes_max: for what logs hold beyond parts. If that of a collection does not fit, even
        without all others, its read is refused (429), never answered in part. More than one log can
        have: 200,000 operations or 512 MiB.
    quick_us: a read predicted to cost less than this on a warm view may run on an event loop.
    beside_us: the same of a search of one graph, which an event loop has done in a thread beside.
    spread_bytes: the parts of a larger collection are spread over the query nodes, if there are
        several: each keeps and searches those that it owns.
    target_recall: share of the true ten nearest that approximate searches shall find, on
        collections that are hard enough to miss it; a request may name another. 0: as `ef_search`
        of the collection gives.
    """

    memory_bytes: int = 1 << 30
    mapped_bytes: int = 128 << 20
    tail_bytes_max: int = 1 << 30
    quick_us: float = 1_000.0
    beside_us: float = 3_000.0
    spread_bytes: int = 1 << 30
    target_recall: float = 0.95

    def __post_init__(self) -> None:
        if self.memory_bytes < 1 << 20:
            raise ValueError("memory_bytes must be at least 1 MiB")
        if not 0 <= self.target_recall < 1:
            raise ValueError(f"target_recall must be in [0, 1), not {self.target_recall}")
