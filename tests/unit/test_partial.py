"""Large objects far away: only the blocks that are read are fetched, each once, and verified."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ochredb.checksum import BLOCK_BYTES, block_checksums, xxh3
from ochredb.errors import Corrupt, NotFound, StorageFull, Unavailable
from ochredb.parts.manifest import ObjectInfo
from ochredb.parts.verified import VerifiedObject
from ochredb.storage import cached as cached_store
from ochredb.storage.cached import CachedStore
from ochredb.storage.partial import PartialObject

from .far_store import MB, FarStore, cached, kept_files, leftovers

_BLOCKS = 40
_SIZE = _BLOCKS * BLOCK_BYTES - 1_000  # Of data.


@pytest.fixture
def far() -> FarStore:
    return FarStore()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def store(far: FarStore, folder: str) -> Iterator[CachedStore]:
    store = cached(far, folder)
    yield store
    store.close()


def made(far: FarStore, key: str = "parts/1/records") -> tuple[bytes, ObjectInfo]:
    """An object as parts have them: data, then the table of its blocks' checksums."""
    data = np.random.default_rng(len(key)).bytes(_SIZE)
    table = block_checksums(data, BLOCK_BYTES).tobytes()
    far.create(key, data + table)
    return data, ObjectInfo(key, len(data) + len(table), xxh3(table))


def blocks(far: FarStore) -> list[int]:
    """Numbers of the blocks that were fetched, in that order."""
    return [
        block
        for _, start, stop in far.ranges
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
    ]


def test_what_is_read_is_fetched_and_nothing_else(far: FarStore, store: CachedStore) -> None:
    data, info = made(far)
    opened = VerifiedObject(store, info)
    assert blocks(far) == [_BLOCKS - 1], "the table"
    start, stop = 3 * BLOCK_BYTES - 10, 4 * BLOCK_BYTES + 10
    assert bytes(opened.verify(start, stop)) == data[start:stop]
    assert blocks(far)[1:] == [2, 3, 4]
    assert len(far.ranges) == 2, "neighbours come together"
    starts = np.array([5, 9 * BLOCK_BYTES, 9 * BLOCK_BYTES + 7, 20 * BLOCK_BYTES], np.int64)
    opened.verify_ranges(starts, starts + 3)
    for place in starts.tolist():
        assert bytes(opened.view[place : place + 3]) == data[place : place + 3]
    assert blocks(far)[4:] == [0, 9, 20], "and no other beside them"
    opened.verify_ranges(starts, starts + 3)
    assert len(blocks(far)) == 7, "each once"
    assert far.downloads == []
    assert store.counters.fetched_bytes < 8 * BLOCK_BYTES


def test_when_all_is_there_it_is_a_copy(far: FarStore, store: CachedStore, folder: str) -> None:
    data, info = made(far)
    opened = VerifiedObject(store, info)
    opened.verify(0, BLOCK_BYTES)
    assert store.used_bytes == info.size, "its place is taken from the beginning"
    assert kept_files(folder) == []
    assert bytes(opened.verify(0, _SIZE)) == data
    assert sorted(blocks(far)) == list(range(_BLOCKS))
    assert len(kept_files(folder)) == 1
    assert leftovers(folder) == []
    assert bytes(store.map(info.key)[:_SIZE]) == data
    assert store.map_partly(info.key, info.size) is None
    del opened
    gc.collect()
    assert store.used_bytes == info.size
    store.close()
    later = cached(far, folder)
    assert bytes(VerifiedObject(later, info).verify(0, 99)) == data[:99]
    assert far.downloads == []
    assert len(blocks(far)) == _BLOCKS, "a restart finds it"
    later.close()


def test_what_is_not_complete_goes_with_its_readers(
    far: FarStore, store: CachedStore, folder: str
) -> None:
    data, info = made(far)
    opened = VerifiedObject(store, info)
    view = opened.verify(7, 99)
    del opened
    gc.collect()
    assert store.used_bytes == 0
    assert leftovers(folder) == []
    assert bytes(view) == data[7:99]


def test_readers_share_what_is_fetched(far: FarStore, store: CachedStore) -> None:
    data, info = made(far)
    one, two = VerifiedObject(store, info), VerifiedObject(store, info)
    one.verify(0, BLOCK_BYTES)
    two.verify(0, BLOCK_BYTES)
    far.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(each.verify, 0, 8 * BLOCK_BYTES) for each in (one, two) * 4]
        far.gate.set()
        assert all(bytes(read.result()) == data[: 8 * BLOCK_BYTES] for read in reads)
    assert sorted(blocks(far)) == [*range(8), _BLOCKS - 1]


def test_random_reads_by_many_threads(far: FarStore, store: CachedStore, folder: str) -> None:
    data, info = made(far)
    opened = VerifiedObject(store, info)

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            start, stop = sorted(rng.integers(0, _SIZE, 2).tolist())
            stop = min(stop, start + 2 * BLOCK_BYTES)
            assert bytes(opened.verify(start, stop)) == data[start:stop]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert sorted(set(blocks(far))) == sorted(blocks(far)), "no block came twice"
    assert bytes(opened.verify(0, _SIZE)) == data
    assert len(kept_files(folder)) == 1


def test_a_block_that_did_not_come_is_asked_for_again(far: FarStore, store: CachedStore) -> None:
    data, info = made(far)
    opened = VerifiedObject(store, info)
    far.fail_times = 1
    with pytest.raises(Unavailable):
        opened.verify(0, 3 * BLOCK_BYTES)
    assert bytes(opened.verify(0, 3 * BLOCK_BYTES)) == data[: 3 * BLOCK_BYTES]


