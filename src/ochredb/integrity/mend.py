"""Finding the bit that was flipped: most damage of disks and memory is one bit.

A checksum of 64 bits tells the right one among the two million of a block, and errs once in ten
million million times. What is found is what was written, so nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xxhash

from ochredb.checksum import BLOCK_BYTES, block_checksums, xxh3
from ochredb.parts.manifest import ObjectInfo

BYTES_MAX = 1 << 20  # Searched at most: the time grows with the square.
WRONG_BLOCKS_MAX = 4  # More of an object are no flipped bit.
_PIECE_BYTES = 4 << 10


def flipped_bit(data: bytes | memoryview, checksum: int, step: Callable[[], None]) -> bytes | None:
    """`data` with the one bit flipped back that makes it pass; None if there is none.

    checksum: unsigned xxh3-64. step: called now and then; it may raise to give up.
    Cost: about half a minute for 256 KiB, a tenth of a second for 10 KiB.
    """
    if len(data) > BYTES_MAX:
        return None
    whole = memoryview(bytes(data))
    before = xxhash.xxh3_64()
    for start in range(0, len(whole), _PIECE_BYTES):
        piece, rest = bytearray(whole[start : start + _PIECE_BYTES]), whole[start + _PIECE_BYTES :]
        step()
        for place in range(len(piece)):
            for bit in range(8):
                piece[place] ^= 1 << bit
                state = before.copy()
                state.update(piece)
                state.update(rest)
                if state.intdigest() == checksum:
                    return bytes(whole[:start]) + bytes(piece) + bytes(rest)
                piece[place] ^= 1 << bit
        before.update(whole[start : start + _PIECE_BYTES])
    return None


def mended_object(content: bytes, info: ObjectInfo, step: Callable[[], None]) -> bytes | None:
    """The bytes that an object of a part was created with, if that can be told; else None.

    content: its bytes as they are. What was added behind the end is cut off.
    """
    if len(content) < info.size:
        return None
    content = content[: info.size]
    if not info.has_table:
        if xxh3(content) == info.checksum:
            return content
        return flipped_bit(content, info.checksum, step)
    blocks = -(-info.size // (BLOCK_BYTES + 8))
    data, table = content[: info.size - 8 * blocks], content[info.size - 8 * blocks :]
    found = block_checksums(data)
    if xxh3(found.tobytes()) == info.checksum:
        return data + found.tobytes()  # It is the table that was damaged.
    if xxh3(table) != info.checksum:
        mended = flipped_bit(table, info.checksum, step)
        if mended is None:
            return None
        table = mended
    expected = np.frombuffer(table, np.uint64)
    wrong = np.flatnonzero(found != expected).tolist()
    if len(wrong) > WRONG_BLOCKS_MAX:
        return None
    right = bytearray(data)
    for block in wrong:
        place = slice(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
        piece = flipped_bit(data[place], int(expected[block]), step)
        if piece is None:
            return None
        right[place] = piece
    return bytes(right) + table
