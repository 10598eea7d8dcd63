"""The catalog at rest is sealed, and what was acknowledged is marked: neither is lost silently."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from ochredb.catalog import mark, wal
from ochredb.catalog.seal_format import BEGUN, CLOSED, SETTLED, State, decode, encode, encode_record
from ochredb.clock import SystemClock
from ochredb.errors import Corrupt
from ochredb.ids import IdSource
from ochredb.integrity import check
from ochredb_node import cli
from ochredb_node.node import Node, NodeConfig
from tests.golden.seals import seal_of_blocks

from .kernel import ROOT, add_rows, ids_of, make_collection, running_node

CATALOG, SEAL = "ochredb.sqlite3", "ochredb.seal"


@pytest.fixture
def store(tmp_path: Path) -> str:
    path = str(tmp_path / "store")
    with running_node(path) as node:
        add_rows(node, make_collection(node), 0, 40)
    return path


def _open(path: str) -> None:
    with running_node(path) as node:
        node.logs.has_collections()


def _kind(path: str) -> int:
    sealed = decode(Path(path, SEAL).read_bytes())
    assert sealed is not None
    return sealed.state.kind


def _flip(file: str, place: int) -> None:
    content = bytearray(Path(file).read_bytes())
    content[place] ^= 1
    Path(file + ".new").write_bytes(content)
    os.rename(file + ".new", file)


def test_a_closed_catalog_is_sealed_and_reading_does_not_break_it(store: str) -> None:
    file = os.path.join(store, SEAL)
    before = os.stat(file)
    _open(store)
    assert os.stat(file).st_mtime_ns == before.st_mtime_ns
    with running_node(store) as node:
        add_rows(node, make_collection(node, "more"), 0, 1)
        assert _kind(store) == SETTLED
        node.close()
    assert _kind(store) == CLOSED
    _open(store)


@pytest.mark.parametrize("where", [50, 0.5, -1])
def test_one_bit_of_the_catalog_is_found_and_put_back(store: str, where: float) -> None:
    file = os.path.join(store, CATALOG)
    whole = Path(file).read_bytes()
    _flip(file, int(where * len(whole)) if where == 0.5 else int(where))
    with pytest.raises(Corrupt, match="not as it was closed"):
        _open(store)
    (finding,) = check(store).findings
    assert finding.place == "catalog"
    os.truncate(file, 0)
    Path(file).write_bytes(whole)
    _open(store)


def test_catalogs_that_are_cut_or_gone_are_not_opened(store: str) -> None:
    file = os.path.join(store, CATALOG)
    whole = Path(file).read_bytes()
    Path(file).write_bytes(whole[:-1])
    with pytest.raises(Corrupt, match="bytes instead of"):
        _open(store)
    os.unlink(file)
    with pytest.raises(Corrupt, match="is missing"):
        _open(store)
    os.unlink(os.path.join(store, SEAL))
    with pytest.raises(Corrupt, match="is missing"):
        _open(store)
    assert not os.path.exists(file)
    Path(file).write_bytes(whole)
    _open(store)


def test_without_the_seal_or_with_a_damaged_one_it_is_opened(store: str) -> None:
    _flip(os.path.join(store, SEAL), 20)
    _open(store)
    os.unlink(os.path.join(store, SEAL))
    _open(store)
    assert os.path.exists(os.path.join(store, SEAL))


def test_several_users_and_the_last_one_seals(store: str) -> None:
    with running_node(store) as first, running_node(store) as second:
        add_rows(first, make_collection(first, "a-name"), 0, 1)
        first.close()
        assert _kind(store) == SETTLED
        add_rows(second, make_collection(second, "b-name"), 0, 1)
    assert _kind(store) == CLOSED
    _open(store)


def test_a_forked_child_keeps_the_catalog_open(store: str) -> None:
    code = f"""
        import os, sys
        from tests.unit.kernel import *
        from tests.unit.test_seal import CLOSED, _kind
        read, write = os.pipe()
        with running_node({store!r}) as node:
            collection = make_collection(node, "forked")
            child = os.fork()
            if child == 0:
                os.read(read, 1)  # Until the parent has closed.
                add_rows(node, collection, 0, 3)
                assert _kind({store!r}) != CLOSED
                node.close()
                os._exit(0)
            node.close()
        os.write(write, b"x")
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], cwd=ROOT, check=False
    )
    assert done.returncode == 0
    assert _kind(store) == CLOSED
    with running_node(store) as node:
        info = node.namespace.get_collection("default_tenant", "default_database", "forked")
        assert len(ids_of(node, info.id)) == 3


