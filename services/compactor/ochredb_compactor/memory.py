"""A budget of memory for the jobs of one process.

Jobs say beforehand what they will need, about, and wait until that is free. One that needs more
than all of it runs when nothing else does; merges are planned in pieces that fit (`graph_rows`).
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator

from ochredb_compactor.config import CompactorConfig

_LOOK_S = 0.1
_FOLD_FACTOR = 4  # A fold holds a tail as fragments, as operations, as rows and as a part.
_FOLD_BYTES_MIN = 8 << 20
_ROW_BYTES = 528  # Of a merge, beside the vectors: links (M 32), ids, indexes of metadata, text.
_MERGE_BYTES_MIN = 32 << 20
_GRAPH_ROWS_MIN = 20_000


class MemoryBudget:
    """Thread-safe. bytes_max: None: without a limit."""

    def __init__(self, bytes_max: int | None) -> None:
        self.bytes_max = bytes_max
        self._changed = threading.Condition()
        self._held_bytes = 0

    @contextlib.contextmanager
    def held(self, size_bytes: int, step: Callable[[], None]) -> Iterator[None]:
        """Wait until so much is free, and hold it. step: called while it waits; it may raise."""
        if self.bytes_max is None:
            yield
            return
        while not self._take(size_bytes):
            step()
        try:
            yield
        finally:
            with self._changed:
                self._held_bytes -= size_bytes
                self._changed.notify_all()

    def _take(self, size_bytes: int) -> bool:
        assert self.bytes_max is not None
        limit = self.bytes_max
        with self._changed:
            free = self._changed.wait_for(
                lambda: self._held_bytes == 0 or self._held_bytes + size_bytes <= limit, _LOOK_S
            )
            if free:
                self._held_bytes += size_bytes
            return free


def fold_bytes(tail_bytes: int, config: CompactorConfig) -> int:
    """What a fold of a tail will need."""
    return max(_FOLD_BYTES_MIN, _FOLD_FACTOR * min(tail_bytes, config.fold_bytes_max))


def merge_bytes(rows: int, dimension: int, *, with_graph: bool) -> int:
    """What a merge to a part of so many rows will need; rows without a graph stay in files."""
    return _MERGE_BYTES_MIN + rows * (_ROW_BYTES + (4 * dimension if with_graph else 0))


def graph_rows(bytes_max: int, dimension: int) -> int:
    """How many rows a graph may have to be built in so much; so many are always tried."""
    return max(_GRAPH_ROWS_MIN, (bytes_max - _MERGE_BYTES_MIN) // (_ROW_BYTES + 4 * dimension))


def malloc_trim() -> Callable[[], None]:
    """glibc's malloc_trim: gives the memory of a finished job back to the system."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return lambda: None
    return lambda: trim(0) and None
