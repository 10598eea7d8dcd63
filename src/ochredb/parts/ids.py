"""From ids to rows: sorted 64-bit hashes, the string verified on the stored column.

Twelve bytes per row, where a Python dict would take about a hundred. A hash only proposes rows; the
column decides, so colliding hashes cost a comparison and never a wrong answer. Format: the page
`id-index` in docs/formats.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from ochredb.errors import Corrupt
from ochredb.parts.arrays import (
    ArrayReader,
    ArrayWriter,
    Section,
    SectionSource,
    directory_count,
    read_directory,
    write_directory,
)
from ochredb.parts.columns import BytesColumn
from ochredb.types import Int64s

FORMAT = 1

_HASH = "xxh3-64"
_STEP_ROWS = 4_096
# Up to this many look-ups, bisection in Python is quicker than a call of searchsorted.
_BISECT_MAX = 3


class Names(list[str]):
    """Ids to be looked up in several parts: encoded and hashed once. Not changed any more."""

    @cached_property
    def hashed(self) -> tuple[list[bytes], list[int]]:
        keys = _encoded(self)
        return keys, list(map(xxh3_64_intdigest, keys))


class IdIndex:
    """Which row holds an id. Ids occur once each.

    Args:
        hashes: uint64[n], ascending.
        rows: uint32[n], the row of each hash; equal hashes have ascending rows.
        hash_of: the hash function, a stable 64-bit one.
    """

    def __init__(
        self,
        hashes: NDArray[np.uint64],
        rows: NDArray[np.uint32],
        hash_of: Callable[[bytes], int] = xxh3_64_intdigest,
    ) -> None:
        assert len(hashes) == len(rows)
        self._hashes, self._rows = hashes, rows
        self._hash_keys, self._row_items = hashes.data, rows.data
        self._hash_of = hash_of

    @classmethod
    def build(
        cls,
        ids: BytesColumn | Sequence[bytes],
        hash_of: Callable[[bytes], int] = xxh3_64_intdigest,
    ) -> IdIndex:
        """Cost: about 0.25 µs per id and a sort."""
        hashes = np.empty(len(ids), dtype=np.uint64)
        for start in range(0, len(ids), _STEP_ROWS):
            rows = range(start, min(start + _STEP_ROWS, len(ids)))
            values = ids.take(rows) if isinstance(ids, BytesColumn) else ids[start : rows.stop]
            hashes[start : rows.stop] = [hash_of(value or b"") for value in values]
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], order.astype(np.uint32), hash_of)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def hashes(self) -> NDArray[np.uint64]:
        return self._hashes

    @property
    def rows(self) -> NDArray[np.uint32]:
        return self._rows

    def check(self, row_count: int) -> None:
        """Raises Corrupt if a row number is not below `row_count`."""
        if len(self) and int(self._rows.max()) >= row_count:
            raise Corrupt("an index of strings names a row that does not exist")

    def lookup(self, ids: Sequence[str] | Sequence[bytes], column: BytesColumn) -> Int64s:
        """int64[m]: the row of each id in `column`, or -1.

        Cost: about 10 µs for 10 ids, 50 µs for 250.
        """
        if isinstance(ids, Names) and self._hash_of is xxh3_64_intdigest:
            keys, digests = ids.hashed
        else:
            keys = _encoded(ids)
            digests = list(map(self._hash_of, keys))
        if len(keys) <= _BISECT_MAX or not len(self):
            places = [bisect_left(self._hash_keys, digest) for digest in digests]
            found = map(self._verified, keys, digests, places, [column] * len(keys))
            return np.fromiter(found, dtype=np.int64, count=len(keys))
        wanted = np.array(digests, dtype=np.uint64)
        first = self._hashes.searchsorted(wanted)
        np.minimum(first, len(self) - 1, out=first)
        rows = self._rows[first].astype(np.int64)
        proposed = self._hashes[first] == wanted
        if not proposed.any():
            rows.fill(-1)
            return rows
        hits = None if proposed.all() else np.flatnonzero(proposed)
        if hits is None:
            right = column.equal_rows(keys, rows)
        else:
            rows[~proposed] = -1
            right = column.equal_rows([keys[hit] for hit in hits.tolist()], rows[hits])
        if not right.all():
            wrong = np.flatnonzero(~right) if hits is None else hits[~right]
            for item in wrong.tolist():
                # Another id with this hash stands before it, or instead of it.
                rows[item] = self._verified(keys[item], digests[item], int(first[item]), column)
        return rows

    def _verified(self, key: bytes, digest: int, place: int, column: BytesColumn) -> int:
        """The row whose id is `key`, among the hashes equal to `digest` from `place` on; or -1."""
        hashes, rows = self._hash_keys, self._row_items
        while place < len(hashes) and hashes[place] == digest:
            if column.get(rows[place]) == key:
                return int(rows[place])
            place += 1
        return -1

    def sections(self, name: str = "ids") -> dict[str, Section]:
        """The index as sections, for `open`; only the standard hash function can be stored."""
        assert self._hash_of is xxh3_64_intdigest
        arrays = ArrayWriter()
        directory = {
            "format": FORMAT,
            "hash": _HASH,
            "count": len(self),
            "hashes": arrays.add(self._hashes),
            "rows": arrays.add(self._rows),
        }
        return {f"{name}/directory": write_directory(directory), f"{name}/arrays": arrays.data()}

    @classmethod
    def open(cls, section: SectionSource, name: str = "ids") -> IdIndex:
        """Read back what `sections` gave, without copying. Raises Corrupt."""
        directory = read_directory(section, f"{name}/directory", FORMAT)
        count = directory_count(directory, "count", name)
        if directory.get("hash") != _HASH:
            raise Corrupt(f"{name}: unknown hash function {directory.get('hash')!r}")
        arrays = ArrayReader(section(f"{name}/arrays"), name)
        hashes, rows = directory.get("hashes"), directory.get("rows")
        arrays.check(hashes, "<u8", count=count)
        arrays.check(rows, "<u4", count=count)
        index = cls(arrays.get(hashes), arrays.get(rows))
        index.check(count)
        return index


def _encoded(values: Sequence[str] | Sequence[bytes]) -> list[bytes]:
    if not len(values) or isinstance(values[0], bytes):
        return list(values)  # type: ignore[arg-type]  # All are, if the first one is.
    try:
        return list(map(str.encode, values))  # type: ignore[arg-type]
    except UnicodeEncodeError:
        # Unpaired surrogates are encoded too: they equal nothing that is stored.
        return [str(value).encode("utf-8", "surrogatepass") for value in values]
