"""Which background work yields to everything else: what runs for long without Python.

A thread of low priority that holds the interpreter's lock makes everybody wait who wants it, for
as long as anything else keeps the processors busy. So the compactor's own threads keep the normal
priority and hold the lock in short turns; inserting into graphs, which takes most of the time and
does without the lock, has the lowest. Taking a graph into and out of hnswlib is not: it holds the
lock for that.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def at_lowest_priority(work: Callable[[], _T]) -> _T:
    """What `work` returns or raises, run in a thread that yields to everything (Linux only).

    Threads that it starts inherit its priority. A process may not raise its priority again without
    a privilege, hence a thread of its own.
    """
    outcome: list[_T] = []
    failure: list[BaseException] = []

    def run() -> None:
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # Not permitted: only slower for others.
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            outcome.append(work())
        except BaseException as error:  # Raised again below, in the thread that asked.
            failure.append(error)

    thread = threading.Thread(target=run, name="graph", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
