"""Creating and opening a catalog: many at once, newer ones, and files that are something else."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect

from ochredb.catalog.migrate import CATALOG_NAME, open_directory, open_memory
from ochredb.catalog.schema import FORMAT_VERSION, metadata
from ochredb.catalog.seal import SEAL_FILE
from ochredb.catalog.sqlite import SqliteSession
from ochredb.clock import SystemClock
from ochredb.errors import InvalidArgument, Unavailable
from ochredb.ids import IdSource

from .kernel import ROOT


def _open(root: Path) -> str:
    database, store_id = open_directory(str(root), SystemClock(), IdSource())
    database.close()
    return store_id


_OPENER = """
    import sys
    from ochredb.ids import IdSource
    from ochredb_node.node import Node, NodeConfig

    node = Node(NodeConfig(path=sys.argv[1]))
    sys.stdin.readline()
    node.start(background=False)
    node.namespace.create_tenant(IdSource().uuid7())
    print(node.foundation.catalog.store_id, node.store.get("store_id").decode())
    node.close()
"""


def test_eight_processes_create_one_store_at_once(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_OPENER), str(tmp_path / "store")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(8)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=100)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 8
    assert len({name for answer in answers for name in answer}) == 1
    database, store_id = open_directory(str(tmp_path / "store"), SystemClock(), IdSource())
    assert store_id == answers[0][0]
    with database.read() as session:
        assert isinstance(session, SqliteSession)
        assert session.connection.execute("SELECT count(*) FROM tenants").fetchone() == (9,)
        assert session.connection.execute("SELECT count(*) FROM databases").fetchone() == (1,)
    database.close()


def test_opening_again_keeps_the_store_and_imports_no_alembic(tmp_path: Path) -> None:
    store_id = _open(tmp_path)
    assert _open(tmp_path) == store_id
    script = f"""
        import sys
        from pathlib import Path
        from tests.unit.test_migrate import open_directory, SystemClock, IdSource

        for name in [name for name in sys.modules if name.startswith("alembic")]:
            del sys.modules[name]
        database, store_id = open_directory({str(tmp_path)!r}, SystemClock(), IdSource())
        assert store_id == {store_id!r}
        assert not any(name.startswith("alembic") for name in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=ROOT)


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    _open(tmp_path)
    connection = sqlite3.connect(tmp_path / CATALOG_NAME)
    connection.execute(f"UPDATE store SET format_version = {FORMAT_VERSION + 1}")
    connection.commit()
    connection.close()
    (tmp_path / SEAL_FILE).unlink()
    before = (tmp_path / CATALOG_NAME).read_bytes()
    with pytest.raises(InvalidArgument, match=f"format version {FORMAT_VERSION + 1}.*newer"):
        _open(tmp_path)
    assert (tmp_path / CATALOG_NAME).read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"just text, no database at all" * 50, b"SQLite format 3\0" + b"\xff" * 4_000]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CATALOG_NAME).write_bytes(content)
    with pytest.raises(InvalidArgument, match="not an OchreDB catalog"):
        _open(tmp_path)
    assert (tmp_path / CATALOG_NAME).read_bytes() == content


@pytest.mark.parametrize("table", ["recipes (name TEXT)", "store (name TEXT)"])
def test_somebody_else_s_database_is_refused_and_left_alone(tmp_path: Path, table: str) -> None:
    connection = sqlite3.connect(tmp_path / CATALOG_NAME)
    connection.execute(f"CREATE TABLE {table}")
    connection.commit()
    connection.close()
    before = (tmp_path / CATALOG_NAME).read_bytes()
    with pytest.raises(InvalidArgument, match="not an OchreDB catalog"):
        _open(tmp_path)
    assert (tmp_path / CATALOG_NAME).read_bytes() == before


def test_what_a_crash_during_creation_left_is_completed(tmp_path: Path) -> None:
    """An empty file, or some of the tables; page size and vacuum mode are set all the same."""
    (tmp_path / CATALOG_NAME).touch()
    _open(tmp_path)
    connection = sqlite3.connect(tmp_path / CATALOG_NAME)
    assert connection.execute("PRAGMA page_size").fetchone() == (8192,)
    assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)
    for statement in ("DELETE FROM store", "DELETE FROM alembic_version", "DROP TABLE jobs"):
        connection.execute(statement)
    connection.commit()
    connection.close()
    (tmp_path / SEAL_FILE).unlink()
    store_id = _open(tmp_path)
    assert _open(tmp_path) == store_id


def test_a_store_of_format_1_is_migrated_and_stays_itself(tmp_path: Path) -> None:
    """Also if a crash ended the first attempt after the table was made."""
    store_id = _open(tmp_path)
    for table_is_left in (False, True):
        connection = sqlite3.connect(tmp_path / CATALOG_NAME)
        if not table_is_left:
            connection.execute("DROP TABLE pins")
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
        connection.execute("UPDATE store SET format_version = 1")
        connection.commit()
        connection.close()
        (tmp_path / SEAL_FILE).unlink()
        assert _open(tmp_path) == store_id
        connection = sqlite3.connect(tmp_path / CATALOG_NAME)
        assert connection.execute("SELECT count(*) FROM pins").fetchone() == (0,)
        found = connection.execute("SELECT format_version FROM store").fetchone()
        assert found == (FORMAT_VERSION,)
        connection.close()


def test_a_catalog_that_cannot_be_opened_now_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / CATALOG_NAME).mkdir()
    with pytest.raises(Unavailable, match="cannot open"):
        _open(tmp_path)
    with pytest.raises((Unavailable, OSError)):
        _open(tmp_path / "nowhere")


def test_migrations_and_the_schema_describe_the_same_tables(tmp_path: Path) -> None:
    """What Alembic creates on disk and what `open_memory` creates are both the schema's."""
    _open(tmp_path)
    engine = create_engine(f"sqlite:///{tmp_path / CATALOG_NAME}")
    found = inspect(engine)
    memory, _ = open_memory(SystemClock(), IdSource())
    assert set(found.get_table_names()) == {*metadata.tables, "alembic_version"}
    with memory.read() as session:
        assert isinstance(session, SqliteSession)
        for table in metadata.sorted_tables:
            names = [column["name"] for column in found.get_columns(table.name)]
            assert names == [column.name for column in table.columns]
            described = session.connection.execute(f"PRAGMA table_info({table.name})").fetchall()
            assert names == [row[1] for row in described]
            indexes = {index["name"] for index in found.get_indexes(table.name)}
            assert indexes >= {index.name for index in table.indexes}
    engine.dispose()
    memory.close()