def _killed(path: str) -> None:
    """A store with a write-ahead log that holds acknowledged writes."""
    code = f"""
        import os
        from tests.unit.kernel import *
        with running_node({path!r}) as node:
            collection = make_collection(node, "killed")
            node.database.checkpoint()
            for first in range(0, 30, 10):
                add_rows(node, collection, first, 10)
            os._exit(0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)
    assert os.path.getsize(os.path.join(path, CATALOG + "-wal"))


@pytest.mark.parametrize("how", ["deleted", "cut", "damaged", "left"])
def test_writes_that_a_log_has_lost_are_missed(tmp_path: Path, how: str) -> None:
    path = str(tmp_path / "store")
    _killed(path)
    file = os.path.join(path, CATALOG + "-wal")
    size = os.path.getsize(file)
    if how == "deleted":
        os.unlink(file)
    elif how == "cut":
        Path(file).write_bytes(Path(file).read_bytes()[: size - 100])
    elif how == "damaged":
        _flip(file, size // 2)
    if how == "left":
        _open(path)
        assert os.listdir(path).count(CATALOG + "-wal.kept") == 0
        return
    with pytest.raises(Corrupt, match="has lost writes"):
        _open(path)
    assert [item.place for item in check(path).findings] == ["catalog"]
    assert os.path.exists(file + ".lost") == (how != "deleted")
    os.unlink(os.path.join(path, "write.lock"))
    _open(path)


def test_dropped_collections_are_not_missed(store: str) -> None:
    node = Node(NodeConfig(path=store), clock=SystemClock(), ids=IdSource())
    node.start(background=False)
    add_rows(node, make_collection(node, "gone"), 0, 5)
    node.namespace.delete_collection("default_tenant", "default_database", "gone")
    node.close()
    _open(store)


def test_marks_and_seals_as_bytes() -> None:
    name = IdSource().uuid7()
    assert mark.decode(mark.encode(name, 1 << 40)) == (name, 1 << 40)
    assert mark.decode(bytes(64)) is None
    for place in (0, 9, 50, 63):
        damaged = bytearray(mark.encode(name, 7))
        damaged[place] ^= 2
        assert mark.decode(bytes(damaged)) is None
    sums = np.arange(1, 4, dtype=np.uint64)
    state = State(CLOSED, 0, 0, 3 * 8192, 77)
    content = encode(8192, sums, state)
    found = decode(content)
    assert found is not None
    assert (found.block_bytes, found.state) == (8192, state)
    assert found.checksums.tolist() == [1, 2, 3]
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 8
        assert decode(bytes(damaged)) is None
        assert decode(content[:place]) is None


def test_records_of_a_seal_add_up() -> None:
    none = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    content = encode(4096, np.arange(1, 5, dtype=np.uint64), State(CLOSED, 0, 0, 4 * 4096, 7))
    content += encode_record(State(BEGUN, 9, 0, 4 * 4096, 7), *none)
    settled = State(SETTLED, 9, 5, 7 * 4096, 8)
    content += encode_record(settled, np.array([1, 5]), np.array([12, 15], np.uint64))
    found = decode(content)
    assert found is not None
    assert found.state == settled
    assert found.checksums.tolist() == [1, 12, 3, 4, 0, 15]
    shorter = State(SETTLED, 9, 6, 2 * 4096, 9)
    found = decode(content + encode_record(shorter, *none))
    assert found is not None
    assert found.checksums.tolist() == [1, 12]
    longer = encode_record(State(SETTLED, 9, 7, 3 * 4096, 9), *none)
    found = decode(content + encode_record(shorter, *none) + longer)
    assert found is not None
    assert found.checksums.tolist() == [1, 12], "what the third page is now nobody knows"
    assert decode(content + longer[:-1]) is None, "torn"


def test_repair_puts_a_bit_of_the_catalog_back(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = os.path.join(store, CATALOG)
    whole = Path(file).read_bytes()
    _flip(file, 3_000)
    assert cli.main(["repair", store]) == 0
    assert "put back: catalog" in capsys.readouterr().out
    assert Path(file).read_bytes()[:3_001] == whole[:3_001]
    assert not check(store).is_damaged


def test_a_drop_between_the_looks_at_mark_and_catalog_is_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in a storm of processes: one opened while another dropped what was written last."""
    with running_node(str(tmp_path)) as node:
        add_rows(node, make_collection(node), 0, 3)
        lock_path, look = str(tmp_path / "write.lock"), mark._read
        stale = [("dropped-meanwhile", 10)]
        monkeypatch.setattr(mark, "_read", lambda path: stale.pop() if stale else look(path))
        mark.check_mark(node.database, lock_path)
        assert not stale
        monkeypatch.setattr(mark, "_read", lambda _path: ("dropped-meanwhile", 10))
        with pytest.raises(Corrupt, match="operation 9 of collection dropped-meanwhile"):
            mark.check_mark(node.database, lock_path)


