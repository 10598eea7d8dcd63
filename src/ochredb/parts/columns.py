"""A column of byte strings over borrowed memory: documents, ids, dictionaries.

`BytesColumn` is n byte strings in one data buffer, delimited by n+1 offsets (Arrow's layout, so a
memory-mapped Arrow column is one without a copy). Strings may be absent (None). Searching happens
in numpy or RE2, which release the GIL; nothing here holds it longer than about a millisecond.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ochredb.errors import Corrupt, InvalidArgument
from ochredb.types import Bools, Int64s

T = TypeVar("T")
Rows = Sequence[int] | NDArray[np.integer[Any]]

# Bytes searched per step: the temporaries stay in the level 2 cache.
_SCAN_BYTES = 1 << 17
# Rows converted to Python objects per C call.
_STEP_ROWS = 4_096
# Below this many rows a plain loop beats numpy's fixed costs.
_LOOP_ROWS_MAX = 64
_SAMPLE_BYTES = 1 << 16


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

    def contains(self, needle: bytes) -> Bools:
        """bool[n]: rows whose string contains `needle`; the empty needle is in every present one.

        Cost: about 0.3 ms per MiB of data, one pass.
        """
        if not needle:
            return self.present.copy()
        mask = np.zeros(len(self), dtype=np.bool_)
        if len(needle) == 1:
            self._mark_byte(needle, mask)
        else:
            self._mark_string(needle, mask)
        return mask if self._present is None else mask & self._present

    def _mark_byte(self, needle: bytes, mask: Bools) -> None:
        """One byte may stand in every row many times: go from row to row by memchr."""
        bounds = self._bounds
        position, end = bounds[0], bounds[-1]
        while position < end:
            base = position
            block = bytes(self._data[base : min(base + (1 << 20), end)])
            position = base + len(block)
            found = block.find(needle)
            while found >= 0:
                row = bisect_right(bounds, base + found) - 1
                mask[row] = True
                next_start = bounds[row + 1]
                if next_start >= position:
                    position = next_start
                    break
                found = block.find(needle, next_start - base)

    def _mark_string(self, needle: bytes, mask: Bools) -> None:
        """Positions where its two rarest bytes stand, then the other bytes, then row bounds.

        Vectorised comparison of two bytes runs at memory speed and without the GIL; `bytes.find`
        needs a copy and the GIL, and a Python step per match.
        """
        data, size = self.data, len(needle)
        rarest = sorted(range(size), key=lambda index: self._byte_counts[needle[index]])
        first, second, others = rarest[0], rarest[1], rarest[2:]
        stop = self._bounds[-1] - size + 1
        hits_buffer = np.empty(_SCAN_BYTES, dtype=np.bool_)
        other_buffer = np.empty(_SCAN_BYTES, dtype=np.bool_)
        for start in range(self._bounds[0], stop, _SCAN_BYTES):
            count = min(_SCAN_BYTES, stop - start)
            hits, other = hits_buffer[:count], other_buffer[:count]
            np.equal(data[start + first : start + first + count], needle[first], out=hits)
            np.equal(data[start + second : start + second + count], needle[second], out=other)
            hits &= other
            positions = np.flatnonzero(hits)
            positions += start
            for index in others:
                if not len(positions):
                    break
                positions = positions[data[positions + index] == needle[index]]
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

    def contains_rows(self, needle: bytes, rows: Rows) -> Bools:
        """bool[m]: whether each of these rows contains `needle`. Cost: about 0.7 µs per row."""
        mask = np.empty(len(rows), dtype=np.bool_)
        for first in range(0, len(rows), _STEP_ROWS):
            step = self.take(rows[first : first + _STEP_ROWS])
            mask[first : first + len(step)] = [
                value is not None and needle in value for value in step
            ]
        return mask

    def matches(self, pattern: str) -> Bools:
        """bool[n]: rows that match an RE2 pattern anywhere; the strings must be UTF-8.

        Raises InvalidArgument if RE2 refuses the pattern. Cost: 0.4 ms per MiB and more, without
        the GIL.
        """
        mask = _matches(self._arrow, pattern)
        return mask if self._present is None else mask & self._present

    def matches_rows(self, pattern: str, rows: Rows) -> Bools:
        """bool[m]: whether each of these rows matches. Raises as `matches`."""
        wanted = np.asarray(rows, dtype=np.int64)
        mask = _matches(self._arrow.take(wanted), pattern)
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
