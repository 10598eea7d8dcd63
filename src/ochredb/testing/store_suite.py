"""What every object store must do. Subclass, give the `store` fixture, inherit the tests:

class TestMyStore(StoreSuite):
    @pytest.fixture
    def store(self) -> ObjectStore:
        return MyStore(...)

`MappableStoreSuite` adds the tests of `map` and `path`.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ochredb.errors import AlreadyExists, InvalidArgument, NotFound
from ochredb.storage.base import KEY_BYTES_MAX, KEY_PART_BYTES_MAX, LocalStore, ObjectStore

if TYPE_CHECKING:
    from ochredb.storage.base import Piece

BAD_KEYS = (
    "", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/..", "a/../b", "./a", "a/./b", "a b", "a\\b",
    "a\0", "ä", "a\n", "a:b", "a*", "tmp", "tmp/a", "x" * (KEY_PART_BYTES_MAX + 1),
    "/".join(["x" * 100] * 11),
)  # fmt: skip
GOOD_KEYS = (
    "a", "a.b", ".a", "a..b", "...", "-", "_", "A/b/C/d", "tmp.", "tmpx/a", "a/tmp", "a/.b",
    "x" * KEY_PART_BYTES_MAX, "/".join(["x" * 99] * (KEY_BYTES_MAX // 100)),
)  # fmt: skip


class StoreSuite:
    """The behaviour of `ObjectStore`, through its methods alone."""

    @pytest.fixture
    def store(self) -> ObjectStore:
        """An empty store."""
        raise NotImplementedError("a subclass gives the store")

    def test_an_object_is_read_back(self, store: ObjectStore) -> None:
        store.create("parts/1/records.arrow", b"hello")
        assert store.get("parts/1/records.arrow") == b"hello"

    def test_several_buffers_make_one_object(self, store: ObjectStore) -> None:
        numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
        pieces: list[Piece] = [b"head", numbers, b"", bytearray(b"-"), numbers[:0]]
        pieces.append(memoryview(b"xtailx")[1:5])
        store.create("a/b", pieces)
        store.create("a/c", tuple(pieces))
        assert store.get("a/b") == b"head" + numbers.tobytes() + b"-tail" == store.get("a/c")

    def test_very_many_buffers_make_one_object(self, store: ObjectStore) -> None:
        store.create("many", [bytes([i % 251]) * (i % 5) for i in range(5000)])
        assert store.get("many") == b"".join(bytes([i % 251]) * (i % 5) for i in range(5000))

    def test_a_buffer_is_copied(self, store: ObjectStore) -> None:
        buffer = bytearray(b"before")
        store.create("a", buffer)
        buffer[:] = b"after!"
        assert store.get("a") == b"before"

    @pytest.mark.parametrize("data", [b"", [], [b"", b""]])
    def test_an_empty_object(self, store: ObjectStore, data: bytes | list[bytes]) -> None:
        store.create("empty", data)
        assert store.get("empty") == b""
        assert store.get_range("empty", 0, 0) == b""
        assert [(o.key, o.size) for o in store.list("")] == [("empty", 0)]
        with pytest.raises(AlreadyExists):
            store.create("empty", b"x")

    def test_a_big_object(self, store: ObjectStore) -> None:
        block = os.urandom(1 << 20)
        store.create("big", [block] * 9)
        assert store.get("big") == block * 9
        assert store.get_range("big", (1 << 20) - 3, (1 << 20) + 3) == block[-3:] + block[:3]
        assert [o.size for o in store.list("big")] == [9 << 20]

    def test_a_second_create_changes_nothing(self, store: ObjectStore) -> None:
        store.create("a/b", b"first")
        for second in (b"second", b"first", b""):
            with pytest.raises(AlreadyExists):
                store.create("a/b", second)
        assert store.get("a/b") == b"first"
        assert [o.key for o in store.list("")] == ["a/b"]

    def test_of_racing_creators_one_wins(self, store: ObjectStore) -> None:
        for round_number in range(20):
            key = f"race/{round_number}/object"
            contents = [bytes([i]) * (1000 + i) for i in range(6)]

            def attempt(key: str, content: bytes) -> bool:
                try:
                    store.create(key, content)
                except AlreadyExists:
                    return False
                return True

            won = _together([partial(attempt, key, content) for content in contents])
            assert won.count(True) == 1
            assert store.get(key) == contents[won.index(True)]

    def test_racing_creators_of_neighbours_all_win(self, store: ObjectStore) -> None:
        """New folders appear, and empty ones go, under the hands of several writers."""

        def work(writer: int) -> bool:
            for i in range(25):
                key = f"shared/folder/{writer}-{i}"
                store.create(key, key.encode())
                assert store.get(key) == key.encode()
                store.delete(key)
            return True

        assert _together([partial(work, writer) for writer in range(4)]) == [True] * 4
        assert list(store.list("")) == []

    def test_ranges(self, store: ObjectStore) -> None:
        store.create("digits", b"0123456789")
        for start, stop in itertools.combinations_with_replacement(range(11), 2):
            assert store.get_range("digits", start, stop) == b"0123456789"[start:stop]

    @pytest.mark.parametrize(
        ("start", "stop"), [(0, 11), (10, 11), (11, 11), (5, 4), (-1, 3), (-3, -1)]
    )
    def test_ranges_outside_the_object(self, store: ObjectStore, start: int, stop: int) -> None:
        store.create("digits", b"0123456789")
        with pytest.raises(ValueError, match="range"):
            store.get_range("digits", start, stop)

    def test_an_absent_object(self, store: ObjectStore) -> None:
        store.create("folder/object", b"x")
        for key in ("absent", "folder", "folder/absent", "absent/absent", "folder/object.x"):
            with pytest.raises(NotFound):
                store.get(key)
            with pytest.raises(NotFound):
                store.get_range(key, 0, 0)

    def test_delete_is_idempotent(self, store: ObjectStore) -> None:
        store.create("a/b/c", b"x")
        store.create("a/b/d", b"y")
        for _ in range(2):
            store.delete("a/b/c")
        store.delete("a/absent/c")
        with pytest.raises(NotFound):
            store.get("a/b/c")
        assert store.get("a/b/d") == b"y"
        assert [o.key for o in store.list("")] == ["a/b/d"]

    def test_a_deleted_key_is_free(self, store: ObjectStore) -> None:
        for content in (b"1", b"2", b"3"):
            store.create("a/b/c", content)
            assert store.get("a/b/c") == content
            store.delete("a/b/c")

    def test_list_is_in_byte_order(self, store: ObjectStore) -> None:
        # The slash (0x2f) lies between the dot (0x2e) and the digits: folders must not go first.
        keys = ["a", "a-b", "a.b", "a0", "A", "b/c", "b-c", "b.c", "b0", "b/c0/d", "b/c-d", "b/B/d"]
        for index, key in enumerate(keys):
            store.create(key, b"x" * index)
        expected = sorted((key, index) for index, key in enumerate(keys))
        assert [(o.key, o.size) for o in store.list("")] == expected

    def test_list_by_prefix_and_after(self, store: ObjectStore) -> None:
        keys = ["a/1/x", "a/1/y", "a/10/x", "a/2/x", "a-1/x", "a.x", "ab", "b/1", "b/1.x", "c"]
        for key in keys:
            store.create(key, key.encode())
        everything = ["", "a", "a/", "a/1", "a/1/", "a/1/x", "a/10", "a-", "b/1", "c", "c/", "d"]
        for prefix in everything:
            for after in (*everything, *keys, "a/1/xx", "zzz"):
                listed = [o.key for o in store.list(prefix, after=after)]
                wanted = sorted(key for key in keys if key.startswith(prefix) and key > after)
                assert listed == wanted, (prefix, after)

    @pytest.mark.parametrize(
        "prefix", ["/", "../", "..", "a/../", "a//", "tmp/", "\0", "a\0/", "ä/"]
    )
    def test_a_prefix_of_no_key_lists_nothing(self, store: ObjectStore, prefix: str) -> None:
        store.create("a/b", b"x")
        assert list(store.list(prefix)) == []

    def test_list_may_be_abandoned_and_survives_deletes(self, store: ObjectStore) -> None:
        for i in range(20):
            store.create(f"a/{i:02}/x", b"x")
        listing = store.list("a/")
        seen = [next(listing).key]
        for i in range(5, 10):
            store.delete(f"a/{i:02}/x")
        seen += [o.key for o in listing]
        untouched = [f"a/{i:02}/x" for i in range(20) if not 5 <= i < 10]
        assert set(untouched) <= set(seen)
        assert seen == sorted(set(seen))
        assert next(store.list("a/")).key == "a/00/x"

    def test_modification_times_are_recent(self, store: ObjectStore) -> None:
        """Microseconds since the epoch: later than 2020, and not before an older object's."""
        store.create("a", b"x")
        store.create("b", b"x")
        first, second = store.list("")
        assert 1_577_836_800_000_000 < first.modified_us <= second.modified_us

    @pytest.mark.parametrize("key", BAD_KEYS, ids=repr)
    def test_bad_keys_are_refused(self, store: ObjectStore, key: str) -> None:
        for call in (
            lambda: store.create(key, b"x"),
            lambda: store.get(key),
            lambda: store.get_range(key, 0, 0),
            lambda: store.delete(key),
        ):
            with pytest.raises(InvalidArgument):
                call()
        assert list(store.list("")) == []

    @pytest.mark.parametrize("key", GOOD_KEYS)
    def test_good_keys_are_taken(self, store: ObjectStore, key: str) -> None:
        store.create(key, b"x")
        assert store.get(key) == b"x"
        assert [o.key for o in store.list("")] == [key]

    def test_what_is_no_buffer_is_refused(self, store: ObjectStore) -> None:
        column = np.zeros((4, 4), dtype=np.float32)[:, 1]
        for data in ("text", 7, None, [b"x", "text"], column):
            with pytest.raises((TypeError, BufferError, ValueError)):
                store.create("a", data)  # type: ignore[arg-type]
        assert list(store.list("")) == []


