"""Small, exact operations on files: complete writes, syncs, and names that are never replaced.

All raise OSError and release the global interpreter lock while the kernel works.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import stat
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ochredb.storage.base import byte_views

if TYPE_CHECKING:
    from ochredb.storage.base import Piece

_BUFFERS_PER_CALL_MAX = 1024  # IOV_MAX on Linux and macOS.
_BYTES_PER_READ_MAX = 1 << 30
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_MAP_SHARED = 1
_MAP_FIXED = 16
_MADV_DONTNEED = 4  # Linux; elsewhere `madvise` may refuse it, which only keeps the pages.
_PROT_READ = 1


@contextlib.contextmanager
def opened(path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of `path`, closed at the end and not inherited by other programs."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def size_of(descriptor: int) -> int:
    """The size in bytes of a regular file; raises IsADirectoryError if it is something else."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "not a regular file")
    return status.st_size


def write_all(descriptor: int, views: Sequence[memoryview]) -> None:
    """Write one-dimensional views of bytes, none of them empty, one after the other."""
    pending = list(views[::-1])  # A stack: the next view is the last one.
    while pending:
        batch = pending[: -_BUFFERS_PER_CALL_MAX - 1 : -1]
        written = os.writev(descriptor, batch)
        while written:
            view = pending.pop()
            if written < len(view):  # A short write: go on in the middle of this view.
                pending.append(view[written:])
                break
            written -= len(view)


def write_at(descriptor: int, view: memoryview, place: int) -> None:
    """Write a one-dimensional view of bytes from byte `place` on."""
    while view.nbytes:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written


def read_range(descriptor: int, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file that is at least `stop` bytes long."""
    chunks = []
    while start < stop:
        chunk = os.pread(descriptor, min(stop - start, _BYTES_PER_READ_MAX), start)
        if not chunk:
            raise OSError(errno.EIO, f"the file ends at byte {start}, not at {stop}")
        chunks.append(chunk)
        start += len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def sync(descriptor: int) -> None:
    """Wait until content and metadata are on the medium."""
    if sys.platform == "darwin":
        import fcntl

        # fsync only reaches the drive's cache there.
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def sync_folder(path: str) -> None:
    """Wait until the names in a folder are on the medium. Cost: 0.1 ms if nothing has changed."""
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        sync(descriptor)


def sync_parents(path: str) -> None:
    """Make the names of a folder and of its parents durable, up to the file system's top."""
    device = os.stat(path).st_dev
    while path != (parent := os.path.dirname(path)):
        try:
            if os.stat(parent).st_dev != device:
                return
            sync_folder(parent)
        except PermissionError:
            # Not readable to us, so neither it nor anything above is of our making.
            return
        path = parent


def unlink_if_exists(path: str) -> bool:
    """Remove a file; returns whether there was one."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def publish(source: str, target: str) -> None:
    """Give a file another name, which must be free; `source` may or may not be gone afterwards.

    Raises FileExistsError if the name is taken.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        rename_no_replace(source, target)


def rename_no_replace(source: str, target: str) -> None:
    """Rename a file; raises FileExistsError if `target` exists, and OSError if that cannot be told.

    Linux only (`renameat2`, in glibc since 2.28); elsewhere, and on file systems without the flag,
    raises OSError with ENOTSUP.
    """
    call = getattr(_libc(), "renameat2", None)
    if call is None:
        code = errno.ENOTSUP
    else:
        arguments = (
            ctypes.c_int(_AT_FDCWD), os.fsencode(source),
            ctypes.c_int(_AT_FDCWD), os.fsencode(target),
            ctypes.c_uint(_RENAME_NOREPLACE),
        )  # fmt: skip
        if call(*arguments) == 0:
            return
        code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}:
        text = "the file system offers neither hard links nor renameat2(RENAME_NOREPLACE)"
        raise OSError(errno.ENOTSUP, text, target)
    raise OSError(code, os.strerror(code), target)


def map_read_only(descriptor: int) -> memoryview:
    """The whole file as a read-only view of bytes, mapped; unmapped with its last reference.

    Unlike `mmap.mmap` it keeps no descriptor, so the number of mapped files is not bounded by the
    limit on open ones. Unlinking the file is safe; truncating it would kill the process.
    """
    size = size_of(descriptor)
    if size == 0:  # Cannot be mapped.
        return memoryview(b"")
    libc = _libc()
    address = libc.mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot map {size} bytes: {os.strerror(code)}")
    content = (ctypes.c_ubyte * size).from_address(address)
    # Every view refers to `content`, so this runs after the last one is gone. Not at exit: daemon
    # threads may still be reading, and the kernel unmaps everything anyway.
    weakref.finalize(content, libc.munmap, address, size).atexit = False
    return memoryview(content).cast("B").toreadonly()


def show_instead(view: memoryview, descriptor: int) -> bool:
    """Have a view that `map_read_only` made show another file of the same size, at once.

    For every reader of it and of what was cut from it. False if nothing was changed.
    """
    if not view.nbytes or view.nbytes != size_of(descriptor):
        return False
    address = np.frombuffer(view, np.uint8).ctypes.data
    found = _libc().mmap(address, view.nbytes, _PROT_READ, _MAP_SHARED | _MAP_FIXED, descriptor, 0)
    return bool(found == address)


def scratch(
    path: str, pieces: Iterable[Piece], on_failure: Callable[[OSError], bool]
) -> memoryview:
    """What is too large for the heap, in a file that loses its name at once; see `Mappable`.

    path: a free name. on_failure: whether to write the piece again that could not be written.
    """
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as descriptor:
        os.unlink(path)
        size = 0
        for piece in pieces:
            # Written, not stored into a mapping: there a full disk would be a SIGBUS.
            views = byte_views(piece)
            while True:
                try:
                    write_all(descriptor, views)
                    break
                except OSError as error:
                    if not on_failure(error):
                        raise
                os.lseek(descriptor, size, os.SEEK_SET)
            size += sum(view.nbytes for view in views)
        return map_read_only(descriptor)


def forget_pages(view: memoryview) -> None:
    """Drop the resident pages of a view that `map_read_only` made; for a shared file mapping that
    loses nothing. It is advice: a system that does not take it keeps the pages."""
    if view.nbytes:
        address = np.frombuffer(view, np.uint8).ctypes.data
        _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(view.nbytes), _MADV_DONTNEED)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t,
        ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong,
    )  # fmt: skip
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
