"""Records are verified by block, as they are read; nothing of a damaged block is ever served."""

from __future__ import annotations

import numpy as np
import pytest

from ochredb.checksum import BLOCK_BYTES, block_checksums, xxh3
from ochredb.errors import Corrupt
from ochredb.parts.manifest import Manifest, ObjectInfo
from ochredb.parts.reader import Part
from ochredb.parts.verified import VerifiedObject
from ochredb.parts.writer import PartRows
from ochredb.storage.memory import MemoryStore

from .test_parts import SETTINGS, _rows, _write

ROWS, DOCUMENT_BYTES = 600, 6_000


def make() -> tuple[MemoryStore, Manifest, PartRows]:
    store, rows = MemoryStore(), _rows(ROWS, 4, text_bytes=DOCUMENT_BYTES)
    return store, _write(store, rows), rows


def damaged(store: MemoryStore, manifest: Manifest, key: str, at: int) -> Part:
    copy = MemoryStore()
    for item in manifest.objects:
        content = bytearray(store.get(item.key))
        if item.key == key:
            content[at] ^= 1
        copy.create(item.key, content)
    return Part(copy, manifest, SETTINGS)


def served(part: Part, rows: list[int]) -> list[object]:
    chosen = np.array(rows)
    return [
        part.take_ids(chosen),
        part.take_documents(chosen),
        part.take_uris(chosen),
        part.take_metadatas(chosen),
        part.seqs[chosen].tolist(),
    ]


def test_only_the_blocks_that_are_read_are_verified() -> None:
    store, manifest, _ = make()
    part = Part(store, manifest, SETTINGS)
    place = manifest.sections["records"]
    assert place.stop - place.start > 8 * BLOCK_BYTES
    part.take_documents(np.array([300]))
    first = part.verified_bytes
    assert 0 < first <= 5 * BLOCK_BYTES
    part.take_documents(np.array([300]))
    assert part.verified_bytes <= first + BLOCK_BYTES
    assert part.has_open(("record_batch",))
    _ = part.documents
    assert part.verified_bytes >= place.stop - place.start - 2 * BLOCK_BYTES


def test_reading_here_and_there_completes_an_object() -> None:
    store, manifest, rows = make()
    part = Part(store, manifest, SETTINGS)
    part.take_documents(np.array([0]))
    stored = part._object(manifest.sections["records"].object)
    assert not stored.is_complete
    for _ in range(stored.data_bytes // BLOCK_BYTES + 1):
        assert part.take_documents(np.array([7])) == [rows.documents[7].as_py()]
    assert stored.is_complete
    assert stored.verified_bytes == stored.data_bytes


def test_a_flipped_bit_anywhere_is_never_served() -> None:
    """Whatever rows are read, the answer is right or Corrupt names the object."""
    store, manifest, _ = make()
    place = manifest.sections["records"]
    key = manifest.objects[place.object].key
    whole = Part(store, manifest, SETTINGS)
    rng = np.random.default_rng(3)
    size = place.stop - place.start
    positions = [*range(0, size, BLOCK_BYTES // 2), size - 1, size - 100, 8, 300, 2_000]
    refused = 0
    for position in positions:
        part = damaged(store, manifest, key, place.start + position)
        for chosen in ([3], sorted(rng.choice(ROWS, 5).tolist()), list(range(ROWS))):
            answer, error = None, None
            try:
                answer = served(part, chosen)
            except Corrupt as caught:
                error = caught
            refused += error is not None
            assert key in str(error) if error else answer == served(whole, chosen)
        with pytest.raises(Corrupt, match=key):
            _ = part.record_batch
    assert refused >= len(positions)


def make_object(data: bytes) -> tuple[MemoryStore, ObjectInfo]:
    store = MemoryStore()
    table = block_checksums(data).tobytes()
    store.create("key", data + table)
    return store, ObjectInfo(
        key="key", size=len(data) + len(table), checksum=xxh3(table), has_table=True
    )


def test_ranges_over_blocks_and_empty_ranges() -> None:
    data = np.random.default_rng(1).bytes(5 * BLOCK_BYTES + 77)
    store, info = make_object(data)
    stored = VerifiedObject(store, info)
    at = np.array([2 * BLOCK_BYTES - 1, 9, len(data)], np.int64)
    stored.verify_ranges(at, at + np.array([2, 0, 0]))
    # Blocks 1 and 2 were read; block 0 came along.
    assert stored.verified_bytes == 3 * BLOCK_BYTES
    stored.verify_ranges(np.array([BLOCK_BYTES]), np.array([5 * BLOCK_BYTES + 1]))
    assert stored.is_complete
    assert bytes(stored.verify(0, len(data))) == data
    for start, stop in ((-1, 3), (0, len(data) + 1)):
        with pytest.raises(Corrupt, match="outside"):
            VerifiedObject(store, info).verify_ranges(np.array([start]), np.array([stop]))


def test_a_range_in_the_middle_of_several_blocks_is_not_left_out() -> None:
    """The ends were checked before; what lies between was not."""
    data = bytearray(np.random.default_rng(2).bytes(6 * BLOCK_BYTES))
    store, info = make_object(bytes(data))
    content = bytearray(store.get("key"))
    content[3 * BLOCK_BYTES + 5] ^= 1
    broken = MemoryStore()
    broken.create("key", content)
    stored = VerifiedObject(broken, info)
    stored.verify(BLOCK_BYTES, BLOCK_BYTES + 1)
    stored.verify(5 * BLOCK_BYTES, 5 * BLOCK_BYTES + 1)
    with pytest.raises(Corrupt, match="block 3 of key"):
        stored.verify_ranges(np.array([BLOCK_BYTES]), np.array([5 * BLOCK_BYTES + 1]))


def test_a_damaged_block_is_no_concern_of_who_does_not_read_it() -> None:
    """It may hold a part's indexes, which are done without."""
    data = np.random.default_rng(1).bytes(5 * BLOCK_BYTES)
    store, info = make_object(data)
    content = bytearray(store.get("key"))
    for block in (1, 4):
        content[block * BLOCK_BYTES + 9] ^= 1
    damaged_store = MemoryStore()
    damaged_store.create("key", bytes(content))
    stored = VerifiedObject(damaged_store, info)
    at = np.array([0], np.int64)
    for _ in range(8):
        stored.verify_ranges(at, at + 5)
    assert stored.verified_bytes == 3 * BLOCK_BYTES
    assert not stored.is_complete
    for block in (1, 4):
        with pytest.raises(Corrupt, match=f"block {block} of key"):
            stored.verify_ranges(at + block * BLOCK_BYTES, at + block * BLOCK_BYTES + 1)