class MappableStoreSuite(StoreSuite):
    """The same, and the behaviour of `Mappable`."""

    @pytest.fixture
    def store(self) -> LocalStore:
        raise NotImplementedError("a subclass gives the store")

    def test_map_is_the_whole_object_read_only(self, store: LocalStore) -> None:
        numbers = np.arange(1000, dtype=np.float32)
        store.create("a/b", numbers)
        view = store.map("a/b")
        assert (view.readonly, view.ndim, view.format, view.nbytes) == (True, 1, "B", 4000)
        np.testing.assert_array_equal(np.frombuffer(view, dtype=np.float32), numbers)

    def test_map_survives_delete(self, store: LocalStore) -> None:
        content = os.urandom(3 << 20)
        store.create("a/b", content)
        array = np.frombuffer(store.map("a/b"), dtype=np.uint8)
        store.delete("a/b")
        store.create("a/b", b"another")
        assert array.tobytes() == content
        assert bytes(store.map("a/b")) == b"another"

    def test_map_of_an_empty_object(self, store: LocalStore) -> None:
        store.create("a", b"")
        assert bytes(store.map("a")) == b""

    def test_map_of_an_absent_object(self, store: LocalStore) -> None:
        store.create("folder/object", b"x")
        for key in ("absent", "folder", "folder/absent"):
            with pytest.raises(NotFound):
                store.map(key)
        with pytest.raises(InvalidArgument):
            store.map("../x")

    def test_scratch_is_what_was_written(self, store: LocalStore) -> None:
        """One piece at a time, whose memory may be used again for the next."""
        buffer = bytearray(1 << 16)

        def pieces() -> Iterator[Piece]:
            for number in range(100):
                buffer[:] = bytes([number]) * len(buffer)
                yield buffer
            yield b""
            yield np.arange(3, dtype=np.int64)

        view = store.scratch(pieces())
        expected = b"".join(bytes([number]) * (1 << 16) for number in range(100))
        expected += np.arange(3, dtype=np.int64).tobytes()
        assert (view.readonly, view.ndim, view.format) == (True, 1, "B")
        assert bytes(view) == expected
        store.forget_pages(view)
        store.create("a", view)
        assert store.get("a") == bytes(view) == expected
        assert bytes(store.scratch([])) == b""

    def test_scratch_has_no_name(self, store: LocalStore) -> None:
        view = store.scratch([b"x"])
        assert list(store.list("")) == []
        path = store.path("probe")
        if path is not None:
            root = os.path.dirname(path)
            assert [name for _, _, names in os.walk(root) for name in names] == []
        assert bytes(view) == b"x"

    def test_scratch_may_be_given_up(self, store: LocalStore) -> None:
        class Stop(Exception):
            pass

        def pieces() -> Iterator[Piece]:
            yield b"x" * 100_000
            raise Stop

        with pytest.raises(Stop):
            store.scratch(pieces())

    def test_path_names_the_file(self, store: LocalStore) -> None:
        store.create("a/b", b"content")
        path = store.path("a/b")
        if path is not None:
            with open(path, "rb") as file:
                assert file.read() == b"content"
        with pytest.raises(InvalidArgument):
            store.path("../x")


def _together(calls: list[Callable[[], bool]]) -> list[bool]:
    """Run the calls at the same moment, each in a thread; returns what they return."""
    barrier = threading.Barrier(len(calls))
    results: list[bool | None] = [None] * len(calls)

    def run(index: int) -> None:
        barrier.wait()
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in results, "a thread failed"
    return [result is True for result in results]
