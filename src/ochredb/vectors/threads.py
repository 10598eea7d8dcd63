"""Sharing the rows of one batch between a few threads, for native code that releases the GIL."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ochredb.types import Float32s

_T = TypeVar("_T")
_THREADS = os.cpu_count() or 1
# Waking another thread costs about as much as a search; so few are not worth it.
_ROWS_OF_SHARE_MIN = 3

_lock = threading.Lock()
_pool: tuple[int, ThreadPoolExecutor] | None = None  # With the process that made it.


def _helpers() -> ThreadPoolExecutor:
    """One fewer than there are processors: the caller works too. A fork makes its own."""
    global _pool
    with _lock:
        if _pool is None or _pool[0] != os.getpid():
            _pool = os.getpid(), ThreadPoolExecutor(_THREADS - 1, "ochredb-search")
        return _pool[1]


def in_shares(work: Callable[[Float32s], _T], rows: Float32s) -> list[_T]:
    """`work` on consecutive shares of `rows` (float32[n, d]), at once; results in order.

    Cost beside the work: about 0.05 ms for each share but the first, which the caller does.
    """
    shares = min(_THREADS, len(rows) // _ROWS_OF_SHARE_MIN)
    if shares < 2:
        return [work(rows)]
    first, *others = np.array_split(rows, shares)
    futures = [_helpers().submit(work, share) for share in others]
    return [work(first), *(future.result() for future in futures)]
