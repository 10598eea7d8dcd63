"""Which rows of a part are dead in a version: a roaring bitmap, inline or as an object."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pyroaring import BitMap

from ochredb.errors import Corrupt
from ochredb.types import Bools

INLINE_BYTES_MAX = 32 << 10  # Larger bitmaps are objects `deleted/<uuid7>`.


def encode(rows: NDArray[np.integer]) -> bytes:
    """The serialised bitmap of these row numbers."""
    bitmap = BitMap(rows.astype(np.uint32))
    bitmap.run_optimize()
    return bytes(bitmap.serialize())


def decode(data: bytes, rows: int) -> Bools:
    """bool[rows], True where a row lives. Raises Corrupt."""
    try:
        deleted = np.frombuffer(BitMap.deserialize(data).to_array(), np.uint32)
    except (ValueError, RuntimeError) as error:
        raise Corrupt(f"a bitmap of deleted rows is damaged: {error}") from error
    if len(deleted) and int(deleted[-1]) >= rows:
        raise Corrupt("a bitmap of deleted rows names a row that does not exist")
    live = np.ones(rows, np.bool_)
    live[deleted] = False
    return live
