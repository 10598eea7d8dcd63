"""The catalog at rest is sealed, and what was acknowledged is marked: neither is lost silently."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from ochredb.catalog import mark, seal
from ochredb.clock import SystemClock
from ochredb.errors import Corrupt
from ochredb.ids import IdSource
from ochredb.integrity import check
from ochredb_node import cli
from ochredb_node.node import Node, NodeConfig

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
        assert not os.path.exists(file)
        node.close()
    assert os.path.exists(file)
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
    file = os.path.join(store, SEAL)
    with running_node(store) as first, running_node(store) as second:
        add_rows(first, make_collection(first, "a-name"), 0, 1)
        first.close()
        assert not os.path.exists(file)
        add_rows(second, make_collection(second, "b-name"), 0, 1)
    assert os.path.exists(file)
    _open(store)


def test_a_forked_child_keeps_the_catalog_open(store: str) -> None:
    code = f"""
        import os, sys
        from tests.unit.kernel import *
        read, write = os.pipe()
        with running_node({store!r}) as node:
            collection = make_collection(node, "forked")
            child = os.fork()
            if child == 0:
                os.read(read, 1)  # Until the parent has closed.
                add_rows(node, collection, 0, 3)
                assert not os.path.exists({store!r} + "/{SEAL}")
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
    assert os.path.exists(os.path.join(store, SEAL))
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
    sums = np.arange(3, dtype=np.uint64)
    found = seal.decode(seal.encode(700_000, sums))
    assert found is not None
    assert found[0] == 700_000
    assert found[1].tolist() == [0, 1, 2]
    assert seal.decode(b"") is None


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
