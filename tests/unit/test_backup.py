"""Backup and restore of a store in this process: what is copied, checked, refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from ochredb.backup import BackupManifest, Damage, backup, check, restore
from ochredb.backup.archive import silent
from ochredb.backup.source import Source, Started
from ochredb.backup.take import take
from ochredb.catalog.pins import PinTable
from ochredb.catalog.sqlite import SqliteSession
from ochredb.errors import Corrupt, InvalidArgument, NotFound, OchreError
from ochredb.parts import deleted, writer
from ochredb.types import Op
from ochredb_compactor import scheduler
from ochredb_node.node import Node

from .kernel import (
    ROOT,
    ManualClock,
    add_rows,
    all_rows,
    append,
    make_collection,
    object_keys,
    operations,
    running_node,
)

Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def target(tmp_path: Path) -> str:
    return str(tmp_path / "backup")


def _fill(node: Node, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Every kind of object: split parts with graphs, bitmaps, fragments inline and in objects."""
    monkeypatch.setattr(scheduler, "GRAPH_ROWS_MIN", 20)
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 80)
    monkeypatch.setattr(writer, "PACKED_BYTES_MAX", 4_000)
    monkeypatch.setattr(deleted, "INLINE_BYTES_MAX", 0)
    names = [make_collection(node, f"name-{number}") for number in range(3)]
    for number, name in enumerate(names):
        add_rows(node, name, 0, 40)
        node.compactor.compact_now(name)
        add_rows(node, name, 40, 10 + number)
        append(node, name, operations(Op.DELETE, ["id-3", "id-45", "id-4"]))
        node.compactor.fold_now(name)
        add_rows(node, name, 60, 30)
        append(node, name, operations(Op.UPDATE, ["id-7", "no"], documents=["changed", "x"]))
        append(node, name, operations(Op.DELETE, ["id-8", "id-61", "id-3"]))
        append(node, name, operations(Op.UPSERT, ["id-8", "new"], [[1.0] * 4] * 2))
        add_rows(node, name, 5, 3)
    make_collection(node, "nothing-in-it")
    return _rows(node)


def _rows(node: Node) -> Rows:
    found = node.namespace.list_collections("default_tenant", "default_database", None, 0)
    return {info.name: all_rows(node, info.id) for info in found}


def _rows_in(path: str) -> Rows:
    with running_node(path) as node:
        return _rows(node)


