"""The seal of a catalog that nobody has open: checksums of its bytes (docs/formats/seal.md).

SQLite notices damaged pages, not damaged values. So who closes a catalog last writes down what its
bytes are, who opens it first compares, and who writes to it breaks the seal before: a seal that is
there is true. Who has the catalog open holds a shared lock on a file of its own, which tells the
first and the last one.

The catalog is read by path here, which is only safe while no connection of this process is open:
then nobody holds the shared lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ochredb.checksum import BLOCK_BYTES, block_checksums, xxh3
from ochredb.crash_points import reach
from ochredb.errors import Corrupt
from ochredb.storage import files

log = logging.getLogger("ochredb.catalog")

SEAL_FILE = "ochredb.seal"
LOCK_FILE = "open.lock"
FORMAT_VERSION = 1
NO_MARK = bytes(64)
"""In the file that writers lock: no write is remembered (`catalog.mark`)."""
_MAGIC = b"OCHRSEAL"
_HEADER = struct.Struct("<8sIIQ")  # Magic, format version, bytes of a block, bytes of the catalog.
_CHECKSUM = struct.Struct("<Q")
_CHUNK_BYTES = 16 * BLOCK_BYTES


def put_mark(descriptor: int, mark: bytes) -> None:
    """Into the file that writers lock; not synced. A negative descriptor: there is none."""
    if descriptor >= 0:
        with contextlib.suppress(OSError):  # A full disk: an older mark says less, and is true.
            os.pwrite(descriptor, mark, 0)


def forget_mark(descriptor: int) -> None:
    """Remember no write, durably: what is dropped next must not be missed after a power failure."""
    put_mark(descriptor, NO_MARK)
    if descriptor >= 0:
        files.sync(descriptor)
        reach("mark.forgotten")


class Seal:
    """Of one catalog, as one user of it sees it. Not thread-safe: its database's locks guard it."""

    def __init__(self, catalog_path: str) -> None:
        self._catalog = catalog_path
        folder = os.path.dirname(catalog_path)
        self.path = os.path.join(folder, SEAL_FILE)
        self._lock_path = os.path.join(folder, LOCK_FILE)
        self._lock_fd = -1
        self._is_broken = False
        self.is_first = False
        """Whether nobody else had the catalog open when this user began to hold it."""

    def hold(self) -> None:
        """Say that the catalog is open, before it is. Raises Corrupt if it is not as it was sealed.

        Cost: the first time 10 µs; nobody else has it open: the catalog is read, 0.1 ms per MB.
        """
        if self._lock_fd >= 0:
            return
        try:
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:  # A read-only file system: nobody seals or breaks anything there.
            verify(self.path, self._catalog)
            return
        try:
            if not _try_exclusive(descriptor):
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # Somebody opens it, or seals it.
            self.is_first = _try_exclusive(descriptor)
            if self.is_first:
                verify(self.path, self._catalog)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            os.close(descriptor)
            raise
        self._lock_fd, self._is_broken = descriptor, False

    def break_before_write(self) -> None:
        """Before the first write: what is sealed is going to change."""
        if self._is_broken:
            return
        if files.unlink_if_exists(self.path):
            reach("seal.removed")
            files.sync_folder(os.path.dirname(self.path))
            reach("seal.broken")
        self._is_broken = True

    def let_go(self, *, seal: bool = True) -> None:
        """Say that this user's connections are closed; if it is the last one, seal the catalog."""
        if self._lock_fd < 0:
            return
        try:
            if seal and _try_exclusive(self._lock_fd) and not os.path.exists(self.path):
                self._write()
        except OSError as error:  # Unsealed, it is only less well guarded.
            log.warning("the catalog was closed without a seal: %s", error)
        finally:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def forget(self) -> None:
        """In a forked child: the lock is the parent's, which still holds it."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
        self._lock_fd, self._is_broken = -1, False

    def _write(self) -> None:
        if _has_log(self._catalog):
            return  # Not all of it is in the file: somebody was killed.
        size = os.path.getsize(self._catalog)
        content = encode(size, checksums_of(self._catalog))
        temporary = self.path + ".new"
        with files.opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            files.write_all(descriptor, [memoryview(content)])
            files.sync(descriptor)
        reach("seal.synced")
        os.replace(temporary, self.path)
        reach("seal.renamed")
        files.sync_folder(os.path.dirname(self.path))
        reach("seal.written")


def encode(size: int, checksums: NDArray[np.uint64]) -> bytes:
    """The seal of a catalog of `size` bytes; checksums: uint64, one for each 256 KiB."""
    content = _HEADER.pack(_MAGIC, FORMAT_VERSION, BLOCK_BYTES, size) + checksums.tobytes()
    return content + _CHECKSUM.pack(xxh3(content))


def decode(content: bytes) -> tuple[int, NDArray[np.uint64]] | None:
    """Size and checksums; None for what is damaged or from a newer OchreDB: it says nothing."""
    if len(content) < _HEADER.size + _CHECKSUM.size:
        return None
    body = content[: -_CHECKSUM.size]
    if _CHECKSUM.unpack(content[-_CHECKSUM.size :])[0] != xxh3(body):
        return None
    magic, version, block_bytes, size = _HEADER.unpack_from(body)
    if magic != _MAGIC or version != FORMAT_VERSION or block_bytes != BLOCK_BYTES:
        return None
    return int(size), np.frombuffer(body[_HEADER.size :], np.uint64)


def verify(seal_path: str, catalog_path: str) -> None:
    """Compare a catalog that nobody has open with its seal, if it has one. Raises Corrupt."""
    try:
        with open(seal_path, "rb") as file:
            sealed = decode(file.read())
    except FileNotFoundError:
        return
    if sealed is None:
        log.warning("the seal %s is damaged: the catalog is not compared with it", seal_path)
        return
    size, expected = sealed
    advice = f"`ochredb repair` may mend it, or restore a backup; without {SEAL_FILE} it is opened"
    if not os.path.exists(catalog_path):
        raise Corrupt(f"the catalog {catalog_path} is missing: restore a backup")
    if _has_log(catalog_path):
        # Its removal was lost with the power, or somebody wrote who knows nothing of seals.
        with contextlib.suppress(OSError):  # Read-only: it stays, and says nothing.
            files.unlink_if_exists(seal_path)
        return
    found_size = os.path.getsize(catalog_path)
    if found_size != size:
        raise Corrupt(
            f"the catalog {catalog_path} has {found_size} bytes instead of {size}, as when it was"
            f" closed; {advice} as it is"
        )
    wrong = np.flatnonzero(checksums_of(catalog_path) != expected)
    if len(wrong):
        raise Corrupt(
            f"the catalog {catalog_path} is not as it was closed: block {int(wrong[0])} of"
            f" {BLOCK_BYTES >> 10} KiB fails its checksum; {advice} as it is"
        )


def checksums_of(path: str) -> NDArray[np.uint64]:
    """uint64, of each block of a file. Raises OSError."""
    found = [block_checksums(chunk) for chunk in _chunks(path)]
    return np.concatenate([np.zeros(0, np.uint64), *found])


def _chunks(path: str) -> Iterator[bytes]:
    with files.opened(path) as descriptor:
        size = files.size_of(descriptor)
        for start in range(0, size, _CHUNK_BYTES):
            yield files.read_range(descriptor, start, min(size, start + _CHUNK_BYTES))


def _has_log(catalog_path: str) -> bool:
    """Whether there is a write-ahead log with something in it."""
    with contextlib.suppress(FileNotFoundError):
        return os.stat(catalog_path + "-wal").st_size > 0
    return False


def _try_exclusive(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
