"""The stores against their suite, and what is particular to each of them."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import random
import resource
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import NoReturn

import pytest

from ochredb.clock import SystemClock
from ochredb.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from ochredb.storage import files
from ochredb.storage.base import LocalStore
from ochredb.storage.directory import DirectoryStore
from ochredb.storage.memory import MemoryStore
from ochredb.testing.faults import Fault, FaultRates, FaultyStore, SlowStore
from ochredb.testing.store_suite import MappableStoreSuite


def refuse_link(source: str, target: str) -> NoReturn:
    """In place of os.link: a file system without hard links."""
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)


class TestMemoryStore(MappableStoreSuite):
    @pytest.fixture
    def store(self) -> LocalStore:
        return MemoryStore()


class TestDirectoryStore(MappableStoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return DirectoryStore(str(tmp_path / "not" / "there" / "yet"))


class TestDirectoryStoreWithoutHardLinks(MappableStoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
        if not sys.platform.startswith("linux"):
            pytest.skip("renameat2 is Linux's")
        monkeypatch.setattr(os, "link", refuse_link)
        return DirectoryStore(str(tmp_path / "store"))


class TestFaultyStoreWithoutFaults(MappableStoreSuite):
    @pytest.fixture
    def store(self) -> LocalStore:
        return FaultyStore(MemoryStore(), random.Random(0), FaultRates())


@pytest.fixture
def directory(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(str(tmp_path / "store"))


def everything_below(path: str) -> list[str]:
    """Files and empty folders below `path`, relative to it."""
    found = []
    for folder, folders, names in os.walk(path):
        found += [os.path.relpath(os.path.join(folder, name), path) for name in names]
        if not folders and not names:
            found.append(os.path.relpath(folder, path) + "/")
    return sorted(found)


def test_a_create_leaves_one_file_and_a_delete_none(directory: DirectoryStore) -> None:
    directory.create("parts/1/records", b"x")
    assert everything_below(directory.root) == ["parts/1/records", "tmp/"]
    with pytest.raises(AlreadyExists):
        directory.create("parts/1/records", b"y")
    assert everything_below(directory.root) == ["parts/1/records", "tmp/"]
    assert os.stat(f"{directory.root}/parts/1/records").st_nlink == 1
    directory.delete("parts/1/records")
    assert everything_below(directory.root) == ["parts/", "tmp/"]


class Calls:
    """Records, in order, the calls that make files and names durable; may fail one kind of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.fail_sync_of = ""
        fsync, link, unlink = os.fsync, os.link, os.unlink

        def recorded_fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            name = "temporary" if "/tmp/" in path.removeprefix(self.above) else path
            self.made.append(f"sync {name}")
            if self.fail_sync_of and name.endswith(self.fail_sync_of):
                raise OSError(errno.EIO, "Input/output error")
            fsync(descriptor)

        def recorded_link(source: str, target: str) -> None:
            link(source, target)
            self.made.append(f"link {target}")

        def recorded_unlink(path: str) -> None:
            self.made.append("unlink")
            unlink(path)

        self.above = ""
        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(os, "link", recorded_link)
        monkeypatch.setattr(os, "unlink", recorded_unlink)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    recorded = Calls(monkeypatch)
    recorded.above = str(tmp_path)
    return recorded


def test_everything_is_synced_before_create_returns(
    directory: DirectoryStore, calls: Calls
) -> None:
    root = directory.root
    directory.create("parts/1/records", b"x")
    assert calls.made[:6] == [
        "sync temporary",
        f"link {root}/parts/1/records",
        "unlink",
        f"sync {root}/parts/1",
        f"sync {root}/parts",
        f"sync {root}",
    ]
    assert calls.made[6] == f"sync {os.path.dirname(root)}"
    calls.made.clear()
    directory.create("parts/1/vectors", b"x")
    assert calls.made == [
        "sync temporary",
        f"link {root}/parts/1/vectors",
        "unlink",
        f"sync {root}/parts/1",
    ]
    directory.delete("parts/1/records")
    calls.made.clear()
    directory.create("parts/1/ids", b"x")
    assert f"sync {root}/parts" in calls.made  # The folder may have been away.


