"""In which order due work is done. Pure: no clock, no store, no catalog.

Urgency is size plus age. What is due by size alone has 1, a backlog that is nearly full some 25;
each 5 s that the oldest operation waits add another 1. Only the size is bounded, so whatever waits
is first some day (I9): a fold takes a bounded piece of a tail, and what is left of it is younger.

    8,000 rows, just written     1.0
    three rows, a minute old    12.0
    200,000 rows, ten seconds   27.0

Of a merge the size counts by its logarithm, because the sizes of collections are far apart, and
the age is that of the last write. Compactors that find the same work begin with different pieces
of it: those of about equal urgency are in a random order, and what another has leased is left out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

from ochredb.catalog.pending import Due
from ochredb_compactor.config import CompactorConfig

AGEING_S = 5.0
_MERGE_ROWS = 2_000  # Of a merge that counts as much as a fold that is due.
_STEPS = 2.0  # For each doubling of urgency: closer ones are equal.


def of_tail(due: Due, now_us: int, config: CompactorConfig) -> float:
    """How much a tail wants to be folded."""
    rows = due.work.tail_rows / config.tail_rows_due
    size = due.work.tail_bytes / config.tail_bytes_due
    return max(rows, size) + _age_s(due, now_us) / AGEING_S


def of_merge(due: Due, now_us: int, _config: CompactorConfig) -> float:
    """How much the parts of a collection want to be merged."""
    return math.log2(1.0 + due.work.unsettled_rows / _MERGE_ROWS) + _age_s(due, now_us) / AGEING_S


def ordered(
    found: Iterable[Due],
    urgency: Callable[[Due, int, CompactorConfig], float],
    now_us: int,
    config: CompactorConfig,
    rng: random.Random,
) -> list[Due]:
    """The most urgent first; about equal ones in a random order."""

    def place(due: Due) -> tuple[int, float]:
        level = math.floor(_STEPS * math.log2(max(urgency(due, now_us, config), 1e-3)))
        return -level, rng.random()

    return sorted(found, key=place)


def is_taken(due: Due, now_us: int, ttl_s: float, is_gone: Callable[[str], bool]) -> bool:
    """Whether somebody is at it: a lease that has not run out, of a process that may be alive.

    None is given for longer than its ttl; if it seems to last longer, the clock was set back.
    """
    if due.owner is None or due.until_us is None:
        return False
    left_us = due.until_us - now_us
    return 0 < left_us <= 2 * int(ttl_s * 1e6) and not is_gone(due.owner)


def _age_s(due: Due, now_us: int) -> float:
    return max(0.0, (now_us - due.oldest_us) / 1e6)
