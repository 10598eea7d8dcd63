"""Checking objects while they pass by, in whatever chunks they come."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochredb.backup.checks import BitmapCheck, BlocksCheck, Check, RangesCheck, WholeCheck
from ochredb.checksum import BLOCK_BYTES, block_checksums, signed, xxh3
from ochredb.parts import deleted
from ochredb.parts.manifest import ObjectInfo


def _feed(check: Check, content: bytes, chunk_bytes: int) -> str | None:
    for start in range(0, len(content), chunk_bytes):
        check.update(content[start : start + chunk_bytes])
    return check.problem()


def _flipped(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 0x40
    return bytes(changed)


@pytest.mark.parametrize("blocks_per_chunk", [1, 2, 16])
@pytest.mark.parametrize(
    "data_bytes",
    [
        *(1, BLOCK_BYTES - 8, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1),
        *(2 * BLOCK_BYTES - 16, 2 * BLOCK_BYTES - 4, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES - 20),
    ],
)
def test_an_object_with_a_table(data_bytes: int, blocks_per_chunk: int) -> None:
    """Also where the table lies across the end of a chunk."""
    data = random.Random(data_bytes).randbytes(data_bytes)
    table = block_checksums(data).tobytes()
    content = data + table
    info = ObjectInfo("parts/x/packed", len(content), xxh3(table))
    chunk_bytes = blocks_per_chunk * BLOCK_BYTES
    assert _feed(BlocksCheck(info), content, chunk_bytes) is None
    for position in {0, data_bytes // 2, data_bytes - 1}:
        problem = _feed(BlocksCheck(info), _flipped(content, position), chunk_bytes)
        assert problem == f"block {position // BLOCK_BYTES} fails its checksum"
    for position in {data_bytes, len(content) - 1}:
        problem = _feed(BlocksCheck(info), _flipped(content, position), chunk_bytes)
        assert problem == "its checksum table is damaged"
    assert _feed(BlocksCheck(info), content[:-1], chunk_bytes) is not None
    assert _feed(BlocksCheck(info), b"", chunk_bytes) is not None


@settings(deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=8),
    chunk_bytes=st.integers(1, 100),
    position=st.integers(0, 1_000),
    seed=st.integers(0, 1_000),
)
def test_fragments_in_an_object_with_gaps(
    lengths: list[tuple[int, int]], chunk_bytes: int, position: int, seed: int
) -> None:
    content, ranges = b"", []
    for gap, length in lengths:
        content += random.Random(seed).randbytes(gap)
        payload = random.Random(len(content)).randbytes(length)
        ranges.append((len(content), len(content) + length, signed(xxh3(payload))))
        content += payload
    assert _feed(RangesCheck(ranges), content, chunk_bytes) is None
    position %= len(content)
    hit = [start for start, stop, _ in ranges if start <= position < stop]
    expected = f"the fragment at byte {hit[0]} fails its checksum" if hit else None
    assert _feed(RangesCheck(ranges), _flipped(content, position), chunk_bytes) == expected
    assert _feed(RangesCheck(ranges), content[:-1], chunk_bytes) is not None


def test_whole_objects_and_bitmaps() -> None:
    content = random.Random(1).randbytes(1_000)
    assert _feed(WholeCheck(xxh3(content)), content, 300) is None
    assert _feed(WholeCheck(xxh3(content)), _flipped(content, 999), 300) == "fails its checksum"
    bitmap = deleted.encode(np.array([1, 5, 70_000]))
    assert _feed(BitmapCheck(70_001), bitmap, 10) is None
    for check, data in (
        (BitmapCheck(70_000), bitmap),
        (BitmapCheck(70_001), _flipped(bitmap, len(bitmap) - 1)),
        (BitmapCheck(70_001), bitmap[:10]),
    ):
        assert _feed(check, data, 10) is not None
