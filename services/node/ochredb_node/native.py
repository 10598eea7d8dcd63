"""What native libraries are told before they are loaded: one thread each, and one allocator.

Only the server does this: in an embedded engine the process belongs to somebody else. Measured
after ingesting 30,000 x 128 with documents: 295 MB of anonymous memory with the defaults, 154 with
two arenas and low thresholds. The thresholds were raised since, for queries; 20,000 x 128 settle at
82 MB, 100,000 x 128 at 88 MB (bench/results).
"""

from __future__ import annotations

import contextlib
import ctypes
import os

_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
# Queries use arrays of a megabyte for a moment: fresh pages for each cost more than the work on it.
# What is freed beyond these is given back at once, the rest by the housekeeping's malloc_trim.
_KEPT_BYTES, _MAPPED_BYTES_MIN = 16 << 20, 4 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def tune_native_libraries() -> None:
    """Call before other threads run, and before numpy and pyarrow are imported.

    One thread for products: whoever waits for one has a processor already, and a library's own
    threads go on to spin for some time after each, on the processors of everybody else.

    With glibc two arenas instead of eight per core, because what one thread frees in its own arena
    no other thread reuses; large blocks straight from the system; Arrow on the same allocator,
    because its own pool keeps what it once had.
    """
    for variable in _THREAD_VARIABLES:
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES_MIN)
