"""Checking an object while its bytes pass by: what the catalog knows about it must hold.

Chunks come in order and, but for the last, in multiples of a checksum's block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import xxhash

from ochredb.catalog.copies import Contents
from ochredb.checksum import BLOCK_BYTES, block_checksums, signed, xxh3
from ochredb.errors import Corrupt
from ochredb.parts import deleted as deleted_rows
from ochredb.parts.manifest import ObjectInfo

_TABLE_ROW_BYTES = 8


class Check(Protocol):
    """Sees an object's bytes once, then says what is wrong with them."""

    def update(self, chunk: bytes) -> None: ...

    def problem(self) -> str | None:
        """After the last chunk; None if all is well."""
        ...


class BlocksCheck:
    """An object of a part with a table of block checksums at its end.

    wrong_blocks: after `problem`, those that are not as the table says; None if the table is
    damaged itself.
    """

    def __init__(self, info: ObjectInfo) -> None:
        self.wrong_blocks: list[int] | None = None
        self._info = info
        blocks = -(-info.size // (BLOCK_BYTES + _TABLE_ROW_BYTES))
        self._data_bytes = info.size - _TABLE_ROW_BYTES * blocks
        self._position = 0
        self._found: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = []
        self._table = b""

    def update(self, chunk: bytes) -> None:
        data = memoryview(chunk)[: max(0, self._data_bytes - self._position)]
        self._found.append(block_checksums(data))
        self._table += bytes(memoryview(chunk)[len(data) :])
        self._position += len(chunk)

    def problem(self) -> str | None:
        if xxh3(self._table) != self._info.checksum:
            return "its checksum table is damaged"
        found = np.concatenate([np.zeros(0, np.uint64), *self._found])
        expected = np.frombuffer(self._table, np.uint64)
        wrong = np.flatnonzero(found != expected) if len(found) == len(expected) else np.zeros(1)
        self.wrong_blocks = [int(block) for block in wrong]
        return f"block {self.wrong_blocks[0]} fails its checksum" if self.wrong_blocks else None


class WholeCheck:
    """An object with one checksum, such as a graph."""

    def __init__(self, checksum: int) -> None:
        self._expected, self._hashed = checksum, xxhash.xxh3_64()

    def update(self, chunk: bytes) -> None:
        self._hashed.update(chunk)

    def problem(self) -> str | None:
        return None if self._hashed.intdigest() == self._expected else "fails its checksum"


class RangesCheck:
    """A flush object: fragments that the log still has, each with its checksum."""

    def __init__(self, ranges: list[tuple[int, int, int]]) -> None:
        """ranges: (first byte, end, signed checksum), ascending, without overlaps."""
        self._ranges, self._next = ranges, 0
        self._hashed, self._position = xxhash.xxh3_64(), 0
        self._wrong: str | None = None

    def update(self, chunk: bytes) -> None:
        view, begin = memoryview(chunk), self._position
        self._position = end = begin + len(chunk)
        while self._next < len(self._ranges):
            start, stop, checksum = self._ranges[self._next]
            if start >= end:
                return
            self._hashed.update(view[max(0, start - begin) : max(0, stop - begin)])
            if stop > end:
                return
            if signed(self._hashed.intdigest()) != checksum and self._wrong is None:
                self._wrong = f"the fragment at byte {start} fails its checksum"
            self._hashed.reset()
            self._next += 1

    def problem(self) -> str | None:
        if self._next < len(self._ranges):
            return "it is shorter than its fragments"
        return self._wrong


class BitmapCheck:
    """A bitmap of deleted rows, which has its checksum inside."""

    def __init__(self, rows: int) -> None:
        self._rows, self._data = rows, b""

    def update(self, chunk: bytes) -> None:
        self._data += chunk

    def problem(self) -> str | None:
        try:
            deleted_rows.decode(self._data, self._rows)
        except Corrupt as error:
            return str(error)
        return None


def checks_of(contents: Contents) -> dict[str, Callable[[], Check]]:
    """For each object that the catalog knows something about, how to make its check."""
    made: dict[str, Callable[[], Check]] = {}
    for manifest in contents.manifests:
        for info in manifest.objects:
            made[info.key] = _of_part(info)
    ranges: dict[str, list[tuple[int, int, int]]] = {}
    for key, start, stop, checksum in contents.ranges:
        ranges.setdefault(key, []).append((start, stop, checksum))
    for key, found in ranges.items():
        made[key] = _of_ranges(found)
    for key, rows in contents.bitmaps:
        made[key] = _of_bitmap(rows)
    return made


def _of_part(info: ObjectInfo) -> Callable[[], Check]:
    return lambda: BlocksCheck(info) if info.has_table else WholeCheck(info.checksum)


def _of_ranges(ranges: list[tuple[int, int, int]]) -> Callable[[], Check]:
    return lambda: RangesCheck(ranges)


def _of_bitmap(rows: int) -> Callable[[], Check]:
    return lambda: BitmapCheck(rows)
