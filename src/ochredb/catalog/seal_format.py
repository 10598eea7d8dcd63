"""What a seal says, as bytes and as numbers (docs/formats/seal.md).

Checksums of the pages of the database file, as the checkpoints left them, and records of what
became of them. Each record that is appended adds to what those before it say; the last one says
how far the whole is true:

* CLOSED: of a catalog that nobody has open. True while there is no write-ahead log.
* SETTLED: of the file as it is while it has the time `mtime_ns`, or, as long as the write-ahead log
  is the one of `salt`, of the pages that are not in that.
* BEGUN: a checkpoint may have copied pages of that log; of the others.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ochredb.checksum import BLOCK_BYTES, xxh3

CLOSED, SETTLED, BEGUN = 1, 2, 3
UNKNOWN = 0
"""Instead of a checksum: a page that nobody has written, or looked at."""

_MAGIC = b"OCHRSEAL"
_OF_BLOCKS, _OF_PAGES = 1, 2  # Format versions; the first only of closed catalogs.
_BLOCKS = struct.Struct("<8sIIQ")  # Magic, version, bytes of a block, bytes of the catalog.
_PAGES = struct.Struct("<8sIIQ")  # Magic, version, bytes of a page, pages.
_RECORD = struct.Struct("<IIQQQQ")  # Kind, pages, salt, frames, size in bytes, mtime_ns.
_CHECKSUM = struct.Struct("<Q")
_PAIR = np.dtype([("page", "<u8"), ("sum", "<u8")])

Checksums = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class State:
    """kind: CLOSED, SETTLED or BEGUN. salt, frames: of the write-ahead log, and how many of its
    frames are in the checksums. size_bytes, mtime_ns: of the database file."""

    kind: int
    salt: int
    frames: int
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Sealed:
    """checksums: uint64, of each `block_bytes` from the start of the file."""

    block_bytes: int
    checksums: Checksums
    state: State


def encode(page_bytes: int, checksums: Checksums, state: State) -> bytes:
    """A seal with one record."""
    head = _PAGES.pack(_MAGIC, _OF_PAGES, page_bytes, len(checksums)) + checksums.tobytes()
    return _summed(head) + encode_record(state, np.zeros(0, np.int64), np.zeros(0, np.uint64))


def encode_record(state: State, pages: NDArray[np.int64], checksums: Checksums) -> bytes:
    """To be appended. pages: from 0; each at most once, with its new checksum."""
    pairs = np.zeros(len(pages), _PAIR)
    pairs["page"], pairs["sum"] = pages, checksums
    fields = (state.salt, state.frames, state.size_bytes, state.mtime_ns)
    return _summed(_RECORD.pack(state.kind, len(pages), *fields) + pairs.tobytes())


def _summed(body: bytes) -> bytes:
    return body + _CHECKSUM.pack(xxh3(body))


def decode(content: bytes) -> Sealed | None:
    """None for what is damaged, torn, or of a newer OchreDB: it says nothing."""
    if len(content) < _PAGES.size or content[:8] != _MAGIC:
        return None
    _, version, block_bytes, count = _PAGES.unpack_from(content)
    if version == _OF_BLOCKS and block_bytes == BLOCK_BYTES:
        size, count = count, -(-count // BLOCK_BYTES)
        length = _BLOCKS.size + 8 * count
        if len(content) != length + _CHECKSUM.size or _body(content, 0, length) is None:
            return None
        checksums = np.frombuffer(content, np.uint64, count, _BLOCKS.size)
        return Sealed(BLOCK_BYTES, checksums, State(CLOSED, 0, 0, size, 0))
    if version != _OF_PAGES or _body(content, 0, _PAGES.size + 8 * count) is None:
        return None
    checksums = np.frombuffer(content, np.uint64, count, _PAGES.size).copy()
    start, state = _PAGES.size + 8 * count + 8, None
    while start < len(content):
        if len(content) - start < _RECORD.size:
            return None
        kind, changed, *fields = _RECORD.unpack_from(content, start)
        size = _RECORD.size + changed * _PAIR.itemsize
        if _body(content, start, size) is None:
            return None
        state = State(kind, *fields)
        if kind != BEGUN:  # Where the file was cut, what comes there later is something else.
            checksums = checksums[: -(-state.size_bytes // block_bytes)]
        pairs = np.frombuffer(content, _PAIR, changed, start + _RECORD.size)
        checksums = _changed(checksums, pairs)
        start += size + _CHECKSUM.size
    return None if state is None else Sealed(block_bytes, checksums, state)


def _body(content: bytes, start: int, size: int) -> memoryview | None:
    """Some bytes, if they are there and their checksum, which follows them, is right."""
    stop = start + size
    if len(content) < stop + _CHECKSUM.size:
        return None
    body = memoryview(content)[start:stop]
    return body if _CHECKSUM.unpack_from(content, stop)[0] == xxh3(body) else None


def _changed(checksums: Checksums, pairs: NDArray[np.void]) -> Checksums:
    if not len(pairs):
        return checksums
    missing = int(pairs["page"].max()) + 1 - len(checksums)
    if missing > 0:
        checksums = np.concatenate([checksums, np.full(missing, UNKNOWN, np.uint64)])
    checksums[pairs["page"]] = pairs["sum"]
    return checksums
