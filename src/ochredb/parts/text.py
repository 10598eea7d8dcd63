"""The text index: which rows may hold a byte string. It only prunes; the documents decide.

Every document is the set of its byte trigrams, each hashed to one of 65,536 buckets ("grams").
Bytes, not characters: a substring of UTF-8 is a substring of its bytes, and one CJK character is
already a trigram. Rows are indexed in blocks of 65,536, so a posting is a uint16. A gram that more
than one row in twenty of a block holds is dropped: it prunes little and would be most of the index.
Format: the page `text-index` in docs/formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
from ochredb.types import Bools

FORMAT = 1
GRAM_BYTES = 3

BLOCK_ROWS = 1 << 16
_GRAMS = 1 << 16
_FREQUENT_ONE_IN = 20
# Above this share of candidates, searching all documents in one pass is quicker.
_CANDIDATES_ONE_IN = 5
_RAREST = 4

_STEP_ROWS = 256  # Row numbers within a step fit a byte.
_STEP_BYTES = 1 << 20
_SAMPLE_ROWS = 2_048
_SAMPLE_STEPS = 8

Grams = NDArray[np.uint16]
Postings = NDArray[np.uint16]
Rows32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Block:
    """The postings of up to 65,536 rows.

    grams: uint16[g], ascending; gram i is in the rows postings[offsets[i]:offsets[i+1]], ascending.
    frequent: uint16[f], ascending: grams without postings because too many rows have them.
    """

    row_count: int
    grams: Grams
    offsets: NDArray[np.uint32]
    postings: Postings
    frequent: Grams

    def candidates(self, needle_grams: Grams) -> Postings | None:
        """Rows that have all of the rarest grams of a needle, ascending; None: cannot tell."""
        useful = needle_grams[~_is_in(self.frequent, needle_grams)]
        if not len(useful):
            return None
        if not len(self.grams):
            return self.postings[:0]
        places = np.minimum(np.searchsorted(self.grams, useful), len(self.grams) - 1)
        if not bool(np.all(self.grams[places] == useful)):
            return self.postings[:0]  # No row has this gram.
        counts = self.offsets[places + 1] - self.offsets[places]
        rarest = places[np.argsort(counts, kind="stable")[:_RAREST]].tolist()
        rows = self._rows_of(rarest[0])
        for place in rarest[1:]:
            if not len(rows):
                break
            has = np.zeros(BLOCK_ROWS, dtype=np.bool_)
            has[self._rows_of(place)] = True
            rows = rows[has[rows]]
        return rows

    def _rows_of(self, place: int) -> Postings:
        return self.postings[int(self.offsets[place]) : int(self.offsets[place + 1])]


class TextIndex:
    """Candidate rows for a substring, over n documents."""

    def __init__(self, row_count: int, blocks: list[Block]) -> None:
        assert len(blocks) == -(-row_count // BLOCK_ROWS)
        self._row_count, self._blocks = row_count, blocks

    @classmethod
    def build(cls, documents: BytesColumn) -> TextIndex:
        """Cost: about 8 µs for a document of 700 bytes; memory for one block of rows at a time."""
        starts = range(0, len(documents), BLOCK_ROWS)
        return cls(len(documents), [_build_block(documents, start) for start in starts])

    def __len__(self) -> int:
        return self._row_count

    def candidates(self, needle: bytes) -> Rows32 | None:
        """int32[m], ascending: no other row's document contains `needle`.

        None if the index does not help: the needle is shorter than 3 bytes or common, or more than
        a fifth of the rows are candidates. Cost: about 0.05 ms per block.
        """
        if len(needle) < GRAM_BYTES:
            return None
        grams = np.unique(_grams(np.frombuffer(needle, dtype=np.uint8)))
        found: list[Rows32] = []
        total = 0
        for number, block in enumerate(self._blocks):
            rows = block.candidates(grams)
            first_row = number * BLOCK_ROWS
            if rows is None:
                found.append(np.arange(first_row, first_row + block.row_count, dtype=np.int32))
            else:
                found.append(rows.astype(np.int32) + np.int32(first_row))
            total += len(found[-1])
            if total * _CANDIDATES_ONE_IN > self._row_count:
                return None
        return np.concatenate(found) if found else np.empty(0, dtype=np.int32)

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of postings and their directory."""
        return sum(
            block.grams.nbytes + block.offsets.nbytes + block.postings.nbytes
            for block in self._blocks
        )

    def sections(self, name: str = "text") -> dict[str, Section]:
        """The index as sections of a part, for `open`."""
        arrays = ArrayWriter()
        blocks = [
            {
                "count": block.row_count,
                "grams": arrays.add(block.grams),
                "offsets": arrays.add(block.offsets),
                "postings": arrays.add(block.postings),
                "frequent": arrays.add(block.frequent),
            }
            for block in self._blocks
        ]
        directory = {"format": FORMAT, "count": self._row_count, "blocks": blocks}
        return {f"{name}/directory": write_directory(directory), f"{name}/arrays": arrays.data()}

    @classmethod
    def open(cls, section: SectionSource, name: str = "text") -> TextIndex:
        """Read back what `sections` gave, without copying. Raises Corrupt."""
        directory = read_directory(section, f"{name}/directory", FORMAT)
        row_count = directory_count(directory, "count", name)
        arrays = ArrayReader(section(f"{name}/arrays"), name)
        entries = directory.get("blocks")
        if not isinstance(entries, list) or len(entries) != -(-row_count // BLOCK_ROWS):
            raise Corrupt(f"{name}: wrong number of blocks for {row_count} rows")
        blocks = []
        for number, entry in enumerate(entries):
            block = _open_block(entry, arrays, name)
            if block.row_count != min(BLOCK_ROWS, row_count - number * BLOCK_ROWS):
                raise Corrupt(f"{name}: block {number} has {block.row_count} rows")
            blocks.append(block)
        return cls(row_count, blocks)


def _open_block(entry: Any, arrays: ArrayReader, name: str) -> Block:
    if not isinstance(entry, dict):
        raise Corrupt(f"{name}: bad block: {entry!r}")
    arrays.check(entry.get("grams"), "<u2")
    arrays.check(entry.get("offsets"), "<u4", count=entry["grams"][2] + 1)
    arrays.check(entry.get("postings"), "<u2")
    arrays.check(entry.get("frequent"), "<u2")
    row_count = directory_count(entry, "count", name)
    block = Block(
        row_count,
        *(arrays.get(entry[field]) for field in ("grams", "offsets", "postings", "frequent")),
    )
    # Offsets out of order only make slices empty, but rows must exist: they index the documents.
    if int(block.offsets[-1]) != len(block.postings):
        raise Corrupt(f"{name}: the offsets do not end where the postings do")
    if len(block.postings) and int(block.postings.max()) >= row_count:
        raise Corrupt(f"{name}: a posting names a row that does not exist")
    return block


def _is_in(sorted_grams: Grams, grams: Grams) -> Bools:
    """bool[len(grams)]: which of `grams` are among `sorted_grams`."""
    if not len(sorted_grams):
        return np.zeros(len(grams), dtype=np.bool_)
    places = np.minimum(np.searchsorted(sorted_grams, grams), len(sorted_grams) - 1)
    found: Bools = sorted_grams[places] == grams
    return found


def _grams(data: NDArray[np.uint8]) -> Grams:
    """uint16[len - 2]: the bucket of the trigram at each position.

    The bucket is the upper half of the trigram, as a little-endian number, times an odd constant.
    """
    if len(data) < GRAM_BYTES:
        return np.empty(0, dtype=np.uint16)
    count = len(data) - GRAM_BYTES + 1
    words = data[2:].astype(np.uint32)
    words <<= np.uint32(8)
    words |= data[1 : count + 1]
    words <<= np.uint32(8)
    words |= data[:count]
    words *= np.uint32(0x9E3779B1)
    words >>= np.uint32(16)
    return words.astype(np.uint16)


def _build_block(documents: BytesColumn, first_row: int) -> Block:
    """Index one block: drop what a sample shows to be frequent, sort step by step, then join."""
    row_count = min(BLOCK_ROWS, len(documents) - first_row)
    limit = max(1, row_count // _FREQUENT_ONE_IN)
    dropped = _surely_frequent(documents, first_row, row_count)
    counts = np.zeros(_GRAMS, dtype=np.int64)
    steps: list[tuple[int, Grams, NDArray[np.uint8]]] = []
    for row, grams, members in _steps(documents, first_row, row_count, dropped):
        counts += np.bincount(grams, minlength=_GRAMS)
        steps.append((row - first_row, grams, members))
    kept = (counts > 0) & (counts <= limit) & ~dropped
    frequent = np.flatnonzero((counts > limit) | dropped).astype(np.uint16)
    kept_grams = np.flatnonzero(kept).astype(np.uint16)
    offsets = np.zeros(len(kept_grams) + 1, dtype=np.uint32)
    np.cumsum(counts[kept], out=offsets[1:])
    # Where the next posting of each gram goes.
    cursors = np.zeros(_GRAMS, dtype=np.int64)
    cursors[kept] = offsets[:-1]
    postings = np.empty(int(offsets[-1]), dtype=np.uint16)
    for base, step_grams, members in steps:
        keep = kept[step_grams]
        step_grams, members = step_grams[keep], members[keep]
        step_counts = np.bincount(step_grams, minlength=_GRAMS)
        ends = np.cumsum(step_counts)
        # Item i of a step, the k-th of its gram, goes to the gram's cursor + k.
        shift = cursors - (ends - step_counts)
        places = shift[step_grams]
        places += np.arange(len(step_grams))
        postings[places] = members.astype(np.uint16) + np.uint16(base)
        cursors += step_counts
    return Block(row_count, kept_grams, offsets, postings, frequent)


def _surely_frequent(documents: BytesColumn, first_row: int, row_count: int) -> Bools:
    """bool[grams]: held by at least a tenth of a sample of the rows.

    Leaving those out early saves most of the sorting and memory; a gram dropped by bad luck costs
    pruning, never an answer. Few rows: none.
    """
    counts = np.zeros(_GRAMS, dtype=np.int64)
    if row_count < 2 * _SAMPLE_ROWS:
        return counts > 0
    seen_rows = 0
    nothing = np.zeros(_GRAMS, dtype=np.bool_)
    stride = row_count // _SAMPLE_STEPS
    for start in range(first_row, first_row + stride * _SAMPLE_STEPS, stride):
        for _, grams, _ in _steps(documents, start, _SAMPLE_ROWS // _SAMPLE_STEPS, nothing):
            counts += np.bincount(grams, minlength=_GRAMS)
        seen_rows += _SAMPLE_ROWS // _SAMPLE_STEPS
    return counts * (_FREQUENT_ONE_IN // 2) > seen_rows


def _steps(
    documents: BytesColumn, first_row: int, row_count: int, dropped: Bools
) -> Iterator[tuple[int, Grams, NDArray[np.uint8]]]:
    """Distinct (gram, row) pairs of the rows, step by step, ordered by gram, then row.

    Yields the step's first row, the grams, and the row of each relative to it.
    """
    data, offsets = documents.data, documents.offsets
    keep = ~dropped
    row, end = first_row, first_row + row_count
    while row < end:
        start = int(offsets[row])
        stop_row = min(row + _STEP_ROWS, end)
        if int(offsets[stop_row]) - start > _STEP_BYTES:
            fitting = int(np.searchsorted(offsets[row : stop_row + 1], start + _STEP_BYTES)) - 1
            stop_row = row + max(1, fitting)
        stop = int(offsets[stop_row])
        if stop_row == row + 1:
            grams = np.flatnonzero(_grams_of_one(data[start:stop]) & keep).astype(np.uint16)
            yield row, grams, np.zeros(len(grams), dtype=np.uint8)
        else:
            lengths = np.diff(offsets[row : stop_row + 1])
            yield row, *_pairs(data[start:stop], lengths, keep)
        row = stop_row


def _pairs(
    data: NDArray[np.uint8], lengths: NDArray[Any], keep: Bools
) -> tuple[Grams, NDArray[np.uint8]]:
    """Distinct (gram, member) pairs of up to 256 joined documents, ordered.

    The one or two trigrams that begin in a document and end in the next are left in: they add
    candidates, and taking them out would cost more.
    """
    grams = _grams(data)
    members = np.repeat(np.arange(len(lengths), dtype=np.uint8), lengths)[: len(grams)]
    wanted = keep[grams]
    grams, members = grams[wanted], members[wanted]
    order = np.argsort(grams, kind="stable")  # 16 bits: a radix sort.
    grams, members = grams[order], members[order]
    if len(grams):
        distinct = np.empty(len(grams), dtype=np.bool_)
        distinct[0] = True
        np.not_equal(grams[1:], grams[:-1], out=distinct[1:])
        distinct[1:] |= members[1:] != members[:-1]
        grams, members = grams[distinct], members[distinct]
    return grams, members


def _grams_of_one(data: NDArray[np.uint8]) -> Bools:
    """bool[grams]: those of one document, of any length, in bounded memory."""
    has = np.zeros(_GRAMS, dtype=np.bool_)
    for start in range(0, len(data), _STEP_BYTES):
        has[_grams(data[start : start + _STEP_BYTES + GRAM_BYTES - 1])] = True
    return has
