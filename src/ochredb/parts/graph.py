"""The approximate index over a part's vectors: hnswlib behind the few calls we need.

Labels are numbers 0..m-1 in order of insertion. A graph that was grown from an older part's keeps
the old labels, so `rows` maps each label to its row in this part, or to -1 if the record is dead.
Inner products and cosine are hnswlib's own spaces. add_items and knn_query are not safe together on
one index: a graph is built aside and published whole (docs/formats/graph.md).
"""

from __future__ import annotations

import mmap
import os
import tempfile
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

    Memory: about (d + 2·M + 4)·4 bytes per label, outside Python's heap.
    """

    def __init__(
        self, index: hnswlib.Index, rows: NDArray[np.int32] | None, size_bytes: int
    ) -> None:
        self._index, self._rows, self.size_bytes = index, rows, size_bytes
        self.labels = int(index.get_current_count())
        # A search's candidate list is as long as the longer of this and what it asks for: nobody
        # may find another one here, left by whoever built the graph.
        index.set_ef(1)

    @classmethod
    def load(
        cls, path: str, settings: IndexSettings, dimension: int, rows: NDArray[np.int32] | None
    ) -> HnswGraph:
        """Read a graph file; its bytes must have passed their checksum (hnswlib trusts them)."""
        index = hnswlib.Index(space=settings.space, dim=dimension)
        try:
            index.load_index(path)
        except RuntimeError as error:
            if any(text in str(error) for text in _NO_DAMAGE):
                raise Unavailable(f"cannot load the graph {path}: {error}") from error
            raise Corrupt(f"hnswlib cannot read the graph {path}: {error}") from error
        return cls(index, rows, os.path.getsize(path))

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


def build(
    vectors: Float32s,
    settings: IndexSettings,
    *,
    threads: int,
    step: Callable[[], None],
    grow: tuple[str, int] | None = None,
) -> memoryview:
    """The file of a graph over `vectors` (float32[n, d], n >= 1): `inserted`, then `saved`."""
    return saved(inserted(vectors, settings, threads=threads, step=step, grow=grow))


def inserted(
    vectors: Float32s,
    settings: IndexSettings,
    *,
    threads: int,
    step: Callable[[], None],
    grow: tuple[str, int] | None = None,
) -> hnswlib.Index:
    """An index over `vectors` (float32[n, d], n >= 1), in memory.

    grow: path of a graph file and its number of labels; `vectors` are inserted behind them.
    step: called between sub-batches; it may raise to give up.
    Cost: one insertion per vector, 0.1 to 0.3 ms each at M 16, efC 100, d 128.
    """
    count, dimension = vectors.shape
    index = hnswlib.Index(space=settings.space, dim=dimension)
    first = 0
    if grow is None:
        index.init_index(
            max_elements=count,
            M=settings.max_neighbors,
            ef_construction=settings.ef_construction,
            random_seed=_SEED,
        )
    else:
        path, first = grow
        index.load_index(path, max_elements=first + count)

    def insert() -> None:
        for start in range(0, count, _SUB_BATCH_ROWS):
            stop = min(start + _SUB_BATCH_ROWS, count)
            labels = np.arange(first + start, first + stop, dtype=np.int64)
            index.add_items(vectors[start:stop], labels, num_threads=threads)
            step()

    at_lowest_priority(insert)
    return index


def saved(index: hnswlib.Index) -> memoryview:
    """The index's file as a view of an unlinked temporary file.

    Raises Unavailable if it did not get all of its bytes: hnswlib does not notice a full disk.
    """
    handle, path = tempfile.mkstemp(prefix="ochredb-graph-")
    try:
        named = f"/proc/self/fd/{handle}"
        if os.path.exists(named):  # Linux: unlinked before it is written, it cannot be left behind.
            os.unlink(path)
            path = named
        index.save_index(path)
        size, expected = os.fstat(handle).st_size, int(index.index_file_size())
        if size != expected:
            raise Unavailable(
                f"a graph of {expected} bytes was cut to {size} in {tempfile.gettempdir()}: "
                "is it full?"
            )
        return memoryview(mmap.mmap(handle, 0, access=mmap.ACCESS_READ))
    finally:
        os.close(handle)
        if not path.startswith("/proc/"):
            os.unlink(path)