def test_a_folder_made_by_others_is_synced_too(directory: DirectoryStore, calls: Calls) -> None:
    """Whoever made it may have died before it synced the folder's name."""
    os.makedirs(f"{directory.root}/parts/1")
    directory.create("parts/1/records", b"x")
    assert calls.made.index(f"sync {directory.root}/parts/1") < calls.made.index(
        f"sync {directory.root}/parts"
    )


def test_an_object_that_exists_is_durable_before_that_is_said(
    directory: DirectoryStore, calls: Calls
) -> None:
    os.makedirs(f"{directory.root}/parts")
    Path(f"{directory.root}/parts/1").write_bytes(b"from a writer that died before its sync")
    with pytest.raises(AlreadyExists):
        directory.create("parts/1", b"x")
    assert f"sync {directory.root}/parts" in calls.made
    assert f"sync {directory.root}" in calls.made


@pytest.mark.parametrize("where", ["temporary", "/parts", "/parts/1"])
def test_a_failed_sync_leaves_nothing_and_is_not_repeated(
    directory: DirectoryStore, calls: Calls, where: str
) -> None:
    calls.fail_sync_of = where
    with pytest.raises(Unavailable, match="Input/output error"):
        directory.create("parts/1/records", b"x")
    assert [name for name in everything_below(directory.root) if not name.endswith("/")] == []
    assert sum(made.endswith(where) and made.startswith("sync") for made in calls.made) == 1
    calls.fail_sync_of = ""
    directory.create("parts/1/records", b"y")
    assert directory.get("parts/1/records") == b"y"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_write_leaves_nothing(
    directory: DirectoryStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    writev = os.writev

    def half_a_write(descriptor: int, buffers: list[memoryview]) -> int:
        if len(buffers) < 2:
            raise OSError(code, os.strerror(code))
        return writev(descriptor, buffers[:1])

    monkeypatch.setattr(os, "writev", half_a_write)
    with pytest.raises(Unavailable, match=os.strerror(code)) as caught:
        directory.create("parts/1/records", [b"x", b"y"])
    assert caught.value.detail["path"] == f"{directory.root}/parts/1/records"
    assert caught.value.detail["errno"] == code
    assert everything_below(directory.root) == ["tmp/"]


def test_short_writes_are_completed(
    directory: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)

    def short_write(descriptor: int, buffers: list[memoryview]) -> int:
        joined = b"".join(buffers)
        return os.write(descriptor, joined[: rng.randint(1, 700)])

    monkeypatch.setattr(os, "writev", short_write)
    pieces = [rng.randbytes(rng.randint(0, 300)) for _ in range(100)]
    directory.create("a", pieces)
    assert directory.get("a") == b"".join(pieces)


def test_without_links_and_renameat2_the_error_says_so(
    directory: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse_link)
    monkeypatch.setattr(files, "_libc", lambda: object())
    with pytest.raises(Unavailable, match="neither hard links nor renameat2"):
        directory.create("a", b"x")
    assert everything_below(directory.root) == ["tmp/"]


def test_too_many_open_files_are_unavailable(directory: DirectoryStore) -> None:
    directory.create("a", b"x")
    held = [os.open("/dev/null", os.O_RDONLY)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[0], limits[1]))
        for call in (
            lambda: directory.create("b", b"x"),
            lambda: directory.get("a"),
            lambda: directory.map("a"),
            lambda: list(directory.list("")),
        ):
            with pytest.raises(Unavailable, match="Too many open files"):
                call()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(held[0])
    assert [o.key for o in directory.list("")] == ["a"]


