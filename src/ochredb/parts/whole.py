"""Which rows of a damaged part are whole, and what can be told about the others.

Checksums cover blocks of 256 KiB, so a damaged byte takes its block with it: a row is whole if all
of its bytes lie in blocks that pass, or in a section that passes by itself. What an array of the
records says of where strings lie is only believed where it lies in such blocks itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ochredb.errors import Corrupt
from ochredb.parts.records import COLUMNS
from ochredb.types import Bools, Int64s

if TYPE_CHECKING:
    from ochredb.parts.reader import Part

_TOLD_IDS = 5
_OFFSET_BYTES = 8


def whole_rows(part: Part, names: tuple[str, ...] = ("records", "vectors")) -> Bools:
    """bool[n]: rows whose bytes in these sections are what was written.

    Cost: both sections are read whole. Raises NotFound if an object is missing.
    """
    whole = np.ones(len(part), np.bool_)
    if "vectors" in names:
        stored = part.truth("vectors")
        if stored is None:
            whole[:] = False
        else:
            start = part.manifest.sections["vectors"].start
            ends = start + np.arange(len(part) + 1, dtype=np.int64) * (4 * part.dimension)
            whole &= stored.ranges_pass(ends[:-1], ends[1:])
    if "records" in names and whole.any():
        whole &= _whole_records(part)
    return whole


def _whole_records(part: Part) -> Bools:
    none = np.zeros(len(part), np.bool_)
    stored = part.truth("records")
    if stored is None:
        return none
    try:
        batch = part.open_records()
    except Corrupt:
        return none  # Where its columns lie is not known.
    rows = np.arange(len(part), dtype=np.int64)
    seq = batch.column("seq").buffers()[1].address - stored.address
    whole = stored.ranges_pass(seq + rows * 8, seq + (rows + 1) * 8)
    for name in COLUMNS:
        array = batch.column(name)
        if str(array.type) == "null":
            continue
        validity, offsets, data = array.buffers()
        if validity is not None:
            bits = validity.address - stored.address + rows // 8
            whole &= stored.ranges_pass(bits, bits + 1)
        start = offsets.address - stored.address
        whole &= stored.ranges_pass(start + rows * 8, start + (rows + 2) * _OFFSET_BYTES)
        ends = np.frombuffer(offsets, np.int64, len(part) + 1)
        size = 0 if data is None else data.size
        starts, stops = ends[:-1], ends[1:]
        whole &= (starts >= 0) & (starts <= stops) & (stops <= size)
        if size:
            first = data.address - stored.address
            places = np.flatnonzero(whole)
            whole[places] = stored.ranges_pass(first + starts[places], first + stops[places])
    return whole


def told(part: Part, names: tuple[str, ...]) -> tuple[str, Bools]:
    """Words for the rows that are damaged in these sections, and bool[n] of those that are not."""
    whole = whole_rows(part, names)
    lost = np.flatnonzero(~whole)
    if not len(lost):
        return "no record", whole
    text = f"{len(lost)} of {len(part)} records (rows {lost[0]} to {lost[-1]} of the part)"
    known = ids_of(part, lost[:_TOLD_IDS])
    if known:
        more = ", …" if len(lost) > len(known) else ""
        text += f", ids {', '.join(map(repr, known))}{more}"
    return text, whole


def ids_of(part: Part, rows: Int64s) -> list[str]:
    """The ids of these rows, as far as they can be read; of others nothing."""
    try:
        batch = part.open_records()
        stored = part.truth("records")
    except Corrupt:
        return []
    if stored is None or not len(rows):
        return []
    _, offsets, data = batch.column("id").buffers()
    start = offsets.address - stored.address
    rows = rows[stored.ranges_pass(start + rows * 8, start + (rows + 2) * _OFFSET_BYTES)]
    ends = np.frombuffer(offsets, np.int64, len(part) + 1)
    first = 0 if data is None else data.address - stored.address
    rows = rows[stored.ranges_pass(first + ends[rows], first + ends[rows + 1])]
    text = bytes(data) if data is not None and len(data) < 1 << 20 else memoryview(data or b"")
    return [
        bytes(text[ends[row] : ends[row + 1]]).decode(errors="replace") for row in rows.tolist()
    ]
