"""Files that a cache keeps: bounded, the least recently used go first, found again after a restart.

lock                                     flock: one process
tmp/<uuid7>                              being written; scratch
objects/<xxh3-128 of key>-<xxh3-64>      copies: the second checksum is of their content, their
                                         modification time says when they were last used
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from ochredb.clock import Clock
from ochredb.crash_points import reach
from ochredb.errors import InvalidArgument, Unavailable
from ochredb.ids import IdSource
from ochredb.storage import files
from ochredb.storage.space import is_full, storage_full

log = logging.getLogger("ochredb.storage")

_COPY = re.compile(r"([0-9a-f]{32})-([0-9a-f]{16})\Z")
TEMPORARY_FOLDER = "tmp"
"""In the cache's folder; emptied when a process opens the cache."""
_TOUCH_AFTER_S = 60.0  # A file's time may be so much older than its last use.


def name_of(key: str) -> str:
    """What a copy is called: keys are longer than names of files may be."""
    return xxhash.xxh3_128_hexdigest(key.encode())


@dataclass(slots=True)
class Copy:
    """verified: its content was compared with `checksum` by this process, or written by it."""

    path: str
    size: int
    checksum: int
    verified: bool
    touched_s: float


class LocalCopies:
    """Thread-safe; for one process, and no fork of it."""

    def __init__(
        self,
        directory: str,
        bytes_max: int,
        clock: Clock,
        ids: IdSource,
        is_mapped: Callable[[str], bool],
    ) -> None:
        """is_mapped: whether evicting the copy of this name would give no space back yet.

        Raises Unavailable if another process has the directory, or it cannot be used now;
        InvalidArgument if it is, or lies below, a file.
        """
        self.directory, self.bytes_max = os.path.abspath(directory), bytes_max
        self.used_bytes = 0
        """Of copies, and of what was reserved for more; never above `bytes_max`."""
        self.evictions = 0
        self._clock, self._ids, self._is_mapped = clock, ids, is_mapped
        self._objects = os.path.join(self.directory, "objects")
        self._temporary = os.path.join(self.directory, TEMPORARY_FOLDER)
        self._lock = threading.Lock()
        self._copies: OrderedDict[str, Copy] = OrderedDict()  # The least recently used first.
        self._claim: int | None = None
        try:
            os.makedirs(self._objects, exist_ok=True)
            os.makedirs(self._temporary, exist_ok=True)
            self._claim = self._claimed()
            self._scan()
        except (FileExistsError, NotADirectoryError) as error:
            self.close()
            text = f"cannot use the cache directory {self.directory}: a file is in its place"
            raise InvalidArgument(text, path=self.directory) from error
        except OSError as error:
            self.close()
            raise self.failed(error) from error

    def close(self) -> None:
        """Let another process have the directory. Idempotent."""
        claim, self._claim = self._claim, None
        if claim is not None:
            os.close(claim)

    def __contains__(self, name: str) -> bool:
        return name in self._copies

    def use(self, name: str) -> Copy | None:
        """A copy, which is now the one used last."""
        with self._lock:
            copy = self._copies.get(name)
            if copy is None:
                return None
            self._copies.move_to_end(name)
        now_s = self._clock.monotonic_s()
        if now_s - copy.touched_s > _TOUCH_AFTER_S:
            copy.touched_s = now_s
            with contextlib.suppress(OSError):
                os.utime(copy.path)
        return copy

    def new_path(self) -> str:
        """A free name for what is not a copy yet, or never will be."""
        return f"{self._temporary}/{self._ids.uuid7()}"

    def keep(self, name: str, path: str, size: int, checksum: int) -> None:
        """Make a whole file, for which `size` was reserved, the copy. Raises OSError."""
        reach("cache.written")
        final = f"{self._objects}/{name}-{checksum:016x}"
        os.replace(path, final)
        reach("cache.renamed")
        copy = Copy(final, size, checksum, True, self._clock.monotonic_s())
        with self._lock:
            older = self._forget(name)
            self._copies[name] = copy
        if older is not None and older.path != final:
            self.remove(older.path)

    def drop(self, name: str, copy: Copy | None = None) -> None:
        """Remove a copy, if there is one. copy: this one only."""
        with self._lock:
            if copy is not None and self._copies.get(name) is not copy:
                return
            found = self._forget(name)
        if found is not None:
            self.remove(found.path)

    def remove(self, path: str) -> None:
        """Remove a file; one that cannot be removed is only left behind."""
        try:
            files.unlink_if_exists(path)
        except OSError as error:
            log.warning("cannot remove from the cache: %s", error)
        reach("cache.removed")

    # -- room

    def reserve(self, size: int) -> bool:
        """Have so many bytes of the bound, for which others may have to go."""
        while True:
            with self._lock:
                if self.used_bytes + size <= self.bytes_max:
                    self.used_bytes += size
                    return True
            if size > self.bytes_max or not self.evict_one():
                return False

    def make_room(self, size: int, unused_s: float) -> bool:
        """Whether so many bytes of the bound are free, at the cost only of copies that nobody has
        mapped, or used for so long."""
        while self.used_bytes + size > self.bytes_max:
            if size > self.bytes_max or not self.evict_one(idle=True, unused_s=unused_s):
                return False
        return True

    def release(self, size: int) -> None:
        """Give back what was reserved."""
        with self._lock:
            self.used_bytes -= size

    def evict_one(self, *, idle: bool = False, unused_s: float = 0.0) -> bool:
        """Remove the copy that will be missed least; False if there is none.

        idle: only one that nobody has mapped, whose space comes back at once. unused_s: and that
            nobody has used for so long (a minute more or less).
        """
        used_s_max = self._clock.monotonic_s() - unused_s
        with self._lock:
            name = next((name for name in self._copies if not self._is_mapped(name)), None)
            if name is None and not idle:
                name = next(iter(self._copies), None)
            if unused_s and name is not None and self._copies[name].touched_s > used_s_max:
                return False
            copy = None if name is None else self._forget(name)
            if copy is None:
                return False
            self.evictions += 1
        self.remove(copy.path)
        return True

    def _forget(self, name: str) -> Copy | None:
        """Count a copy no more; the lock is held, the file is the caller's to remove."""
        copy = self._copies.pop(name, None)
        if copy is not None:
            self.used_bytes -= copy.size
        return copy

    # -- the directory

    def _claimed(self) -> int:
        path = os.path.join(self.directory, "lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            raise Unavailable(
                f"another process uses the cache directory {self.directory}: give each its own",
                path=self.directory,
            ) from error
        return descriptor

    def _scan(self) -> None:
        """Take over what an earlier process left."""
        with os.scandir(self._temporary) as entries:
            for entry in entries:
                self.remove(entry.path)
        found = []
        with os.scandir(self._objects) as entries:
            for entry in entries:
                match = _COPY.match(entry.name)
                if match is not None and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime_ns, status.st_size, entry.path, match))
        now_s = self._clock.monotonic_s()
        for _, size, path, match in sorted(found, key=lambda item: item[0]):
            self.drop(match[1])  # An older one of another content.
            self._copies[match[1]] = Copy(path, size, int(match[2], 16), False, now_s)
            self.used_bytes += size
        while self.used_bytes > self.bytes_max:
            self.evict_one()

    def failed(self, error: OSError) -> Unavailable:
        """The error to raise for one of the operating system's."""
        if is_full(error):
            return storage_full("write to", self.directory, self.directory, error)
        cause = error.strerror or str(error)
        return Unavailable(
            f"cannot use the cache directory {self.directory}: {cause}",
            path=self.directory,
            errno=error.errno,
        )
