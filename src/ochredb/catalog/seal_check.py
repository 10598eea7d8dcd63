"""Comparing the file of a catalog with its seal."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ochredb.catalog import wal
from ochredb.catalog.seal_format import CLOSED, SETTLED, UNKNOWN, Checksums, Sealed, decode
from ochredb.checksum import block_checksums
from ochredb.errors import Corrupt
from ochredb.storage import files

log = logging.getLogger("ochredb.catalog")

_CHUNK_BYTES = 4 << 20
_NO_PAGES = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Compared:
    """problem: None if the file is as sealed. wrong: numbers of blocks (or pages), from 0.

    is_whole: the seal speaks of the file's size, too.
    """

    sealed: Sealed
    is_whole: bool
    problem: str | None = None
    wrong: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Logged:
    """What a write-ahead log says of the database. pages, from 0: what is in the file of these does
    not count. size: of the database, in pages; None: nothing is committed there."""

    salt: int
    frames: int
    pages: NDArray[np.int64]
    size: int | None


def compare(seal_path: str, catalog_path: str, descriptor: int | None = None) -> Compared | None:
    """None if there is no seal, or it says nothing of the file as it is.

    descriptor: of the catalog, which is open; None: nobody has it open.

    Raises Corrupt for a catalog that is missing.
    """
    try:
        with open(seal_path, "rb") as file:
            sealed = decode(file.read())
    except FileNotFoundError:
        return None
    if sealed is None:
        log.warning("the seal %s is damaged: the catalog is not compared with it", seal_path)
        return None
    if descriptor is not None:
        return _compared(sealed, catalog_path, descriptor, is_open=True)
    if not os.path.exists(catalog_path):
        raise Corrupt(f"the catalog {catalog_path} is missing: restore a backup")
    if sealed.state.kind == CLOSED and has_log(catalog_path):
        # Somebody wrote who knows nothing of seals.
        with contextlib.suppress(OSError):  # Read-only: it stays, and says nothing.
            files.unlink_if_exists(seal_path)
        return None
    with files.opened(catalog_path) as found:
        return _compared(sealed, catalog_path, found, is_open=False)


def _compared(sealed: Sealed, path: str, descriptor: int, *, is_open: bool) -> Compared | None:
    state, status = sealed.state, os.fstat(descriptor)
    if state.kind == CLOSED:
        if is_open and (has_log(path) or state.mtime_ns != status.st_mtime_ns):
            return None
        return _with_size(sealed, path, descriptor, status.st_size, _NO_PAGES)
    logged = _logged(path)
    same_log = logged is not None and logged.salt == state.salt
    same_time = state.kind == SETTLED and state.mtime_ns == status.st_mtime_ns
    if same_log and logged is not None and logged.frames < state.frames:
        text = f"the write-ahead log of {path} is damaged: it ends after {logged.frames} of the"
        return Compared(sealed, False, f"{text} {state.frames} frames that were copied already")
    if same_time and (is_open or logged is None or logged.size is None):
        return _with_size(sealed, path, descriptor, status.st_size, _NO_PAGES)
    if logged is None or not (same_time or same_log):
        return None
    if logged.size is None:
        return _with_pages(sealed, path, descriptor, len(sealed.checksums), logged.pages)
    return _with_pages(sealed, path, descriptor, logged.size, logged.pages)


def _with_size(
    sealed: Sealed, path: str, descriptor: int, size: int, but: NDArray[np.int64]
) -> Compared:
    """The whole file."""
    expected = sealed.state.size_bytes
    found = _with_pages(sealed, path, descriptor, len(sealed.checksums), but)
    if size == expected:
        return Compared(sealed, True, found.problem, found.wrong)
    text = f"the catalog {path} has {size} bytes instead of {expected}, {_as_when(sealed)}"
    return Compared(sealed, True, text, found.wrong)


def _with_pages(
    sealed: Sealed, path: str, descriptor: int, count: int, but: NDArray[np.int64]
) -> Compared:
    """The first `count` blocks but those in `but`; one that is missing is wrong."""
    count = min(count, len(sealed.checksums))
    found = np.full(count, UNKNOWN, np.uint64)
    stop = count * sealed.block_bytes
    if sealed.state.kind == CLOSED:  # Its last block may be a part of one.
        stop = min(stop, sealed.state.size_bytes)
    there = page_checksums(descriptor, sealed.block_bytes, stop)
    found[: len(there)] = there
    is_wrong = (sealed.checksums[:count] != found) & (sealed.checksums[:count] != UNKNOWN)
    is_wrong[but[but < count]] = False
    wrong = np.flatnonzero(is_wrong).tolist()
    if not wrong:
        return Compared(sealed, False)
    text = (
        f"the catalog {path} is not {_as_when(sealed)}: block {wrong[0]} of"
        f" {sealed.block_bytes >> 10} KiB fails its checksum"
    )
    return Compared(sealed, False, text, wrong)


def _as_when(sealed: Sealed) -> str:
    return "as it was closed" if sealed.state.kind == CLOSED else "as it was written"


def _logged(path: str) -> _Logged | None:
    """None if there is no log, or it began anew just now."""
    with wal.opened(path) as found:
        if found is None:
            return None
        headers, count = found.whole_frames()
        if not found.is_same():
            return None
    sizes = headers.commit[headers.commit > 0]
    if not len(sizes):
        return _Logged(found.salt, count, _NO_PAGES, None)
    # Pages behind the end of some commit were given back, and may be others by now.
    size, least = int(sizes[-1]), int(sizes.min())
    pages = np.concatenate([headers.page - 1, np.arange(least, max(size, least))])
    return _Logged(found.salt, count, pages, size)


def page_checksums(descriptor: int, page_bytes: int, stop: int | None = None) -> Checksums:
    """uint64, of each page of a file (the last one may be shorter), or of its first `stop` bytes.

    Raises OSError.
    """
    found = [block_checksums(chunk, page_bytes) for chunk in _chunks(descriptor, stop)]
    return np.concatenate([np.zeros(0, np.uint64), *found])


def _chunks(descriptor: int, stop: int | None) -> Iterator[bytes]:
    size = files.size_of(descriptor)
    stop = size if stop is None else min(stop, size)
    for start in range(0, stop, _CHUNK_BYTES):
        yield files.read_range(descriptor, start, min(stop, start + _CHUNK_BYTES))


def has_log(catalog_path: str) -> bool:
    """Whether there is a write-ahead log with something in it."""
    with contextlib.suppress(FileNotFoundError):
        return os.stat(catalog_path + "-wal").st_size > 0
    return False