@pytest.fixture
def filled(store: str, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """The store, closed, with what is in it."""
    with running_node(store, inline_bytes_max=2_000) as node:
        rows = _fill(node, monkeypatch)
        kinds = {key.split("/")[0] for key in object_keys(node)}
        assert kinds == {"parts", "deleted", "fragments"}
        assert any(key.endswith("/graph") for key in object_keys(node))
        assert any(key.endswith("/vectors") for key in object_keys(node))
    return rows


def test_a_restored_store_has_the_same_records_and_another_id(
    filled: Rows, store: str, target: str, tmp_path: Path
) -> None:
    manifest = backup(store, target)
    counts = {item.name: item.records for item in manifest.collections}
    assert counts == {name: len(rows) for name, rows in filled.items()}
    assert check(target) == manifest
    found, store_id = restore(target, str(tmp_path / "restored"))
    assert found == manifest
    assert store_id != manifest.store_id
    assert _rows_in(str(tmp_path / "restored")) == filled == _rows_in(store)
    assert (tmp_path / "restored/objects/store_id").read_text() == store_id
    assert (tmp_path / "store/objects/store_id").read_text() == manifest.store_id


def test_both_stores_go_on_and_know_nothing_of_each_other(
    filled: Rows, store: str, target: str, tmp_path: Path
) -> None:
    backup(store, target)
    restored = str(tmp_path / "restored")
    restore(target, restored)
    shutil.rmtree(target)
    with running_node(store) as one, running_node(restored) as two:
        (info,) = one.namespace.list_collections("default_tenant", "default_database", 1, 0)
        add_rows(one, info.id, 500, 5)
        append(two, info.id, operations(Op.DELETE, ["id-9"]))
        for node in (one, two):
            node.compactor.compact_now(info.id)
            node.compactor.collect_now(sweep_orphans=True)
        names = [{row["id"] for row in all_rows(node, info.id)} for node in (one, two)]
    before = {row["id"] for row in filled[info.name]}
    assert names == [before | {f"id-{n}" for n in range(500, 505)}, before - {"id-9"}]


def test_nothing_of_the_taker_stays_in_the_source(filled: Rows, store: str, target: str) -> None:
    backup(store, target)
    with running_node(store) as node, node.database.read() as session:
        assert isinstance(session, SqliteSession)
        for table in ("pins", "object_references WHERE kind = 'pin'"):
            assert session.connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    assert os.listdir(os.path.join(store, "objects", "tmp")) == []


def test_the_copy_has_no_more_than_its_newest_versions_need(
    filled: Rows, store: str, target: str
) -> None:
    manifest = backup(store, target)
    with running_node(store) as node:
        needed = set()
        for item in manifest.collections:
            for part in node.versions.parts(item.id, item.version):
                needed |= {info.key for info in part.manifest.objects}
                needed |= {part.deleted_key} if part.deleted_key else set()
        fragments = {key for key in object_keys(node) if key.startswith("fragments/")}
        names = {item.name for item in manifest.objects}
        assert needed <= names <= needed | fragments
        assert names < object_keys(node)


class Busy:
    """A Source at whose every answer the world has moved on: `between` runs before it."""

    def __init__(self, inner: Source, between: Callable[[], None]) -> None:
        self._inner, self._between = inner, between

    def begin(self, owner: str) -> Started:
        return self._inner.begin(owner)

    def read_catalog(self, backup_id: str, start: int, stop: int) -> bytes:
        self._between()
        return self._inner.read_catalog(backup_id, start, stop)

    def read_object(self, backup_id: str, key: str, start: int, stop: int) -> bytes:
        self._between()
        return self._inner.read_object(backup_id, key, start, stop)

    def renew(self, backup_id: str) -> None:
        self._inner.renew(backup_id)

    def end(self, backup_id: str) -> None:
        self._inner.end(backup_id)

    def close(self) -> None:
        self._inner.close()


@pytest.fixture
def node(store: str, clock: ManualClock) -> Iterator[Node]:
    with running_node(store, clock=clock, inline_bytes_max=2_000) as node:
        yield node


def test_the_state_is_that_of_the_beginning_however_long_copying_takes(
    node: Node, clock: ManualClock, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two reads: writes, deletes, a drop, compaction, and more than a grace period."""
    expected = _fill(node, monkeypatch)
    infos = node.namespace.list_collections("default_tenant", "default_database", None, 0)
    turns = 0

    def between() -> None:
        nonlocal turns
        turns += 1
        for info in infos[1:3] if turns <= 3 else ():
            add_rows(node, info.id, 1_000 + 40 * turns, 40)
            append(node, info.id, operations(Op.DELETE, [f"id-{turns}", f"id-{60 + turns}"]))
            node.compactor.compact_now(info.id)
        if turns == 2:
            node.namespace.delete_collection("default_tenant", "default_database", infos[0].name)
        clock.advance(70)
        node._housekeep()
        node.compactor.collect_now(sweep_orphans=True)

    before = object_keys(node)
    source = Busy(node.backups, between)
    manifest = take(source, target, keep_going=False, progress=silent, clock=clock)
    assert turns > 5
    restore(target, str(tmp_path / "restored"))
    assert _rows_in(str(tmp_path / "restored")) == expected
    assert {item.name for item in manifest.objects} <= object_keys(node)
    clock.advance(70)
    node.compactor.collect_now(sweep_orphans=True)
    with node.database.read() as session:
        assert isinstance(session, SqliteSession)
        rows = session.connection.execute("SELECT DISTINCT key FROM object_references").fetchall()
    assert {key for (key,) in rows} == object_keys(node), "what only the backup kept is garbage"
    assert not before <= object_keys(node)


def test_a_backup_that_expired_fails_and_is_recognised(
    node: Node, clock: ManualClock, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(node, monkeypatch)

    def sleep() -> None:
        clock.advance(130)
        node._housekeep()

    with pytest.raises(NotFound, match="has expired"):
        take(Busy(node.backups, sleep), target, keep_going=False, progress=silent, clock=clock)
    with pytest.raises(InvalidArgument, match="incomplete backup"):
        check(target)


_KILLED = """
    import sys, time
    from ochredb.backup.archive import silent
    from ochredb.backup.source import open_store
    from ochredb.backup.take import take
    from ochredb.clock import SystemClock
    from tests.unit.test_backup import Busy

    def between() -> None:
        print("copying", flush=True)
        time.sleep(60)

    source = Busy(open_store(sys.argv[1]), between)
    take(source, sys.argv[2], keep_going=False, progress=silent, clock=SystemClock())
"""


def test_a_killed_backup_leaves_the_source_fine(
    filled: Rows, store: str, target: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_KILLED), store, target]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "copying\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    clock = ManualClock()
    with running_node(store, clock=clock) as node:
        assert _rows(node) == filled
        with node.database.read() as session:
            assert isinstance(session, SqliteSession)
            (pin,) = session.connection.execute("SELECT id FROM pins").fetchone()
        PinTable(node.database, clock).check(pin)
        backup(store, str(tmp_path / "another"))
        clock.advance(130)
        node._housekeep()
        with pytest.raises(NotFound):
            PinTable(node.database, clock).check(pin)
        for info in node.namespace.list_collections("default_tenant", "default_database", None, 0):
            node.namespace.delete_collection("default_tenant", "default_database", info.name)
        clock.advance(130)
        node.compactor.collect_now(sweep_orphans=True)
        assert object_keys(node) == set()
    with pytest.raises(InvalidArgument, match="incomplete backup"):
        restore(target, str(tmp_path / "restored"))


# -- damage at the source


def _flip(path: str, position: int) -> None:
    content = bytearray(Path(path).read_bytes())
    content[position] ^= 1
    os.unlink(path)
    Path(path).write_bytes(content)


def _some(folder: str, name: str) -> str:
    """The path of an object whose key contains `name`."""
    found = sorted(str(path) for path in Path(folder, "objects").rglob("*") if path.is_file())
    return next(path for path in found if name in path)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        *(("flip", name) for name in ("/graph", "/vectors", "fragments/", "deleted/")),
        ("cut", "/index"),
        ("remove", "/records"),
    ],
)
def test_damage_at_the_source_is_named_and_ends_the_backup(
    node: Node,
    store: str,
    target: str,
    tmp_path: Path,
    name: str,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _fill(node, monkeypatch)
    manifest = backup(store, str(tmp_path / "good"))
    key = next(item.name for item in manifest.objects if name in item.name)
    path = os.path.join(store, "objects", key)
    if how == "flip":
        _flip(path, os.path.getsize(path) // 2)
    elif how == "cut":
        content = Path(path).read_bytes()
        os.unlink(path)
        Path(path).write_bytes(content[:-9])
    else:
        os.unlink(path)
    with pytest.raises(Damage, match=key) as caught:
        backup(store, target)
    assert [found for found, _ in caught.value.damaged if found == key]
    with pytest.raises(InvalidArgument, match="incomplete"):
        check(target)
    kept = backup(store, str(tmp_path / "kept"), keep_going=True)
    assert key in dict(kept.damaged)
    with pytest.raises(Damage, match=key):
        restore(str(tmp_path / "kept"), str(tmp_path / "refused"))
    found, _ = restore(str(tmp_path / "kept"), str(tmp_path / "restored"), keep_going=True)
    assert found.damaged == kept.damaged
    with running_node(str(tmp_path / "restored")) as restored:
        whole = failed = 0
        for item in kept.collections:
            try:
                all_rows(restored, item.id)
                whole += 1
            except OchreError:
                failed += 1
        assert failed <= 1 <= whole


def test_a_damaged_inline_fragment_is_found(node: Node, store: str, target: str) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 3)
    with node.database.write() as session:
        assert isinstance(session, SqliteSession)
        session.connection.execute("UPDATE fragments SET checksum = checksum + 1")
    with pytest.raises(Damage, match=f"collection {collection}: fragment 1 .*inline"):
        backup(store, target)


# -- a damaged or incomplete backup


@pytest.fixture
def made(filled: Rows, store: str, target: str) -> BackupManifest:
    return backup(store, target)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("flip", "/graph"),
        ("flip", "catalog.sqlite3"),
        ("cut", "fragments/"),
        ("remove", "deleted/"),
        ("remove", "catalog.sqlite3"),
    ],
)
def test_a_damaged_backup_is_not_restored(
    made: BackupManifest, target: str, tmp_path: Path, name: str, how: str
) -> None:
    if name == "catalog.sqlite3":
        key, path = name, os.path.join(target, name)
    else:
        key = next(item.name for item in made.objects if name in item.name)
        path = os.path.join(target, "objects", key)
    if how == "flip":
        _flip(path, os.path.getsize(path) // 2)
    elif how == "cut":
        os.truncate(path, os.path.getsize(path) - 1)
    else:
        os.unlink(path)
    for keep_going in (False, True):
        with pytest.raises(Damage, match=key):
            restore(target, str(tmp_path / "restored"), keep_going=keep_going)
    assert os.listdir(tmp_path / "restored") == []


def test_a_damaged_manifest_is_found(made: BackupManifest, target: str, tmp_path: Path) -> None:
    path = Path(target, "manifest.json")
    text = path.read_bytes()
    path.write_bytes(text.replace(b'"records": ', b'"records": 1', 1))
    with pytest.raises(Corrupt, match="fails its checksum"):
        restore(target, str(tmp_path / "restored"))
    path.write_bytes(text[: len(text) // 2])
    with pytest.raises(Corrupt, match="no manifest"):
        check(target)
    document = orjson.loads(text) | {"format_version": 99}
    path.write_bytes(orjson.dumps(document))
    with pytest.raises(InvalidArgument, match="newer OchreDB"):
        check(target)


def test_what_is_no_complete_backup_is_refused(
    made: BackupManifest, store: str, target: str, tmp_path: Path
) -> None:
    os.unlink(os.path.join(target, "manifest.json"))
    with pytest.raises(InvalidArgument, match="incomplete backup"):
        check(target)
    for path in (store, str(tmp_path / "nowhere")):
        with pytest.raises(InvalidArgument, match="is no backup"):
            check(path)


def test_targets_must_be_empty(
    made: BackupManifest, store: str, target: str, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter").write_text("dear")
    for path in (str(tmp_path / "mine"), target, store):
        with pytest.raises(InvalidArgument, match=r"not empty|lies within"):
            backup(store, path)
        with pytest.raises(InvalidArgument, match="not empty"):
            restore(target, path)
    assert (tmp_path / "mine/letter").read_text() == "dear"
    with pytest.raises(InvalidArgument, match="lies within"):
        backup(store, os.path.join(store, "objects", "parts", "backup"))
    (tmp_path / "empty").mkdir()
    assert backup(store, str(tmp_path / "empty")).records == made.records


def test_a_source_that_is_no_store_is_refused_and_not_made_one(target: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name in ("nowhere", "other"):
        with pytest.raises(InvalidArgument, match="no OchreDB directory"):
            backup(str(tmp_path / name), target)
    assert not (tmp_path / "nowhere").exists()
    assert list((tmp_path / "other").iterdir()) == []


def test_an_interrupted_restore_is_taken_for_nothing(
    made: BackupManifest, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(5, "power is gone")

    restored = str(tmp_path / "restored")
    with monkeypatch.context() as patch:
        patch.setattr("os.rename", fail)
        with pytest.raises(OchreError, match="power is gone"):
            restore(target, restored)
    with pytest.raises(InvalidArgument, match="not an OchreDB directory"), running_node(restored):
        pass
    with pytest.raises(InvalidArgument, match="not empty"):
        restore(target, restored)


def test_a_store_of_another_id_is_not_backed_up(filled: Rows, store: str, target: str) -> None:
    path = Path(store, "objects", "store_id")
    path.unlink()
    with pytest.raises(InvalidArgument, match="missing"):
        backup(store, target)
    path.write_text("another")
    with pytest.raises(InvalidArgument, match="another store"):
        backup(store, target)
