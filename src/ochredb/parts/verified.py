"""Bytes of an object, checked block by block before anything of a block is used.

An object ends with a table of checksums of its blocks; the table's own checksum is in the catalog.
Each block is checked once per process. Whoever reads here and there checks only what is touched.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ochredb.checksum import BLOCK_BYTES, block_checksums, xxh3
from ochredb.errors import Corrupt
from ochredb.parts.columns import BytesColumn, Rows
from ochredb.parts.manifest import ObjectInfo, Span
from ochredb.storage.base import LocalStore, MapsPartly, Partly
from ochredb.types import Bools


class VerifiedObject:
    """One mapped object. Thread-safe. Checking costs 0.1 ms per MB, in page cache.

    salvage: also open what has another size or a damaged table, of which `wrong_blocks` then tells
        what can be believed; nothing else may be asked of it.
    """

    def __init__(
        self,
        store: LocalStore,
        info: ObjectInfo,
        spans: Sequence[Span] = (),
        *,
        salvage: bool = False,
    ) -> None:
        """spans: what has a checksum of its own, and may be right where its blocks are not."""
        self.key, self._store, self._spans = info.key, store, spans
        self._spans_pass: dict[Span, bool] = {}
        self._problem: str | None = None  # Of the object as a whole.
        self._was_refetched = False
        self._partly = _partly(store, info, salvage)
        self.view = store.map(info.key) if self._partly is None else self._partly.view
        self._mapped = self.view
        if self.view.nbytes != info.size:
            if not salvage:
                self._fail(f"{info.key} has {self.view.nbytes} bytes instead of {info.size}")
            self.view = _resized(self.view, info.size)
        if not info.has_table:
            self.data_bytes, self._block_bytes = info.size, max(1, info.size)
            self._expected = np.array([info.checksum], np.uint64)
        else:
            # size = data + 8 bytes for each started block of data.
            blocks = -(-info.size // (BLOCK_BYTES + 8))
            self.data_bytes, self._block_bytes = info.size - 8 * blocks, BLOCK_BYTES
            self._fetch([(self.data_bytes, info.size)])
            table = self.view[self.data_bytes :]
            self._expected = np.frombuffer(table, np.uint64)
            if xxh3(table) != info.checksum and not self._refetched(table, info.checksum):
                # If all the data is as the catalog says, it is the table that is damaged.
                found = block_checksums(self.view[: self.data_bytes], BLOCK_BYTES)
                if salvage and xxh3(found.tobytes()) == info.checksum:
                    self._expected = found
                elif not salvage:
                    self._fail(f"the checksum table of {info.key} is damaged")
                    self._expected = ~found  # No block passes.
        self._verified = np.zeros(len(self._expected), np.bool_)
        self._next_unverified = 0
        self._lock = threading.Lock()
        self._wrong: Bools | None = None
        self.is_complete = False
        """Whether every block has been checked."""

    def _fail(self, problem: str) -> None:
        """Raise Corrupt, unless something has a checksum of its own: then only what fails it."""
        if not self._spans:
            raise Corrupt(problem)
        self._problem = self._problem or problem

    @property
    def address(self) -> int:
        return int(np.frombuffer(self.view, np.uint8).ctypes.data) if self.view.nbytes else 0

    @property
    def verified_bytes(self) -> int:
        return min(self.data_bytes, int(np.count_nonzero(self._verified)) * self._block_bytes)

    def verify(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop), checked. Raises Corrupt, naming the object and the block."""
        if not 0 <= start <= stop <= self.data_bytes:
            raise Corrupt(f"{self.key}: a section lies outside of the object")
        if not self.is_complete:
            self._fetch([(start, stop)])
            with self._lock:
                try:
                    self._verify_blocks(start // self._block_bytes, -(-stop // self._block_bytes))
                except Corrupt:
                    if not self._passes_alone(start, stop):
                        raise
        return self.view[start:stop]

    def verify_ranges(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
        """Check the blocks of many ranges [starts[i], stops[i]), and one more that was not yet.

        So an object that is read here and there becomes complete, and checking for that ends; but
        of one that is far away only what is asked for is fetched. If the one more is damaged, those
        who need it are told, when they ask for it.
        Cost: 10 µs and, for what was not checked before, 25 µs per block.
        """
        if len(starts) and not 0 <= int(starts.min()) <= int(stops.max()) <= self.data_bytes:
            raise Corrupt(f"{self.key}: a value lies outside of the object")
        filled = stops > starts
        firsts = starts[filled] // self._block_bytes
        lasts = (stops[filled] - 1) // self._block_bytes
        # Most ranges lie in one block, which most often was checked before.
        open_ranges = (firsts != lasts) | ~self._verified[firsts]
        pairs = list(zip(firsts[open_ranges].tolist(), lasts[open_ranges].tolist(), strict=True))
        if self._partly is not None:
            size = self._block_bytes
            self._fetch(
                [(first * size, min((last + 1) * size, self.data_bytes)) for first, last in pairs]
            )
        with self._lock:
            try:
                for first, last in pairs:
                    self._verify_blocks(first, last + 1)
            except Corrupt:
                if not self._passes_alone(int(starts[filled].min()), int(stops[filled].max())):
                    raise
            if self._partly is None:
                self._verify_one_more()

    def _verify_one_more(self) -> None:
        """Check the next block that was not; the lock is held."""
        try:
            self._verify_blocks(self._next_unverified, self._next_unverified + 1)
        except Corrupt:
            self._skip_verified()

    def _verify_blocks(self, first: int, last: int) -> None:
        """Check blocks [first, last) unless that was done; the lock is held."""
        if self._verified[first:last].all():
            return
        size = self._block_bytes
        data = self.view[first * size : min(last * size, self.data_bytes)]
        wrong = np.flatnonzero(block_checksums(data, size) != self._expected[first:last])
        if len(wrong) and self._refetch():
            wrong = np.flatnonzero(block_checksums(data, size) != self._expected[first:last])
        if len(wrong):
            problem = f"block {first + int(wrong[0])} of {self.key} fails its checksum"
            raise Corrupt(self._problem or problem, key=self.key)
        self._verified[first:last] = True
        if self._verified[self._next_unverified : self._next_unverified + 1].any():
            self._skip_verified()
        if self._next_unverified == len(self._verified):
            self.is_complete = bool(self._verified.all())

    def _passes_alone(self, start: int, stop: int) -> bool:
        """Whether bytes [start, stop) are right though others of their blocks are not."""
        return any(
            span.start <= start and stop <= span.stop and self._passes(span) for span in self._spans
        )

    def _passes(self, span: Span) -> bool:
        known = self._spans_pass.get(span)
        if known is None:
            self._fetch([(span.start, span.stop)])
            known = xxh3(self.view[span.start : span.stop]) == span.checksum
            self._spans_pass[span] = known
        return known

    def _skip_verified(self) -> None:
        """Go to the next block that was not checked: those before it were, or are damaged."""
        later = np.flatnonzero(~self._verified[self._next_unverified + 1 :])
        self._next_unverified = (
            self._next_unverified + 1 + int(later[0]) if len(later) else len(self._verified)
        )

    def _refetched(self, table: memoryview, checksum: int) -> bool:
        """Whether a damaged table is whole now."""
        return self._refetch() and xxh3(table) == checksum

    def _refetch(self) -> bool:
        """Once: if the damage may be a local copy's alone, have `view` show the store's bytes."""
        if self._was_refetched:
            return False
        self._was_refetched = True
        if self.view is not self._mapped or not self._store.refetch(self.key, self.view):
            return False
        self._partly = None  # The view shows all of it now.
        return True

    def _fetch(self, ranges: list[tuple[int, int]]) -> None:
        """Have bytes [start, stop) of each range there."""
        if (partly := self._partly) is not None:
            partly.fetch(ranges)

    def bring(self) -> None:
        """Have all of it on this machine."""
        self._fetch([(0, self.view.nbytes)])

    def wrong_blocks(self) -> Bools:
        """bool[blocks]: which fail their checksums. Looks at all of them, the first time."""
        if self._wrong is None:
            self._fetch([(0, self.data_bytes)])
            data = self.view[: self.data_bytes]
            self._wrong = block_checksums(data, self._block_bytes) != self._expected
        return self._wrong

    def ranges_pass(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Bools:
        """bool[m]: whether bytes [starts[i], stops[i]) are right; empty ranges are.

        Cost: looks at all blocks, the first time.
        """
        before = np.zeros(len(self.wrong_blocks()) + 1, np.int64)
        np.cumsum(self.wrong_blocks(), out=before[1:])
        first = starts // self._block_bytes
        last = np.maximum(first, -(-stops // self._block_bytes))
        found: Bools = before[np.minimum(last, len(before) - 1)] == before[first]
        for span in self._spans:
            if not found.all() and self._passes(span):
                found |= (span.start <= starts) & (stops <= span.stop)
        return found

    def forget_pages(self) -> None:
        """Let go of resident pages (they stay in the page cache): after a pass over everything."""
        self._store.forget_pages(self._mapped)


def _partly(store: LocalStore, info: ObjectInfo, salvage: bool) -> Partly | None:
    if salvage or not info.has_table or not isinstance(store, MapsPartly):
        return None
    return store.map_partly(info.key, info.size)


def _resized(view: memoryview, size: int) -> memoryview:
    """The first `size` bytes; what is missing of them is zero."""
    return view[:size] if len(view) >= size else memoryview(bytes(view) + bytes(size - len(view)))


class StoredColumn:
    """A column of byte strings in an object, of whose data only what is read is checked.

    Offsets and validity are checked at once: they are small, and say where the data lies.
    """

    def __init__(self, stored: VerifiedObject, array: Any) -> None:
        """array: a pyarrow Array over the object's bytes, zero copy."""
        self._stored, base = stored, stored.address
        *small, data = array.buffers() if array.type != pa.null() else [None]
        for buffer in small:
            if buffer is not None:
                stored.verify(buffer.address - base, buffer.address - base + buffer.size)
        self._column = BytesColumn.from_arrow(array)
        # An empty buffer may have any address.
        self._data_start = 0 if data is None or not data.size else data.address - base

    def of(self, rows: Rows) -> BytesColumn:
        """The column, whose strings of these rows have been checked."""
        if not self._stored.is_complete:
            offsets = self._column.offsets
            places = np.asarray(rows, np.int64)
            starts = offsets[places].astype(np.int64) + self._data_start
            self._stored.verify_ranges(starts, offsets[places + 1] + np.int64(self._data_start))
        return self._column

    def whole(self) -> BytesColumn:
        """The column, whose strings have all been checked."""
        offsets = self._column.offsets
        start, stop = int(offsets[0]) + self._data_start, int(offsets[-1]) + self._data_start
        self._stored.verify(start, stop)
        if stop - start > BLOCK_BYTES:
            self._stored.forget_pages()
        return self._column
