"""What PostgreSQL's errors mean: nothing was changed, unless it is the commit's own connection."""

from __future__ import annotations

import re

from ochredb.catalog.database import Aborted
from ochredb.errors import Corrupt, Internal, OchreError, StorageFull, Unavailable

# Serialization failure, deadlock, duplicate key: somebody else was first, which a repeat sees.
_ABORTED = ("40001", "40P01", "23505")
_LOCK_NOT_AVAILABLE = "55P03"
_DISK_FULL = "53100"
_DAMAGED = ("XX001", "XX002")
_WRONG_DATA = "22"  # A class of states: a value that this column cannot hold.
# libpq gives no state of a connection that failed. In another language it counts as unavailable.
_REFUSED = re.compile(
    r"(password|peer|certificate) authentication failed|no password supplied|no pg_hba.conf entry"
    r'|(database|role) ".*" does not exist|is not permitted to log in'
    r"|permission denied for database",
    re.IGNORECASE,
)
_READ_ONLY = "session is read-only"  # libpq's words for a host that it passed over, likewise.


def is_refused(error: BaseException | None) -> bool:
    """Whether a connection failed as it will again, until somebody changes a setting or the server:
    who it was for, or the database, is not known there or not let in."""
    return error is not None and _REFUSED.search(str(error)) is not None


def translated(error: BaseException, place: str) -> OchreError:
    """The driver's error as one of ours. place: of the server, without a password."""
    state = getattr(error, "sqlstate", None)
    text = " ".join(str(error).split()) or type(error).__name__
    told = f"{text} ({state or type(error).__name__})"
    if state in _ABORTED:
        return Aborted(f"the catalog took a transaction back: {told}; nothing was changed")
    if state == _LOCK_NOT_AVAILABLE:
        return Unavailable(f"others held what is to be changed for too long: {told}; retry later")
    if state == _DISK_FULL:
        return StorageFull(f"the disk of the catalog at {place} is full: {told}")
    if state in _DAMAGED:
        return Corrupt(f"the catalog at {place} is damaged: {told}")
    if state is not None and state.startswith(_WRONG_DATA):
        return Internal(f"the catalog refused a value: {told}")
    if state is None and _READ_ONLY in text:
        told += "; nothing is read from a standby, or from a server that is read-only"
    return Unavailable(f"the catalog at {place} is unavailable: {told}")
