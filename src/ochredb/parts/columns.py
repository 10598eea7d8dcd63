"""A column of byte strings over borrowed memory: documents, ids, dictionaries.

`BytesColumn` is n byte strings in one data buffer, delimited by n+1 offsets (Arrow's layout, so a
memory-mapped Arrow column is one without a copy). Strings may be absent (None). Searching happens
in numpy or RE2, which release the GIL; nothing here holds it longer than about a millisecond.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from operator import eq
from typing import Any, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ochredb.errors import Corrupt, InvalidArgument
from ochredb.types import Bools, Int64s

T = TypeVar("T")
Rows = Sequence[int] | NDArray[np.integer[Any]]
Check = Callable[[], None]

# Bytes searched per step: the temporaries stay in the level 2 cache.
_SCAN_BYTES = 1 << 17
_SCANS_PER_CHECK = 8
# Needles of at most this many bytes are compared byte by byte, if the first two leave at most one
# position in so many.
_COMPARED_BYTES_MAX = 32
_COMPARED_ONE_IN = 16
_FEW_POSITIONS = 1_024
# Rows converted to Python objects, or searched, per C call, and bytes.
_STEP_ROWS = 4_096
_STEP_BYTES = 1 << 20
# Below this many rows a plain loop beats numpy's fixed costs.
_LOOP_ROWS_MAX = 64
# Bytes gathered one by one, which takes eight bytes of positions for each.
_GATHER_BYTES_MAX = 1 << 16
_SAMPLE_BYTES = 1 << 16


def go_on() -> None:
    """A check that lets everything go on."""


class BytesColumn:
    """n byte strings, immutable.

    Args:
        offsets: int32 or int64[n+1], ascending; string i is data[offsets[i]:offsets[i+1]].
        data: the joined bytes; borrowed, not copied.
        present: bool[n], or None if no string is absent.

    Raises Corrupt if the outer offsets leave the buffer.
    """

    def __init__(
        self,
        offsets: NDArray[np.signedinteger[Any]],
        data: bytes | bytearray | memoryview | NDArray[np.uint8],
        present: Bools | None = None,
    ) -> None:
        assert offsets.ndim == 1
        assert offsets.dtype in (np.int32, np.int64)
        assert present is None or len(present) == len(offsets) - 1
        self._offsets = offsets
        self._bounds = offsets.data  # Indexing it costs half of indexing the array.
        view = data.data if isinstance(data, np.ndarray) else memoryview(data)
        self._data = view.cast("B") if len(data) else memoryview(b"")
        self._present = present
        if not 0 <= self._bounds[0] <= self._bounds[-1] <= len(self._data):
            raise Corrupt("byte strings lie outside of their buffer")

    @classmethod
    def from_arrow(cls, array: Any) -> BytesColumn:
        """A pyarrow Array of type (large_)string or (large_)binary, or null; zero copy."""
        count = len(array)
        validity, *buffers = array.buffers()
        kind = str(array.type)
        if kind == "null":
            return cls(np.zeros(count + 1, dtype=np.int64), b"", np.zeros(count, dtype=np.bool_))
        assert kind in ("string", "large_string", "binary", "large_binary"), kind
        dtype = np.dtype(np.int64 if kind.startswith("large") else np.int32)
        present = None
        if array.null_count:
            first_byte, first_bit = divmod(array.offset, 8)
            bitmap = np.frombuffer(validity, dtype=np.uint8, offset=first_byte)
            bits = np.unpackbits(bitmap, count=first_bit + count, bitorder="little")
            present = bits[first_bit:].view(np.bool_)
        if count == 0:
            return cls(np.zeros(1, dtype=np.int64), b"", present)
        start_bytes = array.offset * dtype.itemsize
        offsets = np.frombuffer(buffers[0], dtype, count=count + 1, offset=start_bytes)
        return cls(offsets, memoryview(buffers[1]) if buffers[1] else b"", present)

    @classmethod
    def from_list(cls, values: Sequence[bytes | str | None]) -> BytesColumn:
        """Copies; str is encoded as UTF-8. Cost: about 0.2 µs and one copy per string."""
        lengths: list[int] = []
        joined: list[bytes] = []
        absent: list[int] = []
        for start in range(0, len(values), _STEP_ROWS):
            step = values[start : start + _STEP_ROWS]
            encoded = [value.encode() if isinstance(value, str) else value or b"" for value in step]
            lengths.extend(map(len, encoded))
            joined.append(b"".join(encoded))
            if None in step:
                absent.extend(i for i, value in enumerate(step, start) if value is None)
        offsets = np.zeros(len(values) + 1, dtype=np.int64)
        np.cumsum(np.array(lengths, dtype=np.int64), out=offsets[1:])
        data = np.empty(int(offsets[-1]), dtype=np.uint8)
        ends = accumulate(map(len, joined))
        for end, block in zip(ends, joined, strict=True):
            data[end - len(block) : end] = np.frombuffer(block, dtype=np.uint8)
        present = None
        if absent:
            present = np.ones(len(values), dtype=np.bool_)
            present[absent] = False
        return cls(offsets, data, present)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def offsets(self) -> NDArray[np.signedinteger[Any]]:
        """int32 or int64[n+1]; need not begin with 0."""
        return self._offsets

    @cached_property
    def data(self) -> NDArray[np.uint8]:
        """The whole buffer, uint8; `offsets` are positions in it."""
        return _as_uint8(self._data)

    @property
    def size_bytes(self) -> int:
        """Bytes of all strings together."""
        return int(self._bounds[-1] - self._bounds[0])

    @cached_property
    def present(self) -> Bools:
        """bool[n]: which rows have a string."""
        return np.ones(len(self), dtype=np.bool_) if self._present is None else self._present

    def get(self, row: int) -> bytes | None:
        """One string, or None. Cost: about 0.3 µs."""
        if self._present is not None and not self._present[row]:
            return None
        return bytes(self._data[self._bounds[row] : self._bounds[row + 1]])

    def take(self, rows: Rows) -> list[bytes | None]:
        """The strings of these rows, in this order. Cost: about 0.3 µs per row and the copy."""
        return self._take(rows, bytes)

    def take_text(self, rows: Rows) -> list[str | None]:
        """Like `take`, decoded from UTF-8. Raises Corrupt if it is not UTF-8."""
        try:
            return self._take(rows, _decoded)
        except UnicodeDecodeError as error:
            raise Corrupt(f"stored text is not UTF-8: {error.reason}") from error

    def _take(self, rows: Rows, convert: Callable[[memoryview], T]) -> list[T | None]:
        data, bounds = self._data, self._bounds
        values: list[T | None]
        if len(rows) <= _LOOP_ROWS_MAX:
            plain = rows.tolist() if isinstance(rows, np.ndarray) else rows
            values = [convert(data[bounds[row] : bounds[row + 1]]) for row in plain]
        else:
            values = []
            wanted = np.asarray(rows, dtype=np.int64)
            for first in range(0, len(wanted), _STEP_ROWS):
                step = wanted[first : first + _STEP_ROWS]
                starts, ends = self._offsets[step].tolist(), self._offsets[step + 1].tolist()
                values += [convert(data[i:j]) for i, j in zip(starts, ends, strict=True)]
        if self._present is not None and len(rows):
            for i in np.flatnonzero(~self._present[rows]).tolist():
                values[i] = None
        return values

    def equal_rows(self, keys: Sequence[bytes], rows: Rows) -> Bools:
        """bool[m]: whether the string in rows[i] is keys[i]; an absent one equals nothing.

        Cost: about 0.3 µs per row, 0.1 µs of many rows if all strings are as long as their keys.
        """
        if len(keys) > _LOOP_ROWS_MAX and sum(map(len, keys)) <= _GATHER_BYTES_MAX:
            if self._all_equal(keys, np.asarray(rows, dtype=np.int64)):
                return np.ones(len(keys), dtype=np.bool_)
        taken = self.take(rows)
        return np.fromiter(map(eq, taken, keys), dtype=np.bool_, count=len(keys))

    def _all_equal(self, keys: Sequence[bytes], rows: Int64s) -> bool:
        """Compare everything at once: gather the rows' bytes, if the lengths are right."""
        if self._present is not None and not self._present[rows].all():
            return False
        starts = self._offsets[rows].astype(np.int64, copy=False)
        lengths = np.fromiter(map(len, keys), dtype=np.int64, count=len(keys))
        if not np.array_equal(self._offsets[rows + 1] - starts, lengths):
            return False
        ends = np.cumsum(lengths)
        positions = np.repeat(starts - (ends - lengths), lengths)
        positions += np.arange(len(positions))
        return bool(self.data[positions].tobytes() == b"".join(keys))

    def gathered(self, rows: Rows) -> BytesColumn:
        """The strings of these rows, copied next to one another. Cost: 0.3 µs per row and more."""
        wanted = np.asarray(rows, dtype=np.int64)
        starts, ends = self._offsets[wanted], self._offsets[wanted + 1]
        offsets = np.zeros(len(wanted) + 1, dtype=np.int64)
        np.cumsum(ends - starts, out=offsets[1:])
        data, pairs = self._data, zip(starts.tolist(), ends.tolist(), strict=True)
        present = None if self._present is None else self._present[wanted]
        return BytesColumn(offsets, b"".join([data[start:end] for start, end in pairs]), present)

    def contains(self, needle: bytes, check: Check = go_on) -> Bools:
        """bool[n]: rows whose string contains `needle`; the empty needle is in every present one.

        check: called every millisecond or so; may raise. Cost: about 0.3 ms per MiB, one pass.
        """
        if not needle:
            return self.present.copy()
        mask = np.zeros(len(self), dtype=np.bool_)
        self._mark(needle, mask, self._byte_counts, check)
        return mask if self._present is None else mask & self._present

    def contains_rows(self, needle: bytes, rows: Rows, check: Check = go_on) -> Bools:
        """bool[m]: whether each of these rows contains `needle`. Cost: about 0.6 µs per row."""
        mask = np.zeros(len(rows), dtype=np.bool_)
        if len(rows) <= _LOOP_ROWS_MAX:
            return np.array([text is not None and needle in text for text in self.take(rows)], bool)
        for first, last in self._steps(rows):
            step = self.gathered(rows[first:last])
            if needle:
                step._mark(needle, mask[first:last], self._byte_counts, check)
            else:
                mask[first:last] = True
            if step._present is not None:
                mask[first:last] &= step._present
        return mask

    def _steps(self, rows: Rows | None) -> Iterator[tuple[int, int]]:
        """Ranges of `rows` (None: of all rows) that have few rows and, but for one, few bytes."""
        if rows is None:
            ends = self._offsets[1:]
            before = int(self._bounds[0])
        else:
            wanted = np.asarray(rows, dtype=np.int64)
            ends = np.cumsum(self._offsets[wanted + 1] - self._offsets[wanted], dtype=np.int64)
            before = 0
        first = 0
        while first < len(ends):
            last = int(np.searchsorted(ends, before + _STEP_BYTES, side="right"))
            last = max(first + 1, min(last, first + _STEP_ROWS))
            yield first, last
            first, before = last, int(ends[last - 1])

    def _mark(self, needle: bytes, mask: Bools, byte_counts: list[int], check: Check) -> None:
        """Set mask[row] where a row contains `needle`, which is not empty."""
        start, stop = int(self._bounds[0]), int(self._bounds[-1]) - len(needle) + 1
        # One byte may stand in every row many times; a long needle takes as many comparisons.
        if 1 < len(needle) <= _COMPARED_BYTES_MAX:
            self._mark_by_comparing(needle, mask, byte_counts, check)
            return
        for first in range(start, stop, _STEP_BYTES):
            check()
            self._mark_by_find(needle, mask, first, min(first + _STEP_BYTES, stop))

    def _mark_by_find(self, needle: bytes, mask: Bools, start: int, stop: int) -> None:
        """For matches that begin in [start, stop): from row to row, in linear time."""
        bounds, size = self._bounds, len(needle)
        block = bytes(self._data[start : stop + size - 1])
        found = block.find(needle)
        while found >= 0:
            row = bisect_right(bounds, start + found) - 1
            row_end = bounds[row + 1]
            # Where one crosses the row's end, so do all that begin later in the row.
            if start + found + size <= row_end:
                mask[row] = True
            found = block.find(needle, row_end - start)

    def _mark_by_comparing(
        self, needle: bytes, mask: Bools, byte_counts: list[int], check: Check
    ) -> None:
        """Positions where its two rarest bytes stand, then the other bytes, then row bounds.

        Vectorised comparison of two bytes runs at memory speed and without the GIL; `bytes.find`
        needs a copy and the GIL, and a Python step per match.
        """
        data, size = self.data, len(needle)
        rarest = sorted(range(size), key=lambda index: byte_counts[needle[index]])
        first, second, others = rarest[0], rarest[1], rarest[2:]
        stop = int(self._bounds[-1]) - size + 1
        wanted = np.frombuffer(needle, dtype=np.uint8)
        # The `size` bytes from each position on: uint8[positions, size], a view.
        windows = as_strided(data, (max(0, len(data) - size + 1), size), (1, 1), writeable=False)
        hits_buffer = np.empty(_SCAN_BYTES, dtype=np.bool_)
        other_buffer = np.empty(_SCAN_BYTES, dtype=np.bool_)
        for number, start in enumerate(range(int(self._bounds[0]), stop, _SCAN_BYTES)):
            if number % _SCANS_PER_CHECK == 0:
                check()
            count = min(_SCAN_BYTES, stop - start)
            hits, other = hits_buffer[:count], other_buffer[:count]
            np.equal(data[start + first : start + first + count], needle[first], out=hits)
            np.equal(data[start + second : start + second + count], needle[second], out=other)
            hits &= other
            positions = np.flatnonzero(hits)
            if len(positions) * _COMPARED_ONE_IN > count:  # Nothing rare about them here.
                self._mark_by_find(needle, mask, start, start + count)
                continue
            positions += start
            for index in others:
                if len(positions) <= _FEW_POSITIONS:
                    break
                positions = positions[data[positions + index] == needle[index]]
            positions = positions[(windows[positions] == wanted).all(axis=1)]
            if len(positions):
                self._mark_rows(positions, size, mask)

    def _mark_rows(self, positions: Int64s, size: int, mask: Bools) -> None:
        """Mark the rows in which a match of `size` bytes at each position begins and ends."""
        keys = positions.astype(self._offsets.dtype, copy=False)
        rows = np.searchsorted(self._offsets, keys, side="right") - 1
        whole = positions + size <= self._offsets[rows + 1]
        mask[rows[whole]] = True

    @cached_property
    def _byte_counts(self) -> list[int]:
        """How often each byte value stands in a sample of the data."""
        start, end = self._bounds[0], self._bounds[-1]
        sample = self.data[start : min(start + _SAMPLE_BYTES, end)]
        return [int(count) for count in np.bincount(sample, minlength=256)]

    def matches(self, pattern: str, check: Check = go_on) -> Bools:
        """bool[n]: rows that match an RE2 pattern anywhere; the strings must be UTF-8.

        check: called between steps of at most about a MiB; may raise.

        Raises InvalidArgument if RE2 refuses the pattern. Cost: 0.4 ms per MiB and more, without
        the GIL.
        """
        mask = np.zeros(len(self), dtype=np.bool_)
        for first, last in self._steps(None):
            check()
            mask[first:last] = _matches(self._arrow.slice(first, last - first), pattern)
        return mask if self._present is None else mask & self._present

    def matches_rows(self, pattern: str, rows: Rows, check: Check = go_on) -> Bools:
        """bool[m]: whether each of these rows matches. Otherwise as `matches`."""
        wanted = np.asarray(rows, dtype=np.int64)
        mask = np.zeros(len(wanted), dtype=np.bool_)
        for first, last in self._steps(wanted):
            check()
            mask[first:last] = _matches(self._arrow.take(wanted[first:last]), pattern)
        return mask if self._present is None else mask & self._present[wanted]

    @cached_property
    def _arrow(self) -> Any:
        """The strings as an Arrow array; absent ones are whatever lies there."""
        import pyarrow

        # Arrow's kernels trust offsets blindly.
        if not bool(np.all(self._offsets[1:] >= self._offsets[:-1])):
            raise Corrupt("offsets of byte strings are not ascending")
        kind = pyarrow.string() if self._offsets.dtype == np.int32 else pyarrow.large_string()
        buffers = [None, pyarrow.py_buffer(self._bounds), pyarrow.py_buffer(self._data)]
        return pyarrow.Array.from_buffers(kind, len(self), buffers)


def _matches(strings: Any, pattern: str) -> Bools:
    # Imported on first use: most processes never see a pattern, and it costs 31 ms and 9 MB.
    import pyarrow
    import pyarrow.compute

    try:
        matched = pyarrow.compute.match_substring_regex(strings, pattern=pattern)
    except pyarrow.ArrowInvalid as error:
        reason = str(error).removeprefix("Invalid regular expression: ")
        raise InvalidArgument(f"Regex syntax errror: {reason}") from error
    mask: Bools = matched.to_numpy(zero_copy_only=False)
    return mask


def _decoded(view: memoryview) -> str:
    return str(view, "utf-8")


def _as_uint8(data: memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8) if len(data) else np.empty(0, dtype=np.uint8)
