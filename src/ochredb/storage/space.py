"""A full disk: the error that says so, and a little space kept back for deletes.

A delete needs space before it gives any: a row in the log, and pages of SQLite's write-ahead log
for each step until garbage collection removes files. So a store keeps a file of `RESERVE_BYTES`
that holds nothing. Once the disk was full, other writes are refused before they begin; what gives
space back removes the file if it must (`freeing`). When there is space again the file is made anew
and all writes are taken (`take_back`, about once a second and before a refusal).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import TypeVar

from ochredb.crash_points import reach
from ochredb.errors import StorageFull
from ochredb.storage import files

T = TypeVar("T")

RESERVE_FILE = "reserve"
RESERVE_BYTES = 2 << 20
# Beyond the file, when it is taken back: or the next write would meet the full disk at once.
_ROOM_BYTES = 2 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT}


def is_full(error: OSError) -> bool:
    """Whether it says that there is no space, or that a quota is used up."""
    return error.errno in _FULL


def storage_full(verb: str, path: str, folder: str, error: OSError | None = None) -> StorageFull:
    """The error for a full disk. verb, path: what was tried.

    folder: one that exists, on that disk. error: the system's, if there is one.
    """
    free = free_bytes(folder)
    cause = (error and error.strerror) or "too little space is left"
    known = "unknown" if free is None else str(free)
    return StorageFull(
        f"cannot {verb} {path}: {cause} ({known} bytes free at {folder}); only deletes are "
        "taken until there is space again",
        path=path,
        free_bytes=free,
        errno=error.errno if error else errno.ENOSPC,
    )


def free_bytes(path: str) -> int | None:
    """What the file system has free for this user, or None if it does not say."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def has_no_room(folder: str) -> bool:
    """Whether the disk is as good as full."""
    free = free_bytes(folder)
    return free is not None and free < _ROOM_BYTES


def why_not_writable(folder: str) -> str:
    """What keeps this user from writing there, as far as can be seen; empty if nothing does.

    Tries it, with a file that never has a name: a kernel that has given a disk up does not say so
    of itself.
    """
    try:
        if hasattr(os, "O_TMPFILE"):
            os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        elif not os.access(folder, os.W_OK):
            return f"{folder} is not writable for this user"
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            return f"cannot write to {folder}: {error.strerror}"
    return ""


class Reserve:
    """The file in the store's folder; without a folder (a store in memory), nothing.

    Thread-safe: every step is one system call on a name.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder
        self._path = "" if folder is None else os.path.join(folder, RESERVE_FILE)
        self.is_needed = False  # The disk was full, and has not had space since.

    def check(self) -> None:
        """Raises StorageFull while only deletes are taken. Cost on a full disk: a few µs."""
        if self.is_needed and self._folder is not None:
            self.take_back()
            if self.is_needed:
                raise storage_full("write to", self._folder, self._folder)

    def has_room(self, size: int) -> bool:
        """Whether something may grow by `size` bytes. Always, unless the disk was full."""
        if not self.is_needed or self._folder is None:
            return True
        free = free_bytes(self._folder)
        return free is None or free >= size + RESERVE_BYTES

    def found_full(self) -> None:
        """Somebody met a full disk."""
        self.is_needed = True

    def freeing(self, work: Callable[[], T]) -> T:
        """Run what will give space back; once more if the disk is full, without the file."""
        try:
            return work()
        except StorageFull:
            self.give_up()
            return work()

    def give_up(self) -> None:
        """Let deletes have the space."""
        self.is_needed = True
        if self._folder is not None:
            with contextlib.suppress(OSError):  # A store that nothing may be removed from, too.
                files.unlink_if_exists(self._path)
            reach("reserve.given-up")

    def take_back(self) -> None:
        """Have the file, and take all writes again, if there is space."""
        if self._folder is None:
            return
        held = os.path.exists(self._path)
        if held and not self.is_needed:
            return
        free = free_bytes(self._folder)
        if free is None:
            return
        self.is_needed = free < _ROOM_BYTES + (0 if held else RESERVE_BYTES)
        if held or self.is_needed:
            return
        try:
            with files.opened(self._path, os.O_WRONLY | os.O_CREAT) as descriptor:
                _allocate(descriptor, RESERVE_BYTES)
            reach("reserve.taken")
        except OSError as error:
            self.give_up()
            self.is_needed = is_full(error)


def _allocate(descriptor: int, size: int) -> None:
    """Give the file its blocks."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS.
        files.write_all(descriptor, [memoryview(bytes(size))])
