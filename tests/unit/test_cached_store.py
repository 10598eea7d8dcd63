"""The cache of an object store: what it serves is what was stored."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ochredb.cancel import Cancel, Cancelled
from ochredb.checksum import block_checksums, xxh3
from ochredb.errors import Corrupt, NotFound, Unavailable
from ochredb.ids import IdSource
from ochredb.parts.manifest import ObjectInfo
from ochredb.parts.verified import VerifiedObject
from ochredb.storage.base import LocalStore
from ochredb.storage.cached import CachedStore
from ochredb.storage.memory import MemoryStore
from ochredb.testing.store_suite import MappableStoreSuite
from tests.unit.far_store import MB, FarStore, cached, kept_bytes, kept_files, leftovers
from tests.unit.kernel import ManualClock


@pytest.fixture
def far() -> FarStore:
    return FarStore()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


class TestOverMemory(MappableStoreSuite):
    @pytest.fixture
    def store(self, folder: str) -> Iterator[LocalStore]:
        store = cached(MemoryStore(), folder)
        yield store
        store.close()


class TestOverDownloads(MappableStoreSuite):
    @pytest.fixture
    def store(self, far: FarStore, folder: str) -> Iterator[LocalStore]:
        store = cached(far, folder)
        yield store
        store.close()


class TestWithoutRoom(MappableStoreSuite):
    """Nothing is ever kept."""

    @pytest.fixture
    def store(self, far: FarStore, folder: str) -> Iterator[LocalStore]:
        store = cached(far, folder, bytes_max=1)
        yield store
        store.close()


def test_what_was_mapped_is_not_fetched_again(far: FarStore, folder: str) -> None:
    far.create("a", b"content")
    store = cached(far, folder)
    for _ in range(3):
        assert bytes(store.map("a")) == b"content"
        gc.collect()
        assert store.get("a") == b"content"
        assert store.get_range("a", 1, 3) == b"on"
    assert far.downloads == ["a"]
    counters = store.counters
    assert (counters.misses, counters.hits, counters.fetched_bytes) == (1, 8, 7)
    assert store.used_bytes == 7 == kept_bytes(folder)


def test_a_read_that_is_not_cached_is_not_kept(far: FarStore, folder: str) -> None:
    far.create("a", b"content")
    store = cached(far, folder)
    assert (store.get("a"), store.get_range("a", 0, 2)) == (b"content", b"co")
    with pytest.raises(ValueError, match="range"):
        store.get_range("a", 0, 8)
    assert store.used_bytes == 0
    assert kept_files(folder) == []


def test_what_a_part_is_written_of_is_kept(far: FarStore, folder: str) -> None:
    store = cached(far, folder, bytes_max=MB)
    store.create("parts/1/records", [b"abc", np.arange(4, dtype=np.int32)])
    store.create("fragments/1", b"abc")
    store.create("parts/2/records", bytes(2 * MB))
    expected = b"abc" + np.arange(4, dtype=np.int32).tobytes()
    assert bytes(store.map("parts/1/records")) == expected == far.get("parts/1/records")
    assert far.downloads == []
    assert store.used_bytes == len(expected) == kept_bytes(folder)
    assert leftovers(folder) == []


def test_one_fetch_for_all_who_ask_at_once(far: FarStore, folder: str) -> None:
    far.create("a", os.urandom(3 * MB))
    store = cached(far, folder)
    far.gate.clear()
    with ThreadPoolExecutor(12) as pool:
        views = [pool.submit(store.map, "a") for _ in range(12)]
        time.sleep(0.2)
        far.gate.set()
        assert {xxh3(view.result()) for view in views} == {xxh3(far.get("a"))}
    assert far.downloads == ["a"]


def test_a_fetch_that_fails_fails_for_all_and_the_next_one_tries_again(
    far: FarStore, folder: str
) -> None:
    far.create("a", b"content")
    store = cached(far, folder)
    far.gate.clear()
    far.fail_times = 1
    with ThreadPoolExecutor(4) as pool:
        views = [pool.submit(store.map, "a") for _ in range(4)]
        time.sleep(0.2)
        far.gate.set()
        for view in views:
            with pytest.raises(Unavailable, match="network"):
                view.result()
    assert bytes(store.map("a")) == b"content"
    with pytest.raises(NotFound):
        store.map("absent")
    assert leftovers(folder) == []
    assert store.used_bytes == 7


def test_wrong_bytes_of_a_transfer_are_fetched_again(far: FarStore, folder: str) -> None:
    far.create("a", b"content")
    far.wrong_times = 1
    store = cached(far, folder)
    assert bytes(store.map("a")) == b"content"
    assert far.downloads == ["a", "a"]
    assert store.used_bytes == 7 == kept_bytes(folder)


def test_what_is_wrong_in_the_store_is_shown_and_not_kept(far: FarStore, folder: str) -> None:
    far.create("a", b"content")
    far.wrong_times = 2
    store = cached(far, folder)
    assert bytes(store.map("a")) == b"bontent"
    assert kept_files(folder) == []
    gc.collect()
    assert bytes(store.map("a")) == b"content"


def test_a_restart_finds_the_copies_and_their_order(far: FarStore, folder: str) -> None:
    for key in "abcd":
        far.create(key, key.encode() * MB)
    store = cached(far, folder, bytes_max=4 * MB)
    for number, key in enumerate("abcd"):
        store.map(key)
        os.utime(
            max(kept_files(folder), key=lambda p: os.stat(p).st_mtime_ns), (1000 + number,) * 2
        )
    Path(folder, "tmp", "what-a-dead-process-left").write_bytes(b"x")
    store.close()
    far.downloads.clear()
    again = cached(far, folder, bytes_max=3 * MB)  # The oldest does not fit any more.
    assert again.used_bytes == 3 * MB == kept_bytes(folder)
    assert leftovers(folder) == []
    for key in "dcb":
        assert again.map(key)[:1] == key.encode()
    assert far.downloads == []
    gc.collect()
    again.map("a")  # Now "d" is what was used least recently.
    assert far.downloads == ["a"]
    gc.collect()
    again.map("c")
    again.map("b")
    assert far.downloads == ["a"]
    again.map("d")
    assert far.downloads == ["a", "d"]


@pytest.mark.parametrize("kind", ["byte", "cut", "longer", "empty", "gone"])
def test_a_copy_damaged_while_nobody_ran_is_fetched_again(
    far: FarStore, folder: str, kind: str
) -> None:
    content = os.urandom(700_000)
    far.create("a", content)
    store = cached(far, folder)
    store.map("a")
    store.close()
    gc.collect()
    (path,) = kept_files(folder)
    if kind == "gone":
        os.unlink(path)
    else:
        with open(path, "r+b") as file:
            if kind == "byte":
                file.seek(500_000)
                file.write(bytes([content[500_000] ^ 4]))
            else:
                file.truncate({"cut": 400_000, "longer": 800_000, "empty": 0}[kind])
    again = cached(far, folder)
    assert bytes(again.map("a")) == content
    assert again.counters.damaged == (kind != "gone")
    assert len(far.downloads) == 2
    assert again.used_bytes == len(content) == kept_bytes(folder)


def test_a_copy_that_goes_while_the_cache_is_open_is_fetched_again(
    far: FarStore, folder: str
) -> None:
    far.create("a", b"content")
    store = cached(far, folder)
    store.map("a")
    gc.collect()
    os.unlink(kept_files(folder)[0])
    assert bytes(store.map("a")) == b"content"
    assert store.used_bytes == 7 == kept_bytes(folder)


def with_table(far: MemoryStore, key: str, content: bytes) -> ObjectInfo:
    """An object that ends with the checksums of its blocks, as those of parts do."""
    table = block_checksums(content).tobytes()
    far.create(key, [content, table])
    return ObjectInfo(key, len(content) + len(table), xxh3(table))


@pytest.mark.parametrize("place", [10, 300_000, 999_999, 1_000_003])
@pytest.mark.parametrize("evicted", [False, True])
def test_a_mapped_copy_that_rots_is_mended_under_its_readers(
    far: FarStore, folder: str, place: int, evicted: bool
) -> None:
    content = os.urandom(1_000_000)
    info = with_table(far, "a", content)
    store = cached(far, folder)
    view = store.map("a")
    cut = view[place - 5 : place + 5]  # Somebody looks there already.
    (path,) = kept_files(folder)
    with open(path, "r+b") as file:
        if evicted:
            os.unlink(path)
        file.seek(place)
        file.write(bytes([view[place] ^ 255]))
    assert cut != memoryview(far.get("a"))[place - 5 : place + 5]
    stored = VerifiedObject(store, info)
    assert bytes(stored.verify(0, len(content))) == content
    assert bytes(view) == bytes(stored.view) == far.get("a")
    assert bytes(cut) == far.get("a")[place - 5 : place + 5]
    assert (store.counters.damaged, len(far.downloads)) == (1, 2)
    assert store.used_bytes == info.size == kept_bytes(folder)
    store.close()
    del view, cut, stored
    gc.collect()
    assert bytes(cached(far, folder).map("a")) == far.get("a")
    assert len(far.downloads) == 2


def test_damage_in_the_store_itself_is_told_by_block(far: MemoryStore, folder: str) -> None:
    content = bytearray(os.urandom(1_000_000))
    info = with_table(far, "a", bytes(content))
    whole = far.get("a")
    far.delete("a")
    far.create("a", whole[:600_000] + bytes([whole[600_000] ^ 1]) + whole[600_001:])
    stored = VerifiedObject(cached(far, folder), info)
    assert bytes(stored.verify(0, 500_000)) == whole[:500_000]
    for _ in range(3):
        with pytest.raises(Corrupt, match="block 2 of a "):
            stored.verify(500_000, 700_000)
    assert bytes(stored.verify(800_000, 900_000)) == whole[800_000:900_000]


def test_an_object_that_is_deleted_while_it_is_fetched_is_not_kept(
    far: FarStore, folder: str
) -> None:
    far.create("a", b"first")
    store = cached(far, folder)
    far.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        view = pool.submit(store.map, "a")
        while not far.downloads:
            time.sleep(0.01)
        store.delete("a")
        store.create("a", b"another")
        far.gate.set()
        assert bytes(view.result()) == b"first"
    assert bytes(store.map("a")) == b"another"
    assert store.used_bytes == 7 == kept_bytes(folder)


def test_what_is_kept_ahead_takes_no_room_from_what_is_used(far: FarStore, folder: str) -> None:
    clock = ManualClock()
    store = CachedStore(far, folder, 10 * MB, clock, IdSource(clock))
    for name in ("mapped", "used", "old"):
        far.create(name, os.urandom(3 * MB))
    far.create("ahead", os.urandom(3 * MB))
    far.create("huge", bytes(11 * MB))
    view = store.map("mapped")
    store.map("old")
    clock.advance(800)
    store.map("used")
    gc.collect()
    assert not store.keep("ahead", 3 * MB, Cancel()), "all were used a short time ago"
    assert not store.keep("huge", 11 * MB, Cancel())
    assert far.downloads == ["mapped", "old", "used"]
    clock.advance(200)
    assert store.keep("ahead", 3 * MB, Cancel())
    assert store.keep("ahead", 3 * MB, Cancel())
    assert far.downloads == ["mapped", "old", "used", "ahead"]
    assert store.counters.evictions == 1
    for name in ("mapped", "used", "ahead"):
        assert bytes(store.map(name)) == far.get(name)
    assert far.downloads == ["mapped", "old", "used", "ahead"]
    assert store.used_bytes == 9 * MB == kept_bytes(folder)
    assert len(view) == 3 * MB


def test_a_large_object_that_is_kept_ahead_comes_in_pieces_shared_with_reads(
    far: FarStore, folder: str
) -> None:
    far.create("large", os.urandom(10 * MB))
    store = cached(far, folder)
    read = store.map_partly("large", 10 * MB)
    assert read is not None
    read.fetch([(5 * MB, 5 * MB + 1)])
    assert store.keep("large", 10 * MB, Cancel())
    assert far.downloads == []
    assert max(stop - start for _, start, stop in far.ranges) <= 4 * MB
    assert sum(stop - start for _, start, stop in far.ranges) == 10 * MB, "nothing came twice"
    assert bytes(store.map("large")) == far.get("large")
    assert bytes(read.view) == far.get("large")
    with pytest.raises(NotFound):
        store.keep("absent", 0, Cancel())


def test_keeping_ahead_can_be_broken_off(far: FarStore, folder: str) -> None:
    far.create("large", os.urandom(20 * MB))
    store = cached(far, folder)
    cancel = Cancel()
    far.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        keeping = pool.submit(store.keep, "large", 20 * MB, cancel)
        while not far.ranges:
            time.sleep(0.001)
        cancel.cancel()
        far.gate.set()
        with pytest.raises(Cancelled):
            keeping.result()
    assert len(far.ranges) == 1, "no further piece was asked for"
    del keeping
    gc.collect()
    assert store.used_bytes == 0
