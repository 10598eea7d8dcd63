"""What a cache keeps on the local disk: bounded, of one process, found again after a kill."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ochredb.clock import SystemClock
from ochredb.crash_points import VARIABLE
from ochredb.errors import InvalidArgument, Unavailable
from ochredb.ids import IdSource
from ochredb.storage.cached import CachedStore
from ochredb.storage.directory import DirectoryStore
from tests.crash.faults.support import fill, small_disk
from tests.unit.far_store import MB, FarStore, cached, kept_bytes, leftovers


@pytest.fixture
def far() -> FarStore:
    return FarStore()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def test_the_bound_is_kept(far: FarStore, folder: str) -> None:
    rng = random.Random(5)
    sizes = {f"{number}": rng.randrange(0, 400_000) for number in range(40)}
    sizes["larger-than-all"] = 3 * MB
    for key, size in sizes.items():
        far.create(key, key.encode()[:1] * size)
    store = cached(far, folder, bytes_max=2 * MB)
    views: list[tuple[str, memoryview]] = []
    for _ in range(600):
        key = rng.choice(list(sizes))
        view = store.map(key)
        views.append((key, view))
        if len(views) > rng.randrange(1, 30):
            views.pop(rng.randrange(len(views)))
        assert kept_bytes(folder) == store.used_bytes <= 2 * MB
        for known, mapped in views:
            assert mapped.nbytes == sizes[known]
            assert not mapped or mapped[0] == mapped[-1] == ord(known[0])
    assert store.counters.evictions > 50
    assert store.counters.uncached > 0
    assert leftovers(folder) == []


def test_idle_copies_go_before_mapped_ones_and_those_stay_readable(
    far: FarStore, folder: str
) -> None:
    for key in "abcd":
        far.create(key, key.encode() * MB)
    store = cached(far, folder, bytes_max=2 * MB)
    a = store.map("a")
    store.map("b")
    gc.collect()
    c = store.map("c")  # "b" goes, though it was used later than "a".
    d = store.map("d")  # "a" loses its name.
    assert kept_bytes(folder) == 2 * MB
    assert (bytes(a[-1:]), bytes(c[-1:]), bytes(d[-1:])) == (b"a", b"c", b"d")
    far.downloads.clear()
    assert bytes(store.map("a")[:1]) == b"a"  # What somebody has mapped need not be fetched.
    assert far.downloads == []
    store.map("b")
    assert far.downloads == ["b"]


def test_bound_and_content_with_many_threads(far: FarStore, folder: str) -> None:
    contents = {f"{number}": os.urandom(150_000 + number) for number in range(30)}
    for key, content in contents.items():
        far.create(key, content)
    store = cached(far, folder, bytes_max=MB)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(120):
            key = rng.choice(list(contents))
            assert bytes(store.map(key)) == contents[key]
            assert store.get_range(key, 7, 99) == contents[key][7:99]
            assert store.used_bytes <= MB

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, seed) for seed in range(6)]:
            done.result()
    assert kept_bytes(folder) == store.used_bytes
    assert leftovers(folder) == []


def test_a_directory_belongs_to_one_process(far: FarStore, folder: str) -> None:
    first = cached(far, folder)
    with pytest.raises(Unavailable, match="another process uses the cache directory"):
        cached(far, folder)
    first.close()
    first.close()
    cached(far, folder).close()


def test_a_directory_that_cannot_be_used(far: FarStore, tmp_path: Path) -> None:
    """Waiting would not help."""
    (tmp_path / "file").write_bytes(b"")
    for folder in ("file", "file/below"):
        with pytest.raises(InvalidArgument, match="a file is in its place"):
            cached(far, str(tmp_path / folder))
    with pytest.raises(InvalidArgument, match="byte"):
        cached(far, str(tmp_path / "cache"), bytes_max=0)


def test_foreign_files_are_left_alone(far: FarStore, folder: str) -> None:
    os.makedirs(f"{folder}/objects/folder")
    Path(folder, "objects", "somebody-elses").write_bytes(b"x")
    Path(folder, "notes").write_bytes(b"x")
    far.create("a", b"content")
    store = cached(far, folder, bytes_max=7)
    store.map("a")
    assert store.used_bytes == 7
    store.close()
    assert Path(folder, "objects", "somebody-elses").exists()
    assert Path(folder, "notes").exists()


def test_a_full_disk_evicts_and_then_serves_from_memory(far: FarStore, tmp_path: Path) -> None:
    contents = {key: os.urandom(3 * MB) for key in "abcdef"}
    for key, content in contents.items():
        far.create(key, content)
    with small_disk(tmp_path / "disk", "8m") as disk:
        store = cached(far, str(disk / "cache"), bytes_max=100 * MB)
        for key, content in contents.items():
            assert bytes(store.map(key)) == content
            gc.collect()
        assert store.counters.evictions == 4  # Two fit.
        held = [store.map(key) for key in "ef"]
        for key in "abcd":  # Mapped files keep their space.
            assert bytes(store.map(key)) == contents[key]
        assert [bytes(view) for view in held] == [contents["e"], contents["f"]]
        fill(disk / "ballast")
        for key, content in contents.items():
            assert bytes(store.map(key)) == content
        store.create("parts/x", b"x" * MB)
        assert bytes(store.map("parts/x")) == b"x" * MB
        with pytest.raises(Unavailable):
            store.scratch([bytes(MB)])
        assert store.counters.uncached > 0
        assert leftovers(str(disk / "cache")) == []
        held.clear()
        gc.collect()
        (disk / "ballast").unlink()
        for _ in range(2):
            assert bytes(store.map("a")) == contents["a"]
            gc.collect()
        assert kept_bytes(str(disk / "cache")) == store.used_bytes > 0
        store.close()


def test_scratch_takes_the_room_of_copies(far: FarStore, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        store = cached(far, str(disk / "cache"), bytes_max=100 * MB)
        for key in "abc":
            far.create(key, bytes(2 * MB))
            store.map(key)
        gc.collect()
        pieces = [bytes([number]) * 700_000 for number in range(8)]
        view = store.scratch(iter(pieces))
        assert bytes(view) == b"".join(pieces)
        assert store.counters.evictions >= 2
        del view
        store.close()


_WORKER = """
import sys
from ochredb.clock import SystemClock
from ochredb.ids import IdSource
from ochredb.storage.cached import CachedStore
from ochredb.storage.directory import DirectoryStore
store = CachedStore(DirectoryStore(sys.argv[1]), sys.argv[2], 250_000, SystemClock(), IdSource())
for key in "abcabc":
    store.map(key)
store.create("parts/d", bytes(100_000))
"""


@pytest.mark.parametrize("point", ["cache.written", "cache.renamed", "cache.removed"])
@pytest.mark.parametrize("hit", [1, 2, 4])
def test_a_cache_whose_process_was_killed(tmp_path: Path, point: str, hit: int) -> None:
    below, folder = str(tmp_path / "store"), str(tmp_path / "cache")
    inner = DirectoryStore(below)
    contents = {key: os.urandom(100_000) for key in "abc"}
    for key, content in contents.items():
        inner.create(key, content)
    ended = subprocess.run(
        [sys.executable, "-c", _WORKER, below, folder],
        env={**os.environ, VARIABLE: f"{point}:{hit}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    store = CachedStore(inner, folder, 250_000, SystemClock(), IdSource())
    assert leftovers(folder) == []
    assert kept_bytes(folder) == store.used_bytes <= 250_000
    for key, content in contents.items():
        assert bytes(store.map(key)) == content
    assert store.counters.damaged == 0
    store.close()
