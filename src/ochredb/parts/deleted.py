"""Which rows of a part are dead in a version: a checked roaring bitmap, inline or as an object.

Format: docs/formats/deleted-rows.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from pyroaring import BitMap

from ochredb.checksum import xxh3
from ochredb.errors import Corrupt, newer_message
from ochredb.types import Bools

FORMAT_VERSION = 1
_HEADER = struct.Struct("<IIQ")  # Format version, zero, xxh3-64 of the bitmap's bytes.
INLINE_BYTES_MAX = 32 << 10  # Larger bitmaps are objects `deleted/<uuid7>`.


def encode(rows: NDArray[np.integer]) -> bytes:
    """The checked, serialised bitmap of these row numbers."""
    bitmap = BitMap(rows.astype(np.uint32))
    bitmap.run_optimize()
    serialized = bytes(bitmap.serialize())
    return _HEADER.pack(FORMAT_VERSION, 0, xxh3(serialized)) + serialized


def decode(data: bytes, rows: int) -> Bools:
    """bool[rows], True where a row lives. Raises Corrupt."""
    if len(data) < _HEADER.size:
        raise Corrupt("a bitmap of deleted rows is too short")
    version, zero, checksum = _HEADER.unpack_from(data)
    serialized = data[_HEADER.size :]
    if version == 0 or zero:
        raise Corrupt("the header of a bitmap of deleted rows is damaged")
    if version > FORMAT_VERSION:
        raise Corrupt(newer_message("a bitmap of deleted rows", version, FORMAT_VERSION))
    if xxh3(serialized) != checksum:
        raise Corrupt("a bitmap of deleted rows fails its checksum")
    try:
        deleted = np.frombuffer(BitMap.deserialize(serialized).to_array(), np.uint32)
    except (ValueError, RuntimeError) as error:
        raise Corrupt(f"a bitmap of deleted rows is damaged: {error}") from error
    if len(deleted) and int(deleted[-1]) >= rows:
        raise Corrupt("a bitmap of deleted rows names a row that does not exist")
    live = np.ones(rows, np.bool_)
    live[deleted] = False
    return live


def mended(data: bytes, mend: Callable[[bytes, int], bytes | None]) -> bytes | None:
    """A damaged bitmap as it was encoded, if that can be told.

    mend: given bytes and the checksum that they should have, returns those that have it, or None.
    """
    if len(data) < _HEADER.size:
        return None
    _, _, checksum = _HEADER.unpack_from(data)
    serialized = data[_HEADER.size :]
    if (found := xxh3(serialized)) != checksum:
        # One bit of the checksum itself, or else of what it is of.
        if (found ^ checksum).bit_count() > 1:
            right = mend(serialized, checksum)
            if right is None:
                return None
            serialized = right
    return _HEADER.pack(FORMAT_VERSION, 0, xxh3(serialized)) + serialized
