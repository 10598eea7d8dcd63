"""A node whose catalog is in PostgreSQL: what its user may ask of a whole store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ochredb.backup import check as check_backup
from ochredb.backup import restore
from ochredb.backup.archive import silent
from ochredb.backup.take import take
from ochredb.catalog.postgres import CatalogClock, PostgresDatabase
from ochredb.catalog.postgres_config import PostgresConfig
from ochredb.catalog.session import DIALECT as SQLITE
from ochredb.clock import SystemClock
from ochredb.integrity.check import check_store
from ochredb.types import Op
from ochredb_compactor.config import CompactorConfig
from ochredb_compactor.vacuum import Vacuum
from ochredb_node.cli import main
from ochredb_node.node import Node, NodeConfig
from tests.components.postgres import PostgresServer
from tests.unit.kernel import (
    add_rows,
    all_rows,
    append,
    make_collection,
    operations,
    running_node,
    sql,
)


@contextlib.contextmanager
def _running(url: str, config: PostgresConfig, path: Path) -> Iterator[Node]:
    node = Node(
        NodeConfig(
            path=str(path),
            catalog_url=url,
            postgres=config,
            compactor=CompactorConfig(grace_s=0.2, graph_threads=1),
        )
    )
    node.start(background=False)
    try:
        yield node
    finally:
        node.close()


@pytest.fixture
def node(url: str, config: PostgresConfig, tmp_path: Path) -> Iterator[Node]:
    with _running(url, config, tmp_path / "data") as node:
        yield node


def _filled(node: Node) -> str:
    """A collection with parts, deleted rows, a tail, and an odd key."""
    collection = make_collection(node)
    add_rows(node, collection, 0, 50)
    append(node, collection, operations(Op.DELETE, ["id-3", "id-7"]))
    node.compactor.compact_now(collection)
    append(node, collection, operations(Op.DELETE, ["id-4"]))
    node.compactor.compact_now(collection)
    append(
        node,
        collection,
        operations(Op.ADD, ["odd"], [[1.0, 2.0, 3.0, 4.0]], metadatas=[{"a\0\1b": 1}]),
    )
    return collection


def test_it_judges_time_by_the_catalog(node: Node) -> None:
    assert isinstance(node.database, PostgresDatabase)
    assert isinstance(node.clock, CatalogClock)
    assert not node.database.is_local
    node.housekeeping.turn()


def test_what_one_process_wrote_another_reads(
    node: Node, url: str, config: PostgresConfig, tmp_path: Path
) -> None:
    collection = _filled(node)
    with _running(url, config, tmp_path / "data") as another:
        assert all_rows(another, collection) == all_rows(node, collection)
        add_rows(another, collection, 100, 3)
        assert len(all_rows(node, collection)) == 51


def test_a_backup_is_a_store_of_sqlite(node: Node, tmp_path: Path) -> None:
    collection = _filled(node)
    rows = all_rows(node, collection)
    backup, restored = str(tmp_path / "backup"), str(tmp_path / "restored")
    manifest = take(node.backups, backup, keep_going=False, progress=silent, clock=SystemClock())
    append(node, collection, operations(Op.DELETE, ["odd"]))  # Later than the backup.
    assert manifest.records == 48
    assert manifest.store_id == node.foundation.catalog.store_id
    check_backup(backup)
    restore(backup, restored)
    with running_node(restored) as copy:
        assert copy.sqlite.dialect == SQLITE
        assert all_rows(copy, collection) == rows
        add_rows(copy, collection, 200, 2)
        copy.compactor.compact_now(collection)
        assert len(all_rows(copy, collection)) == 50
    with node.database.read() as session:
        assert session.all(sql("SELECT * FROM pins")) == []


def test_a_backup_is_restored_into_another_shared_store(
    node: Node, url: str, config: PostgresConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = _filled(node)
    rows = all_rows(node, collection)
    backup, data = str(tmp_path / "backup"), tmp_path / "restored"
    take(node.backups, backup, keep_going=False, progress=silent, clock=SystemClock())
    other = replace(config, schema=f"{config.schema}_restored")
    for name, value in (
        ("CATALOG_URL", url), ("CATALOG_SCHEMA", other.schema), ("PATH", str(data)),
        ("CACHE_PATH", str(tmp_path / "cache")),
    ):  # fmt: skip
        monkeypatch.setenv(f"OCHREDB_{name}", value)
    assert main(["restore", backup, "--shared"]) == 0
    with _running(url, other, data) as copy:
        assert all_rows(copy, collection) == rows
        assert copy.foundation.catalog.store_id != node.foundation.catalog.store_id
        assert copy.logs.keys.all(collection) == node.logs.keys.all(collection)
        add_rows(copy, collection, 300, 2)
        copy.compactor.compact_now(collection)
        assert check_store(copy.backups, SystemClock()).findings == ()
    assert len(all_rows(node, collection)) == len(rows)
    assert main(["restore", backup, "--shared"]) == 1, "it is not empty any more"
    with _running(url, other, data) as copy:
        assert len(all_rows(copy, collection)) == len(rows) + 2


def test_a_check_reads_every_byte(node: Node, tmp_path: Path) -> None:
    _filled(node)
    report = check_store(node.backups, SystemClock())
    assert (report.findings, report.collections) == ((), 1)
    assert report.objects > 0
    victim = next(
        path for path in (tmp_path / "data" / "objects" / "parts").rglob("*") if path.is_file()
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(data)
    with node.database.write() as session:
        session.run(sql("UPDATE logs SET tail_bytes = tail_bytes + 1"))
    found = check_store(node.backups, SystemClock()).findings
    assert {item.place == "catalog" for item in found} == {True, False}


def test_a_purge_leaves_nothing_in_the_catalog(
    node: Node, server: PostgresServer, config: PostgresConfig
) -> None:
    collection = make_collection(node)
    secret = "erase-me-" * 5
    append(
        node,
        collection,
        operations(Op.ADD, ["a", "b"], [[1.0], [2.0]], documents=[secret, "stays"]),
    )
    append(node, collection, operations(Op.DELETE, ["a"]))
    where = f"SELECT pg_relation_filepath('{config.schema}.fragments')"
    file = server.folder / "data" / str(server.execute(where)[0][0])
    server.execute("CHECKPOINT")
    assert secret.encode() in file.read_bytes()
    surroundings = node.vacuums._around
    run = Vacuum(surroundings, purge=True, progress=lambda *_: None, step=lambda: None).run()
    assert run.problems == ()
    assert any("write-ahead log" in kept for kept in run.kept)
    server.execute("CHECKPOINT")
    file = server.folder / "data" / str(server.execute(where)[0][0])
    assert secret.encode() not in file.read_bytes()
    assert [row["id"] for row in all_rows(node, collection)] == ["b"]


def test_a_vacuum_gives_objects_back(node: Node) -> None:
    collection = _filled(node)
    append(node, collection, operations(Op.DELETE, [f"id-{number}" for number in range(10, 40)]))
    report = Vacuum(
        node.vacuums._around, purge=False, progress=lambda *_: None, step=lambda: None
    ).run()
    assert report.problems == ()
    assert report.objects_deleted > 0
    assert len(all_rows(node, collection)) == 18
