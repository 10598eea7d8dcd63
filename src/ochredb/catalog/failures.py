"""What SQLite's errors mean: damage, a full disk, or something that may pass."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable

from ochredb.errors import Corrupt, OchreError, Unavailable
from ochredb.storage.space import free_bytes, is_full, storage_full, why_not_writable

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
# What SQLite says where a file cannot grow or be made, whatever the reason.
_PERHAPS_FULL = ("SQLITE_CANTOPEN", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_WRITE")
_FULL_BELOW_BYTES = 64 << 10


def translated(error: BaseException, path: str | None, on_full: Callable[[], None]) -> OchreError:
    """SQLite's error as one of ours. Full disk, read-only and I/O errors changed nothing.

    path: the catalog's, None in memory. on_full: called if the disk is full.
    """
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
        return Corrupt(f"the catalog is damaged: {error}")
    code = getattr(error, "sqlite_errorname", None) or type(error).__name__
    folder = os.path.dirname(path or "")
    full = code == "SQLITE_FULL" or (isinstance(error, OSError) and is_full(error))
    if code in _PERHAPS_FULL:
        free = free_bytes(folder)
        full = free is not None and free < _FULL_BELOW_BYTES
    if full:
        refusal = storage_full("write", path or "", folder)
        on_full()
        return refusal
    reason = why_not_writable(folder) if path is not None else ""
    text = f"{error}: {reason}" if reason else str(error)
    return Unavailable(f"the catalog is unavailable: {text} ({code})")
