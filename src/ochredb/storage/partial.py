"""An object far away of which only what is read is fetched, block by block, into a local file.

Of large records ten rows are read, of an index one section: the rest need not come. A block that
is there stays; when all are, the file is a copy of the object like any other (`cached.py`). Until
then it has no name that a later process would know.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from ochredb.checksum import BLOCK_BYTES, xxh3
from ochredb.storage import files
from ochredb.storage.local_copies import LocalCopies

if TYPE_CHECKING:
    from ochredb.storage.base import Take
    from ochredb.types import Bools

    Download = Callable[[list[tuple[int, int]], Take], None]

_ABSENT, _COMING, _PRESENT = 0, 1, 2
# After so many fetches each brings so many blocks more: 4 MiB, some milliseconds.
_FETCHES_ALONE, _BLOCKS_MORE = 32, 16


class PartialObject:
    """Thread-safe. `view` is of the whole object; of it only what was fetched may be used."""

    def __init__(
        self, copies: LocalCopies, size: int, download: Download, on_complete: Callable[[], None]
    ) -> None:
        """download: fetches ranges of the object. on_complete: called once, when all is there.

        The caller has reserved `size` bytes. Raises OSError.
        """
        self.size = size
        self._copies, self._download, self._on_complete = copies, download, on_complete
        self._path = copies.new_path()
        self._changed = threading.Condition()
        self._blocks = np.zeros(-(-size // BLOCK_BYTES), np.uint8)
        self._fetches = 0
        self.is_complete = False
        try:
            with files.opened(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as descriptor:
                os.ftruncate(descriptor, size)
                _allocate(descriptor, size)
                self.view = files.map_read_only(descriptor)
        except BaseException:
            copies.remove(self._path)
            raise
        self._give_up = weakref.finalize(self, _give_up, copies, self._path, size)
        self._give_up.atexit = False  # The next process removes what this one leaves.

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have bytes [start, stop) of each range there. What others fetch is waited for.

        Cost: some microseconds if they are. Raises what the download does.
        """
        if self.is_complete:
            return
        wanted = np.zeros(len(self._blocks), np.bool_)
        for start, stop in ranges:
            wanted[start // BLOCK_BYTES : -(-stop // BLOCK_BYTES)] = True
        while True:
            with self._changed:
                mine = wanted & (self._blocks == _ABSENT)
                if not mine.any():
                    if not (wanted & (self._blocks == _COMING)).any():
                        return
                    self._changed.wait()
                    continue
                self._fetches += 1
                if self._fetches > _FETCHES_ALONE:  # It is much used: soon all of it is wanted.
                    mine[np.flatnonzero(self._blocks == _ABSENT)[:_BLOCKS_MORE]] = True
                self._blocks[mine] = _COMING
            self._fetch_blocks(mine)

    def _fetch_blocks(self, mine: Bools) -> None:
        outcome = _ABSENT
        try:
            with files.opened(self._path, os.O_RDWR) as descriptor:

                def take(place: int, piece: memoryview) -> None:
                    try:
                        files.write_at(descriptor, piece, place)
                    except OSError as error:
                        raise self._copies.failed(error) from error

                self._download(self._ranges(mine), take)
            outcome = _PRESENT
        except OSError as error:
            raise self._copies.failed(error) from error
        finally:
            with self._changed:
                self._blocks[mine] = outcome
                ends = not self.is_complete and bool((self._blocks == _PRESENT).all())
                self.is_complete = self.is_complete or ends
                self._changed.notify_all()
        if ends:
            self._on_complete()

    def _ranges(self, blocks: Bools) -> list[tuple[int, int]]:
        """Runs of blocks as ranges of bytes."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], blocks, [False]]).astype(np.int8)))
        return [
            (int(first) * BLOCK_BYTES, min(int(stop) * BLOCK_BYTES, self.size))
            for first, stop in edges.reshape(-1, 2)
        ]

    def keep(self, name: str) -> None:
        """Let the file, which is complete, be the copy of this name. Raises OSError."""
        checksum = xxh3(self.view)
        if self._give_up.detach() is not None:
            self._copies.keep(name, self._path, self.size, checksum)


def _allocate(descriptor: int, size: int) -> None:
    """Its place on the disk now, rather than an error in the middle of a read. Raises OSError."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise  # Else the file system does not do that.


def _give_up(copies: LocalCopies, path: str, size: int) -> None:
    copies.remove(path)
    copies.release(size)
