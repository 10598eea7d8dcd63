"""How many neighbours the nodes of a graph get: more where it is hard to search.

The defaults of a collection (16 neighbours) suit most data. Where near rows are many and far from
one another, recall of 0.95 takes a candidate list of many hundreds, and none is long enough as the
graph grows; a node with more neighbours costs less than that list. So the settings are where a
graph begins. What its calibration says of its first rows decides how its later ones are inserted: a
graph is made wider, not built again (docs/decisions/0049-denser-graphs-where-search-is-hard.md).

Whoever asks for a number other than the default gets that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import hnswlib

from ochredb.configuration import IndexSettings
from ochredb.parts.calibration import (
    QUERIES_OF_A_KIND_MEANWHILE,
    RECALL_ENOUGH_MEANWHILE,
    Calibration,
    calibrate,
    ef_for,
)
from ochredb.parts.graph import inserted
from ochredb.parts.graph_links import GraphLinks
from ochredb.priority import at_lowest_priority
from ochredb.types import Float32s

_DEFAULT_NEIGHBORS = IndexSettings().max_neighbors
_RECALL = 0.95
# (candidate list, neighbours): from where a list for that recall is longer than the first, nodes
# get the second.
_STEPS = ((200, 24), (700, 32))
# The list grows about as the square root of the rows, so far ahead it is foretold.
_ROWS_FORETOLD = 4
_FIRST_ROWS = 16_000  # Of a new graph; fewer say little of the others.


def neighbors_for(
    settings: IndexSettings, known: Calibration, labels: int, *, present: int = 0
) -> int:
    """Neighbours of each node (M) for what is inserted now.

    known: of the graph that grows, or of the one that a new one replaces. labels: that the graph
        will have. present: M of that graph; it gets no less.
    """
    asked = settings.max_neighbors
    if asked != _DEFAULT_NEIGHBORS:
        return max(asked, present)
    wanted = max(asked, present)
    if known.curve and known.curve[0][1] < _RECALL:
        ef = ef_for(known.curve, _RECALL)
        ahead = min(max(labels / max(1, known.labels), 1.0), _ROWS_FORETOLD)
        expected = math.inf if ef is None else ef * math.sqrt(ahead)
        wanted = max([wanted] + [neighbors for least, neighbors in _STEPS if expected > least])
    return wanted


def built(
    vectors: Float32s,
    settings: IndexSettings,
    known: Calibration,
    *,
    present: int = 0,
    threads: int,
    step: Callable[[], None],
) -> hnswlib.Index:
    """A new index over `vectors` (float32[n, d]), as dense as they need.

    known, present: of the graph that it replaces. If nothing is, the first rows are calibrated,
    and again at each fourfold of them. Cost: of `inserted`, and 1 to 2 % for that.
    """
    count = len(vectors)
    free = settings.max_neighbors == _DEFAULT_NEIGHBORS
    index: hnswlib.Index | None = None
    done, neighbors = 0, present if free else 0
    while index is None or done < count:
        stop = _next_stop(known, count) if free else count
        neighbors = neighbors_for(settings, known, stop, present=neighbors)
        if index is None:
            index = inserted(
                vectors[:stop], replace(settings, max_neighbors=neighbors),
                room=count - stop, threads=threads, step=step,
            )  # fmt: skip
        else:
            if neighbors > index.M:
                links = GraphLinks.of(index, vectors[:done], None).widened(neighbors)
                index = links.index(links.nodes(vectors[:done], None), room=count - done)
            inserted(vectors[done:stop], settings, into=index, threads=threads, step=step)
        done = stop
        if done < count:
            curve = at_lowest_priority(
                partial(
                    calibrate, index, vectors[:done], None, settings.space,
                    seed=done, threads=threads, step=step,
                    queries_of_a_kind=QUERIES_OF_A_KIND_MEANWHILE,
                    recall_enough=RECALL_ENOUGH_MEANWHILE,
                )
            )  # fmt: skip
            known = Calibration(curve, done, QUERIES_OF_A_KIND_MEANWHILE)
    return index


def _next_stop(known: Calibration, count: int) -> int:
    """Up to where rows are inserted before it is measured again; not for few more."""
    stop = _ROWS_FORETOLD * known.labels if known.labels else _FIRST_ROWS
    return stop if 1.25 * stop < count else count
