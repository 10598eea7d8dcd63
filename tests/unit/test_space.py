"""Little space: who is refused, what is kept back, and when all is as before."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ochredb.errors import StorageFull, Unavailable
from ochredb.storage import space
from ochredb.storage.directory import DirectoryStore
from ochredb.storage.space import RESERVE_BYTES, RESERVE_FILE, Reserve
from ochredb.types import Op
from ochredb_compactor.service import CompactorService

from .kernel import add_rows, append, ids_of, make_collection, object_keys, operations, running_node


class _Disk:
    """What the file system says that it has free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 1 << 30
        monkeypatch.setattr(space, "free_bytes", lambda _path: self.free)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> _Disk:
    return _Disk(monkeypatch)


def test_space_is_kept_back_and_really_taken(tmp_path: Path) -> None:
    Reserve(str(tmp_path)).take_back()
    status = os.stat(tmp_path / RESERVE_FILE)
    assert status.st_size == RESERVE_BYTES
    assert status.st_blocks * 512 >= RESERVE_BYTES


def test_once_full_writes_are_refused_until_there_is_space(tmp_path: Path, disk: _Disk) -> None:
    reserve = Reserve(str(tmp_path))
    reserve.take_back()
    reserve.check()
    disk.free = 0
    reserve.found_full()
    with pytest.raises(StorageFull, match=r"0 bytes free"):
        reserve.check()
    assert (tmp_path / RESERVE_FILE).exists(), "kept for deletes"
    disk.free = 1 << 30
    reserve.check()


def test_what_frees_space_gets_the_reserve_and_a_second_try(tmp_path: Path, disk: _Disk) -> None:
    reserve = Reserve(str(tmp_path))
    reserve.take_back()
    tries = []

    def work() -> str:
        tries.append((tmp_path / RESERVE_FILE).exists())
        if tries == [True]:
            raise StorageFull("full")
        return "done"

    disk.free = RESERVE_BYTES
    assert reserve.freeing(work) == "done"
    assert tries == [True, False]
    with pytest.raises(StorageFull):
        reserve.check()
    disk.free = 1 << 30
    reserve.check()
    assert (tmp_path / RESERVE_FILE).exists()


def test_a_store_in_memory_keeps_nothing_back() -> None:
    reserve = Reserve()
    reserve.take_back()
    reserve.found_full()
    reserve.check()


def test_on_a_full_disk_a_store_takes_deletes_only(tmp_path: Path, disk: _Disk) -> None:
    with running_node(str(tmp_path)) as node:
        collection = make_collection(node)
        add_rows(node, collection, 0, 3)
        disk.free = 0
        node.reserve.found_full()
        with pytest.raises(StorageFull):
            append(node, collection, operations(Op.UPSERT, ["new"], [[1.0] * 4]))
        with pytest.raises(StorageFull):
            make_collection(node, "another")
        append(node, collection, operations(Op.DELETE, ["id-1"]))
        assert ids_of(node, collection) == ["id-0", "id-2"]
        disk.free = 1 << 30
        append(node, collection, operations(Op.UPSERT, ["new"], [[1.0] * 4]))


@pytest.mark.parametrize("failing", ["records", "index", "deleted"])
def test_a_compaction_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Each attempt would fill a full disk further."""
    monkeypatch.setattr("ochredb.parts.writer.PACKED_BYTES_MAX", 0)
    monkeypatch.setattr("ochredb.parts.deleted.INLINE_BYTES_MAX", 0)
    with running_node(str(tmp_path)) as node:
        collection = make_collection(node)
        add_rows(node, collection, 0, 20)
        node.compactor.compact_now(collection)
        append(node, collection, operations(Op.DELETE, ["id-1"]))
        add_rows(node, collection, 20, 20)
        before = object_keys(node)
        publish = DirectoryStore._publish

        def full(store: DirectoryStore, temporary: str, final: str) -> bool:
            if failing in final:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return publish(store, temporary, final)

        with monkeypatch.context() as patched:
            patched.setattr(DirectoryStore, "_publish", full)
            with pytest.raises(StorageFull):
                node.compactor.fold_now(collection)
        assert object_keys(node) == before
        assert os.listdir(tmp_path / "objects" / "tmp") == []
        node.compactor.fold_now(collection)
        assert len(ids_of(node, collection)) == 39


def test_background_work_that_meets_a_fault_waits_longer_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running_node(str(tmp_path)) as node:
        tries: list[str] = []

        def job(collection: str, _step: object) -> bool:
            tries.append(collection)
            raise Unavailable("no space") if len(tries) % 2 else MemoryError

        now = [1_000.0]
        monkeypatch.setattr(node.clock, "monotonic_s", lambda: now[0])
        compactor: CompactorService = node.compactor
        waits: list[float] = []
        for _ in range(8):
            last = now[0]
            while len(tries) == len(waits):
                compactor._attempts.run("compact", "c", job)
                now[0] += 0.5
            waits.append(now[0] - last)
        assert waits[1:] == sorted(waits[1:]) and waits[-1] > 30
        assert "Traceback" not in caplog.text


def test_work_that_met_a_full_disk_goes_on_as_soon_as_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_node(str(tmp_path)) as node:
        tries: list[str] = []

        def job(collection: str, _step: object) -> bool:
            tries.append(collection)
            node.reserve.found_full()
            raise StorageFull("no space")

        now = [1_000.0]
        monkeypatch.setattr(node.clock, "monotonic_s", lambda: now[0])
        for _ in range(1_000):
            node.compactor._attempts.run("compact", "c", job)
            now[0] += 1.0
        assert 5 < len(tries) < 13, "each attempt takes a little of what is kept for deletes"
        node.reserve.is_needed = False
        node.compactor._attempts.run("compact", "c", job)
        assert len(tries) < 14 and node.reserve.is_needed
        before = len(tries)
        node.compactor._attempts.run("compact", "c", job)
        assert len(tries) == before
