"""SQLite's write-ahead log, read from outside: which pages it holds, and whether they are whole.

    header, 32 bytes | frames: header, 24 bytes, and a page

Each frame has the salt of its log, which changes when the log begins anew, and a checksum over
everything up to it: the frames that SQLite uses are those up to the last commit before the first
one that fails (https://www.sqlite.org/fileformat2.html#the_write_ahead_log). The log has no locks,
so unlike the database it may be opened by path.

The checksum is linear: two sums, modulo 2**32, of the words times Fibonacci numbers. That makes it
a product of matrices, 5 µs for a page of 8 KiB.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ochredb.storage import files

_HEADER = struct.Struct(">IIIIQII")  # Magic, version, page bytes, number, salt, two sums.
_MAGIC = 0x377F0682  # The lowest bit: the words of the sums are big-endian.
_VERSION = 3007000
_CHUNK_BYTES = 1 << 18
_LOOKED_AT = 32  # Frames at once: a transaction seldom has more.
_FRAME_HEADER = [("page", ">u4"), ("commit", ">u4"), ("salt", ">u8"), ("sums", ">u4", (2,))]
HEADER_BYTES = _HEADER.size
FRAME_HEADER_BYTES = np.dtype(_FRAME_HEADER).itemsize

Numbers = NDArray[np.int64]
Sums = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Headers:
    """Of consecutive frames. page: from 1. commit: pages of the database, 0 within a transaction.

    sums: uint32 of shape (frames, 2).
    """

    page: Numbers
    commit: Numbers
    sums: Sums


class Log:
    """A log with a whole header. Frames are counted from 0."""

    def __init__(self, descriptor: int, header: bytes) -> None:
        magic, _, self.page_bytes, _, self.salt, *sums = _HEADER.unpack(header)
        self._descriptor = descriptor
        self._sums = np.array(sums, np.uint32)
        words = ">u4" if magic & 1 else "<u4"
        self._frame = np.dtype([*_FRAME_HEADER, ("words", words, (self.page_bytes // 4,))])

    def is_same(self) -> bool:
        """Whether it has not begun anew meanwhile."""
        header = os.pread(self._descriptor, HEADER_BYTES, 0)
        return len(header) == HEADER_BYTES and _HEADER.unpack(header)[4] == self.salt

    def headers(self, first: int, stop: int | None = None) -> Headers:
        """Of frames [first, stop) as far as they are there and have the log's salt.

        Cost: 1 µs each. With their pages, of which nothing is used: each call to the system lets go
        of the interpreter's lock, which may take long to come back.
        """
        return _joined([_copied(chunk) for chunk in self._chunks(first, stop)])

    def has_commit(self, first: int) -> bool:
        """Whether a transaction ends at frame `first` or later."""
        while True:
            some = self.headers(first, first + _LOOKED_AT)
            if some.commit.any():
                return True
            if len(some.commit) < _LOOKED_AT:
                return False
            first += _LOOKED_AT

    def sums_before(self, frame: int) -> Sums:
        """What its checksum goes on from, uint32 of shape (2,)."""
        if frame == 0:
            return self._sums
        return np.asarray(self.content(frame - 1)["sums"], np.uint32)

    def content(self, frame: int) -> NDArray[np.void]:
        """One frame with its page, as fields. Raises OSError if it is not there."""
        start = HEADER_BYTES + frame * self._frame.itemsize
        data = files.read_range(self._descriptor, start, start + self._frame.itemsize)
        return np.frombuffer(data, self._frame)[0]  # type: ignore[no-any-return]

    def checked(
        self, frames: Numbers, first: int, headers: Headers
    ) -> Iterator[tuple[Numbers, NDArray[np.void], NDArray[np.bool_]]]:
        """Some frames, ascending, in chunks: their numbers, they themselves, and whether each has
        the checksum that follows upon the one before it.

        headers: of the frames from `first` on, those before these among them. Raises OSError if
        they are not there. Cost: 8 µs each.
        """
        before = np.concatenate([self.sums_before(first).reshape(1, 2), headers.sums])
        before = before[frames - first]
        size = self._frame.itemsize
        at_once = max(1, _CHUNK_BYTES // size)
        start = 0
        while start < len(frames):
            stop = int(np.searchsorted(frames, frames[start] + at_once))
            numbers = frames[start:stop]
            begin, end = int(numbers[0]) * size, (int(numbers[-1]) + 1) * size
            read = files.read_range(self._descriptor, HEADER_BYTES + begin, HEADER_BYTES + end)
            some = np.frombuffer(read, self._frame)[numbers - numbers[0]]
            yield numbers, some, self._whole(some, before[start:stop])
            start = stop

    def whole_frames(self, first: int = 0) -> tuple[Headers, int]:
        """Those that SQLite would use, frame `first` and later; and how many frames come before
        the end of the last commit."""
        before, count, committed = self.sums_before(first), first, first
        chunks = []
        for chunk in self._chunks(first):
            starts = np.concatenate([before.reshape(1, 2), chunk["sums"][:-1]]).astype(np.uint32)
            good = _leading(self._whole(chunk, starts))
            chunks.append(_copied(chunk[:good]))
            ends = np.flatnonzero(chunk["commit"][:good])
            if len(ends):
                committed = count + int(ends[-1]) + 1
            count += good
            if good < len(chunk):
                break
            before = np.asarray(chunk["sums"][-1], np.uint32)
        return _joined(chunks, committed - first), committed

    def _chunks(self, first: int, stop: int | None = None) -> Iterator[NDArray[np.void]]:
        """Frames with the log's salt from `first` on, until one has not, or `stop`."""
        size = self._frame.itemsize
        count = max(0, (os.fstat(self._descriptor).st_size - HEADER_BYTES) // size)
        count = count if stop is None else min(stop, count)
        step = max(1, _CHUNK_BYTES // size)
        for start in range(first, count, step):
            begin, end = start * size, min(count, start + step) * size
            try:
                read = files.read_range(self._descriptor, HEADER_BYTES + begin, HEADER_BYTES + end)
            except OSError:  # It was cut off just now.
                return
            chunk = np.frombuffer(read, self._frame)
            good = _leading((chunk["salt"] == self.salt) & (chunk["page"] > 0))
            if good:
                yield chunk[:good]
            if good < len(chunk):
                return

    def _whole(self, frames: NDArray[np.void], before: Sums) -> NDArray[np.bool_]:
        weights, first = _weights(self.page_bytes // 4 + 2)
        words = frames["words"].astype(np.uint32)
        # Page and commit are words of the sums, in their byte order.
        heads = np.stack([frames["page"], frames["commit"]], axis=1).astype(">u4")
        heads = heads.view(self._frame["words"].base).astype(np.uint32)
        found = words @ weights[2:] + heads @ weights[:2] + before @ first
        return np.asarray((found == frames["sums"]).all(axis=1))


def _joined(some: list[Headers], count: int | None = None) -> Headers:
    return Headers(
        np.concatenate([np.zeros(0, np.int64), *(item.page for item in some)])[:count],
        np.concatenate([np.zeros(0, np.int64), *(item.commit for item in some)])[:count],
        np.concatenate([np.zeros((0, 2), np.uint32), *(item.sums for item in some)])[:count],
    )


def _copied(frames: NDArray[np.void]) -> Headers:
    return Headers(
        frames["page"].astype(np.int64),
        frames["commit"].astype(np.int64),
        frames["sums"].astype(np.uint32),
    )


def _leading(right: NDArray[np.bool_]) -> int:
    """How many are right before the first that is not."""
    return len(right) if right.all() else int(np.argmin(right))


@contextlib.contextmanager
def opened(catalog_path: str) -> Iterator[Log | None]:
    """The write-ahead log of a database; None if there is none that SQLite would use."""
    try:
        descriptor = os.open(catalog_path + "-wal", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield _log(descriptor)
    finally:
        os.close(descriptor)


def _log(descriptor: int) -> Log | None:
    header = os.pread(descriptor, HEADER_BYTES, 0)
    if len(header) < HEADER_BYTES:
        return None
    magic, version, page_bytes, *_, first, second = _HEADER.unpack(header)
    if magic & ~1 != _MAGIC or version != _VERSION:
        return None
    if not 512 <= page_bytes <= 65536 or page_bytes & (page_bytes - 1):
        return None
    words = np.frombuffer(header[:24], ">u4" if magic & 1 else "<u4").astype(np.uint32)
    found = words @ _weights(len(words))[0]
    return Log(descriptor, header) if found.tolist() == [first, second] else None


@functools.cache
def _weights(words: int) -> tuple[Sums, Sums]:
    """Of so many words, uint32 of shape (words, 2), and of the two sums before, (2, 2)."""
    numbers = [0, 1]
    while len(numbers) < words + 2:
        numbers.append((numbers[-1] + numbers[-2]) & 0xFFFFFFFF)
    fibonacci = np.array(numbers, np.uint32)
    weights = np.stack([fibonacci[:words][::-1], fibonacci[1 : words + 1][::-1]], axis=1)
    first = np.array(
        [[fibonacci[words - 1], fibonacci[words]], [fibonacci[words], fibonacci[words + 1]]],
        np.uint32,
    )
    return np.ascontiguousarray(weights), first
