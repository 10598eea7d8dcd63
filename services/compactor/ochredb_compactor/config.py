"""The compactor role's settings: data only."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactorConfig:
    """When work is due, and how much of the machine it may take.

    paused: this process folds and merges nothing by itself; housekeeping and garbage go on.
    tail_rows_due, tail_bytes_due: a fold takes the interpreter from everybody for some tenths of a
        second; a tail is scanned, 8,000 x 128 in 0.3 ms, and most of one that is written to again
        and again never becomes rows of a part.
    fold_rows_max, fold_bytes_max: one compaction holds this much of a tail in memory, a few times
        over; a longer tail becomes several parts.
    replaced_retention_s: a version keeps its objects this long after another has replaced it, so
        that a read that planned on it just before does not have to plan again.
    grace_s: an object is deleted this long after its last reference went; every read must end
        within half of it. Directories: 60 s (unlinking a mapped file is safe); S3: 600 s.
    memory_bytes: what the jobs of this process may take together, about; graphs become no larger
        than fits. None: whatever they need.
    merge_threads: beyond the first one they are for small merges alone.
    """

    paused: bool = False
    tail_rows_due: int = 8_000
    tail_bytes_due: int = 16 << 20
    idle_due_s: float = 5.0
    busy_due_s: float = 60.0  # The same for a small tail, while other collections are written to.
    settle_rows_due: int = 500  # A tail of this size is folded after `settle_due_s` of quiet.
    settle_due_s: float = 0.5
    fold_rows_max: int = 16_000
    fold_bytes_max: int = 32 << 20
    lease_ttl_s: float = 60.0
    replaced_retention_s: float = 10.0
    grace_s: float = 60.0
    collect_period_s: float = 5.0
    sweep_period_s: float = 600.0
    memory_bytes: int | None = None
    merge_threads: int = 1
    graph_threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    close_budget_s: float = 1.0

    def __post_init__(self) -> None:
        if self.tail_rows_due < 1:
            raise ValueError(f"tail_rows_due must be at least 1, not {self.tail_rows_due}")
        if self.fold_rows_max < 1 or self.fold_bytes_max < 1:
            raise ValueError("fold_rows_max and fold_bytes_max must be at least 1")
        if self.merge_threads < 1:
            raise ValueError(f"merge_threads must be at least 1, not {self.merge_threads}")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ValueError(f"memory_bytes must be at least 1, not {self.memory_bytes}")
        for name in ("grace_s", "replaced_retention_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
