"""The approximate index over a part's vectors: hnswlib behind the few calls we need.

Labels are numbers 0..m-1 in order of insertion. A graph that was grown from an older part's keeps
the old labels, so `rows` maps each label to its row in this part, or to -1 if the record is dead.
Inner products and cosine are hnswlib's own spaces. add_items and knn_query are not safe together on
one index: a graph is built aside and published whole (docs/formats/graph.md).
"""

from __future__ import annotations

from collections.abc import Callable

import hnswlib
import numpy as np
from numpy.typing import NDArray

from ochredb.configuration import IndexSettings
from ochredb.errors import Corrupt, Unavailable
from ochredb.priority import at_lowest_priority
from ochredb.types import Float32s, Int64s
from ochredb.vectors.threads import in_shares

_SUB_BATCH_ROWS = 2_000
_SEED = 100
# What hnswlib says when it is not the file's fault.
_NO_DAMAGE = ("Not enough memory", "Cannot open file")


class HnswGraph:
    """A loaded graph; searching is thread-safe and releases the GIL.

    index: nobody inserts into it any more. size_bytes: of memory, outside Python's heap.
    """

    def __init__(self, index: hnswlib.Index, rows: NDArray[np.int32] | None) -> None:
        self._index, self._rows = index, rows
        self.labels = int(index.get_current_count())
        self.size_bytes = memory_bytes(self.labels, index.dim, index.M)
        # A search's candidate list is as long as the longer of this and what it asks for: nobody
        # may find another one here, left by whoever built the graph.
        index.set_ef(1)

    def search(self, queries: Float32s, ef: int) -> Int64s | None:
        """The `ef` (or all) rows found near each of `queries` (float32[q, d]), nearest first.

        Returns: int64[q, min(ef, labels)]; -1 stands for a dead record. None if the graph cannot
            give so many.
        Cost: grows with ef, about 0.1 ms per query at ef 100 for 20k x 128; several queries are
            shared between threads.
        """
        # The candidate list is as long as what is asked for, so searches with different `ef` may
        # run at once; `set_ef` would be common to all.
        count = min(ef, self.labels)

        def search(share: Float32s) -> NDArray[np.uint64]:
            labels: NDArray[np.uint64]
            labels, _ = self._index.knn_query(share, k=count, num_threads=1)
            return labels

        try:
            shares = in_shares(search, queries)
        except RuntimeError:
            return None  # Fewer than `count` nodes are reachable: the caller scans.
        labels = shares[0] if len(shares) == 1 else np.concatenate(shares)
        if self._rows is not None:
            return self._rows[labels].astype(np.int64)
        return labels.astype(np.int64)


def memory_bytes(labels: int, dimension: int, max_neighbors: int) -> int:
    """What a loaded graph takes, roughly."""
    # Vector, links, label; about 64 for the lock, the level, higher links, marks of searches.
    return labels * (4 * dimension + 4 * (2 * max_neighbors + 1) + 8 + 64)


def inserted(
    vectors: Float32s,
    settings: IndexSettings,
    *,
    threads: int,
    step: Callable[[], None],
    into: hnswlib.Index | None = None,
    room: int = 0,
) -> hnswlib.Index:
    """An index over `vectors` (float32[n, d], n >= 1), in memory.

    into: an index of the caller's own with room for n labels behind those that it has; it is the
        one returned. room: in a new one, for so many more labels. step: called between
        sub-batches; it may raise to give up.
    Cost: one insertion per vector, 0.1 to 0.3 ms each at M 16, efC 100, d 128.
    """
    count, dimension = vectors.shape
    if into is None:
        index = hnswlib.Index(space=settings.space, dim=dimension)
        index.init_index(
            max_elements=count + room,
            M=settings.max_neighbors,
            ef_construction=settings.ef_construction,
            random_seed=_SEED,
        )
    else:
        index = into
    first = int(index.get_current_count())

    def insert() -> None:
        for start in range(0, count, _SUB_BATCH_ROWS):
            stop = min(start + _SUB_BATCH_ROWS, count)
            labels = np.arange(first + start, first + stop, dtype=np.int64)
            index.add_items(vectors[start:stop], labels, num_threads=threads)
            step()

    at_lowest_priority(insert)
    return index


def read_file(
    path: str, settings: IndexSettings, dimension: int, labels: int, room: int
) -> hnswlib.Index:
    """The index in a file of format 1, which is hnswlib's, with room for so many more labels.

    Its bytes must have passed their checksum: hnswlib trusts them. It holds the interpreter's lock.
    """
    index = hnswlib.Index(space=settings.space, dim=dimension)
    try:
        index.load_index(path, max_elements=labels + room)
    except RuntimeError as error:
        if any(text in str(error) for text in _NO_DAMAGE):
            raise Unavailable(f"cannot load the graph {path}: {error}") from error
        raise Corrupt(f"hnswlib cannot read the graph {path}: {error}") from error
    return index