def test_temporaries_of_the_dead_are_cleaned(directory: DirectoryStore) -> None:
    assert directory.clean_temporary(0) == 0
    directory.create("a", b"x")
    old, new = f"{directory.root}/tmp/old", f"{directory.root}/tmp/new"
    for path in (old, new):
        Path(path).write_bytes(b"half an obj")
    now_us = SystemClock().now_us()
    os.utime(old, (now_us / 1e6 - 3600, now_us / 1e6 - 3600))
    assert [o.key for o in directory.list("")] == ["a"]
    assert directory.clean_temporary(older_than_us=now_us - 60_000_000) == 1
    assert everything_below(directory.root) == ["a", "tmp/new"]


def test_a_delete_removes_the_folder_that_a_dead_one_left(directory: DirectoryStore) -> None:
    directory.create("parts/1/a", b"x")
    directory.create("parts/2/a", b"x")
    directory.create("parts/2/b", b"x")
    for number in (1, 2):
        os.unlink(f"{directory.root}/parts/{number}/a")
        directory.delete(f"parts/{number}/a")
    assert os.listdir(f"{directory.root}/parts") == ["2"]
    directory.delete("parts/2/a")
    assert [item.key for item in directory.list("")] == ["parts/2/b"]


def test_empty_folders_are_removed_and_made_again(directory: DirectoryStore) -> None:
    assert directory.remove_empty_folders() == 0
    directory.create("parts/1/a", b"x")
    directory.create("parts/2/a", b"x")
    os.unlink(f"{directory.root}/parts/1/a")
    os.makedirs(f"{directory.root}/tmp/kept", exist_ok=True)
    assert directory.remove_empty_folders() == 1
    assert sorted(os.listdir(f"{directory.root}/parts")) == ["2"]
    assert os.path.exists(f"{directory.root}/tmp/kept")
    directory.create("parts/1/a", b"y")
    assert directory.get("parts/1/a") == b"y"


