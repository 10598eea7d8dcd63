"""What searching costs, in microseconds of one core, and which way is chosen. Pure.

The constants were measured on an x86-64 core with AVX-512. They need only be right enough to order
the alternatives: a wrong choice costs time, never an answer.
"""

from __future__ import annotations

import math

# A filtered answer comes from an exact scan up to this cost: filtering a graph loses recall.
FILTERED_SCAN_US_MAX = 8_000.0
# Below this share of matching rows a graph is never asked: most of what it visits would be dropped.
GRAPH_SHARE_MIN = 0.05
# A graph is searched with a candidate list longer than `ef_search` by this factor: ours is built by
# several threads and grown, and shall not find less than one built in one go.
EF_MARGIN = 1.25
# How many more candidates than asked for are recomputed exactly, at least.
OVERFETCH_ROWS = 16


def scan_us(matching: int, total: int, dimension: int) -> float:
    """An exact scan: gather the matching rows, or one product over all, whichever is chosen."""
    gather = matching * (0.02 + 0.0005 * dimension)
    everything = total * (0.006 + 0.00022 * dimension)
    return 25.0 + (gather if matching <= 0.3 * total else everything)


def graph_us(labels: int, dimension: int, ef: int) -> float:
    """One search of a graph with candidate list `ef`; memory latency grows with its size."""
    return 25.0 + ef * (0.3 + 0.006 * dimension) * max(0.5, math.sqrt(labels / 20_000))


def fetch_count(count: int, share: float) -> int:
    """How many neighbours to ask a graph for, so that `count` survive a filter of this share."""
    return math.ceil((count + OVERFETCH_ROWS) / max(share, 1e-9) * (1.0 if share > 0.999 else 1.2))


def prefers_graph(
    *, matching: int, total: int, labels: int, dimension: int, count: int, ef: int, filtered: bool
) -> bool:
    """Whether a graph search is the better way to `count` neighbours among `matching` rows."""
    share = matching / max(1, total)
    if labels == 0 or matching <= count + OVERFETCH_ROWS:
        return False
    scan = scan_us(matching, total, dimension)
    if filtered and (scan <= FILTERED_SCAN_US_MAX or share < GRAPH_SHARE_MIN):
        return False
    return graph_us(labels, dimension, max(ef, fetch_count(count, share))) < scan
