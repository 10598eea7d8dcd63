"""The lock of a catalog in memory, whose one connection readers and writers take in turn.

A read is a block, and Ctrl-C may come between any two steps of Python. So the block is the lock:
leaving it is one step, the lock's own, and entering it undoes itself. A lock that an interrupt left
taken would stop every other thread of the process for ever.
"""

from __future__ import annotations

import _thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ochredb.catalog.sqlite import SqliteSession

# How often this thread has taken it; the oldest Pythons only say whether it has.
_NAMES = ("_recursion_count", "_is_owned")
_depth: Any = next(getattr(_thread.RLock, name) for name in _NAMES if hasattr(_thread.RLock, name))


class MemoryLock(_thread.RLock):  # type: ignore[misc]  # Marked as final; it is not.
    """Reentrant. As a block it gives `session`, which is set once there is a connection."""

    session: SqliteSession | None = None

    def __enter__(self) -> Any:  # type: ignore[override]
        depth = _depth(self)
        try:
            self.acquire()
            return self.session
        except BaseException:  # An interrupt, just behind `acquire`.
            while _depth(self) > depth:
                self.release()
            raise