def test_a_slow_writer_taken_for_dead_fails_cleanly(
    directory: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_after_cleaning(source: str, target: str) -> None:
        assert directory.clean_temporary(SystemClock().now_us() + 1_000_000) == 1
        link(source, target)

    monkeypatch.setattr(os, "link", link_after_cleaning)
    with pytest.raises(Unavailable, match="No such file"):
        directory.create("a/b", b"x")
    with pytest.raises(NotFound):
        directory.get("a/b")


def test_maps_hold_no_descriptor_and_no_memory(directory: DirectoryStore) -> None:
    def mappings() -> int:
        with open("/proc/self/maps") as file:
            return sum(directory.root in line for line in file)

    before = len(os.listdir("/proc/self/fd"))
    for i in range(50):
        directory.create(f"parts/{i}", bytes([i]) * 5000)
    views = [directory.map(f"parts/{i}") for i in range(50)]
    slices = [view[4000:4001] for view in views]
    assert len(os.listdir("/proc/self/fd")) == before
    assert mappings() == 50
    del views
    gc.collect()
    assert [bytes(piece) for piece in slices] == [bytes([i]) for i in range(50)]
    assert mappings() == 50
    del slices
    gc.collect()
    assert mappings() == 0


RACER = """
import json, sys
from ochredb.errors import AlreadyExists
from ochredb.storage.directory import DirectoryStore

root, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
store, won = DirectoryStore(root), []
print("ready", flush=True)
sys.stdin.readline()
for i in range(rounds):
    try:
        store.create(f"race/{i}/object", [name.encode(), bytes(3000)])
        won.append(i)
    except AlreadyExists:
        assert len(store.get(f"race/{i}/object")) == 3001
print(json.dumps(won), flush=True)
"""


def test_of_racing_processes_one_wins(directory: DirectoryStore) -> None:
    names, rounds = "abc", 60
    winners = Counter[int]()
    with contextlib.ExitStack() as stack:
        racers = []
        for name in names:
            command = [sys.executable, "-c", RACER, directory.root, name, str(rounds)]
            pipe = subprocess.PIPE
            racer = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            racers.append(stack.enter_context(racer))
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        for name, racer in zip(names, racers, strict=True):
            output, _ = racer.communicate(timeout=60)
            assert racer.returncode == 0
            for i in json.loads(output):
                winners[i] += 1
                assert directory.get(f"race/{i}/object") == name.encode() + bytes(3000)
    assert winners == Counter(range(rounds))


def test_both_sides_of_a_fork_go_on(directory: DirectoryStore) -> None:
    """While another thread writes: nothing that it holds may be missing in the child."""
    stop = threading.Event()

    def write() -> None:
        i = 0
        while not stop.is_set():
            directory.create(f"parent/{i}", b"x" * 10_000)
            i += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for i in range(5):
            directory.create(f"mapped/{i}", b"mapped")
            view = directory.map(f"mapped/{i}")
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    directory.create(f"child/{i}", b"y")
                    code = 0 if bytes(view) == b"mapped" else 2
                finally:
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            assert bytes(view) == b"mapped"
    finally:
        stop.set()
        thread.join()
    assert len(list(directory.list("child/"))) == 5


def test_faults_before_and_after(directory: DirectoryStore) -> None:
    faulty = FaultyStore(directory, random.Random(5), FaultRates(create=0.5, delete=0.5))
    landed, messages = 0, dict[int, str]()
    for i in range(60):
        try:
            faulty.create(f"a/{i}", b"x")
            assert directory.get(f"a/{i}") == b"x"
        except Unavailable as error:
            messages[i] = str(error)
    for i, message in messages.items():
        exists = [o.key for o in directory.list(f"a/{i}")][:1] == [f"a/{i}"]
        assert exists == ("reply lost" in message)
        landed += exists
    failed = len(messages)
    assert 0 < landed < failed < 60
    assert faulty.faults["create", Fault.AFTER] == landed
    assert faulty.faults["create", Fault.BEFORE] == failed - landed
    assert faulty.faults["get", Fault.BEFORE] == 0


def test_faults_follow_the_seed_and_spare_other_verbs() -> None:
    def run(seed: int) -> list[str]:
        faulty = FaultyStore(MemoryStore(), random.Random(seed), FaultRates.everywhere(0.4))
        outcomes = []
        for i in range(30):
            for call in (
                lambda i=i: faulty.create(f"{i}", b"x"),
                lambda i=i: faulty.get(f"{i}"),
                lambda: list(faulty.list("")),
                lambda i=i: faulty.delete(f"{i}"),
            ):
                try:
                    outcomes.append(repr(call()).split("modified")[0])
                except (Unavailable, NotFound) as error:
                    outcomes.append(str(error))
        return outcomes

    assert run(1) == run(1) != run(2)
    quiet = FaultyStore(MemoryStore(), random.Random(1), FaultRates(delete=1.0))
    quiet.create("a", b"x")
    assert quiet.get("a") == b"x"
    with pytest.raises(Unavailable):
        quiet.delete("a")
    with pytest.raises(ValueError, match="0 to 1"):
        FaultRates(get=1.5)


def test_a_slow_store_waits_by_its_clock() -> None:
    class FakeClock(SystemClock):
        slept_s = 0.0

        def sleep(self, seconds: float) -> None:
            self.slept_s += seconds

    clock = FakeClock()
    slow = SlowStore(MemoryStore(), random.Random(3), clock, delay_s_max=2.0)
    slow.create("a", b"xyz")
    assert slow.get("a") == b"xyz"
    assert slow.get_range("a", 1, 2) == b"y"
    assert [o.key for o in slow.list("")] == ["a"]
    slow.delete("a")
    assert 0.0 < clock.slept_s <= 10.0


def test_a_key_that_is_a_folder_of_another_fails_cleanly(directory: DirectoryStore) -> None:
    directory.create("a", b"x")
    with pytest.raises(Unavailable):
        directory.create("a/b", b"y")
    directory.create("c/d", b"y")
    with pytest.raises(AlreadyExists):
        directory.create("c", b"z")
    with pytest.raises(InvalidArgument):
        directory.create("tmp/x", b"y")
    assert [o.key for o in directory.list("")] == ["a", "c/d"]
    assert everything_below(directory.root) == ["a", "c/d", "tmp/"]
