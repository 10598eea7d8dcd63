"""Creating and migrating a catalog; opening one that is already current costs one row.

Raises InvalidArgument for a catalog of a newer OchreDB or a file that is not a catalog.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from ochredb.catalog.core import select
from ochredb.catalog.database import Session, SqliteDatabase
from ochredb.catalog.schema import FORMAT_VERSION, store
from ochredb.catalog.statement import Statement, sqlalchemy_dialect
from ochredb.clock import Clock
from ochredb.errors import InvalidArgument, Unavailable
from ochredb.ids import IdSource

CATALOG_NAME = "ochredb.sqlite3"
_PAGE_BYTES = 8192
_STORE = Statement(select(store.c.store_id, store.c.format_version))
_INSERT_STORE = Statement(store.insert())


def open_memory(clock: Clock, ids: IdSource) -> tuple[SqliteDatabase, str]:
    """A catalog in memory and its new store id."""
    from ochredb.catalog.schema import metadata

    database = SqliteDatabase(None)
    with database.write() as session:
        connection = session.connection  # type: ignore[attr-defined]
        for table in metadata.sorted_tables:
            _create_table(connection, table)
        store_id = _insert_store(session, clock, ids)
    return database, store_id


def open_directory(root: str, clock: Clock, ids: IdSource) -> tuple[SqliteDatabase, str]:
    """The catalog in directory `root`, created or migrated if need be, and its store id."""
    path = os.path.join(root, CATALOG_NAME)
    try:
        current = _current_store_id(path)
    except sqlite3.DatabaseError as error:
        # An SQLITE_ERROR is about tables that are not as ours; other operational ones may pass.
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if isinstance(error, sqlite3.OperationalError) and code != sqlite3.SQLITE_ERROR:
            raise Unavailable(f"cannot open the catalog {path}: {error}") from error
        raise InvalidArgument(f"{path} is not an OchreDB catalog: {error}") from error
    if current is None:
        current = _migrate(root, path, clock, ids)
    return SqliteDatabase(path, write_lock_path=os.path.join(root, "write.lock")), current


def _current_store_id(path: str) -> str | None:
    """The store id if the catalog is of this version; None if it must be created or migrated."""
    if not os.path.exists(path):
        return None
    connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
    try:
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        tables = {name for (name,) in found}
        if tables and tables.isdisjoint({"store", "alembic_version"}):
            raise InvalidArgument(f"{path} is not an OchreDB catalog: it has other tables")
        row = (
            connection.execute("SELECT store_id, format_version FROM store").fetchone()
            if "store" in tables
            else None
        )
    finally:
        connection.close()
    if row is None:
        return None
    if row[1] > FORMAT_VERSION:
        raise InvalidArgument(
            f"{path} has format version {row[1]}; this OchreDB reads up to {FORMAT_VERSION}: "
            "install a newer OchreDB"
        )
    return str(row[0]) if row[1] == FORMAT_VERSION else None


def _migrate(root: str, path: str, clock: Clock, ids: IdSource) -> str:
    """Create or migrate under the store's lock, so that processes that start together agree."""
    import alembic.command
    from alembic.config import Config
    from sqlalchemy import URL, create_engine
    from sqlalchemy.exc import OperationalError
    from sqlalchemy.pool import NullPool

    lock = os.open(os.path.join(root, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        current = _current_store_id(path)
        if current is not None:
            return current
        connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
        try:
            # Both count as long as the file is empty: new, or left behind by a crash.
            connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
        finally:
            connection.close()
        # Not as text: a path may hold "?" and "%".
        engine = create_engine(URL.create("sqlite", database=path), poolclass=NullPool)
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with engine.connect() as sql:
            sql.exec_driver_sql("PRAGMA synchronous=FULL")
            config.attributes["connection"] = sql
            alembic.command.upgrade(config, "head")
            sql.commit()
        engine.dispose()
        database = SqliteDatabase(path)
        with database.write() as session:
            row = session.one(_STORE)
            store_id = str(row[0]) if row else _insert_store(session, clock, ids)
        database.close()
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:  # SQLite syncs the directory for its journal, not for a new database file.
            os.fsync(directory)
        finally:
            os.close(directory)
        return store_id
    except (sqlite3.OperationalError, OperationalError) as error:
        raise Unavailable(f"cannot create the catalog {path}: {error}") from error
    finally:
        os.close(lock)


def _insert_store(session: Session, clock: Clock, ids: IdSource) -> str:
    store_id = ids.uuid7()
    session.run(
        _INSERT_STORE, store_id=store_id, format_version=FORMAT_VERSION, created_us=clock.now_us()
    )
    return store_id


def _create_table(connection: sqlite3.Connection, table: object) -> None:
    """In memory there is nothing to migrate: create the tables without importing Alembic."""
    from sqlalchemy import Table
    from sqlalchemy.schema import CreateIndex, CreateTable

    assert isinstance(table, Table)
    dialect = sqlalchemy_dialect(SqliteDatabase.dialect)
    connection.execute(str(CreateTable(table).compile(dialect=dialect)))
    for index in table.indexes:
        connection.execute(str(CreateIndex(index).compile(dialect=dialect)))