def _killed_after(path: str, work: str) -> None:
    """A store whose process was killed after some work; its collection has 40 records."""
    code = f"""
        import os, sqlite3
        from tests.unit.kernel import *
        with running_node({path!r}) as node:
            collection = make_collection(node, "killed")
            add_rows(node, collection, 0, 40)
            node.sqlite.checkpoint()
            {work}
            os._exit(0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)


def _flip_below_the_file_system(file: str, place: int) -> None:
    times = os.stat(file)
    with open(file, "r+b") as content:
        content.seek(place)
        byte = content.read(1)[0]
        content.seek(place)
        content.write(bytes([byte ^ 64]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("page", [0, 5, 20])
def test_one_bit_of_a_catalog_that_was_open_is_found_and_put_back(
    tmp_path: Path, page: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "store")
    _killed_after(path, "pass")
    assert _kind(path) == SETTLED
    file = os.path.join(path, CATALOG)
    os.unlink(file + "-wal")  # All of it is in the file; with it, SQLite would heal the page.
    _flip_below_the_file_system(file, page * 8192 + 4000)
    with pytest.raises(Corrupt, match=f"not as it was written: block {page} of 8 KiB"):
        _open(path)
    assert [item.place for item in check(path).findings] == ["catalog"]
    assert cli.main(["repair", path]) == 0
    assert "put back: catalog" in capsys.readouterr().out
    assert not check(path).is_damaged


def test_pages_that_the_log_has_are_taken_from_there(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    _killed_after(path, "pass")
    file = os.path.join(path, CATALOG)
    with wal.opened(file) as log:
        assert log is not None
        headers, count = log.whole_frames()
    assert count == len(headers.page) > 0
    for page in set(headers.page.tolist()):
        _flip_below_the_file_system(file, (page - 1) * 8192 + 4000)
    _open(path)
    assert not check(path).is_damaged


def test_a_look_with_another_tool_after_a_kill_accuses_nobody(tmp_path: Path) -> None:
    """It copies what is in the log, and takes that away."""
    path = str(tmp_path / "store")
    _killed_after(path, "add_rows(node, collection, 40, 9)")
    connection = sqlite3.connect(os.path.join(path, CATALOG))
    assert connection.execute("SELECT count(*) FROM collections").fetchone() == (1,)
    connection.close()
    assert not os.path.exists(os.path.join(path, CATALOG + "-wal"))
    _open(path)
    assert not check(path).is_damaged
    assert _kind(path) == CLOSED


def test_what_changes_while_the_catalog_is_open_is_found_by_a_check_and_after_a_close(
    store: str,
) -> None:
    with running_node(store) as node:
        collection = make_collection(node, "more")
        add_rows(node, collection, 0, 30)
        node.sqlite.checkpoint()
        assert not check(store).is_damaged
        _flip_in_another_process(os.path.join(store, CATALOG), 3 * 8192 + 8000)
        (finding,) = check(store).findings
        assert "not as it was written: block 3" in finding.problem
    assert _kind(store) == CLOSED
    with pytest.raises(Corrupt, match="not as it was closed: block 3"):
        _open(store)


def _flip_in_another_process(file: str, place: int) -> None:
    """Closing the file here would drop this process's locks of it."""
    code = (
        f"from tests.unit import test_seal as t; t._flip_below_the_file_system({file!r}, {place})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_frame_that_was_damaged_before_it_was_copied_is_found(store: str) -> None:
    with running_node(store) as node:
        add_rows(node, make_collection(node, "more"), 0, 5)
        _flip_below_the_file_system(os.path.join(store, CATALOG + "-wal"), 32 + 24 + 5000)
        node.sqlite.checkpoint()
    with pytest.raises(Corrupt, match="not as it was closed"):
        _open(store)


def test_a_log_that_is_shorter_than_what_was_copied_of_it_is_damaged(tmp_path: Path) -> None:
    """SQLite would put older pages over newer ones."""
    path = str(tmp_path / "store")
    _killed_after(path, "pass")
    os.unlink(os.path.join(path, "write.lock"))  # Else the mark would tell.
    file = os.path.join(path, CATALOG + "-wal")
    _flip_below_the_file_system(file, os.path.getsize(file) - 100)
    with pytest.raises(Corrupt, match="frames that were copied already"):
        _open(path)


def test_the_seal_of_an_earlier_release_counts_until_the_first_write(store: str) -> None:
    file = os.path.join(store, CATALOG)
    Path(store, SEAL).write_bytes(seal_of_blocks(Path(file).read_bytes()))
    _flip(file, 9_000)
    with pytest.raises(Corrupt, match="not as it was closed: block 0 of 256 KiB"):
        _open(store)
    _flip(file, 9_000)
    _open(store)
    with running_node(store) as node:
        make_collection(node, "more")
        assert not os.path.exists(os.path.join(store, SEAL))
    assert _kind(store) == CLOSED