def test_a_block_that_came_wrong_is_fetched_again_whole(far: FarStore, store: CachedStore) -> None:
    data, info = made(far)
    opened = VerifiedObject(store, info)
    far.wrong_times = 1
    assert bytes(opened.verify(0, 300)) == data[:300]
    assert far.downloads == [info.key]
    assert bytes(opened.verify(0, _SIZE)) == data
    assert len(blocks(far)) == 2, "from then on all of it is there"


def test_damage_in_the_store_is_never_served(far: FarStore, store: CachedStore) -> None:
    data, info = made(far)
    damaged = bytearray(far.get(info.key))
    damaged[5 * BLOCK_BYTES + 5] ^= 1
    far.delete(info.key)
    far.create(info.key, bytes(damaged))
    opened = VerifiedObject(store, info)
    assert bytes(opened.verify(0, 99)) == data[:99]
    with pytest.raises(Corrupt, match="block 5 "):
        opened.verify(5 * BLOCK_BYTES, 5 * BLOCK_BYTES + 1)
    assert np.flatnonzero(opened.wrong_blocks()).tolist() == [5]
    assert bytes(opened.verify(6 * BLOCK_BYTES, _SIZE)) == data[6 * BLOCK_BYTES :]


def test_an_object_that_is_gone_or_of_another_size(far: FarStore, store: CachedStore) -> None:
    _, info = made(far)
    with pytest.raises(Corrupt, match="instead of"):
        VerifiedObject(store, ObjectInfo(info.key, info.size + 8, info.checksum))
    opened = VerifiedObject(store, info)
    opened.verify(0, 10)
    store.delete(info.key)
    opened.verify(0, 10)
    with pytest.raises(NotFound):
        opened.verify(0, _SIZE)
    with pytest.raises(NotFound):
        VerifiedObject(store, info)


def test_one_that_was_deleted_while_it_was_fetched_is_not_kept(
    far: FarStore, store: CachedStore, folder: str
) -> None:
    data, info = made(far)
    opened = VerifiedObject(store, info)
    opened.verify(0, _SIZE - 3 * BLOCK_BYTES)
    content = far.get(info.key)
    store.delete(info.key)
    far.create(info.key, content)  # As if the last block had been on its way.
    assert bytes(opened.verify(0, _SIZE)) == data
    assert kept_files(folder) == []
    del opened
    gc.collect()
    assert store.used_bytes == 0


def test_what_is_here_or_small_or_has_no_place_is_mapped_whole(
    far: FarStore, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, info = made(far)
    store = cached(far, folder, bytes_max=9 * MB)
    assert store.map_partly(info.key, info.size) is None, "no place in the bound"
    assert bytes(VerifiedObject(store, info).verify(0, 9)) == data[:9]
    store.close()
    store = cached(far, folder)
    assert store.map_partly("parts/2/records", 1 * MB) is None
    store.map(info.key)
    assert store.map_partly(info.key, info.size) is None

    def full(_descriptor: int, _size: int) -> None:
        raise OSError(28, "No space left on device")

    _, other = made(far, "parts/3/vectors")
    monkeypatch.setattr("ochredb.storage.partial._allocate", full)
    used = store.used_bytes
    assert store.map_partly(other.key, other.size) is None
    assert store.used_bytes == used
    assert leftovers(folder) == []
    store.close()


def test_a_disk_that_fails_while_a_block_is_written(
    far: FarStore, store: CachedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, info = made(far)
    opened = VerifiedObject(store, info)

    def full(_descriptor: int, _view: memoryview, _place: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ochredb.storage.files.write_at", full)
        with pytest.raises(StorageFull):
            opened.verify(0, 10)
    assert bytes(opened.verify(0, 10)) == data[:10]


def test_partial_objects_keep_no_descriptor(far: FarStore, store: CachedStore) -> None:
    """There may be more of them than a process may have files open."""
    before = len(os.listdir("/proc/self/fd"))
    held: list[PartialObject] = []
    for number in range(5):
        _, info = made(far, f"parts/{number}/records")
        partial = store.map_partly(info.key, info.size)
        assert partial is not None
        partial.fetch([(0, 10)])
        held.append(partial)
    assert len(os.listdir("/proc/self/fd")) == before
    assert info.size > cached_store._PARTLY_BYTES_MIN


def test_what_is_much_used_is_soon_complete(
    far: FarStore, store: CachedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ochredb.storage.partial._FETCHES_ALONE", 3)
    monkeypatch.setattr("ochredb.storage.partial._BLOCKS_MORE", 5)
    data, info = made(far)
    opened = VerifiedObject(store, info)
    for block in (7, 8):
        opened.verify(block * BLOCK_BYTES, block * BLOCK_BYTES + 1)
    assert blocks(far) == [_BLOCKS - 1, 7, 8]
    opened.verify(20 * BLOCK_BYTES, 20 * BLOCK_BYTES + 1)
    assert sorted(blocks(far)[3:]) == [0, 1, 2, 3, 4, 20]
    opened.verify(0, 1)
    assert len(blocks(far)) == 9, "what is there is not fetched, and brings no more"
    opened.bring()
    assert sorted(blocks(far)) == list(range(_BLOCKS))
    assert bytes(opened.verify(0, _SIZE)) == data
