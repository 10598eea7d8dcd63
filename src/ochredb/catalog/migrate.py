"""Creating and migrating a catalog; opening one that is already current costs one row.

All steps of a migration are one SQL transaction: a crash at any moment leaves the old format or the
new one. The format's number is in the row of `store` and, for processes that have the catalog open
meanwhile, in SQLite's `user_version` (`sqlite.py`).
Raises InvalidArgument for a catalog of a newer OchreDB or a file that is not a catalog.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from ochredb.catalog.core import select
from ochredb.catalog.database import Session
from ochredb.catalog.mark import check_mark
from ochredb.catalog.schema import FORMAT_VERSION, store
from ochredb.catalog.seal import Seal
from ochredb.catalog.sqlite import SqliteDatabase, SqliteSession
from ochredb.catalog.statement import Statement, sqlalchemy_dialect
from ochredb.clock import Clock
from ochredb.crash_points import reach
from ochredb.errors import (
    Corrupt,
    InvalidArgument,
    OtherFormat,
    StorageFull,
    Unavailable,
    newer_message,
)
from ochredb.ids import IdSource
from ochredb.storage import files

CATALOG_NAME = "ochredb.sqlite3"
_PAGE_BYTES = 8192
STEPS = Path(__file__).parent / "migrations"
_STORE = Statement(select(store.c.store_id, store.c.format_version))
_INSERT_STORE = Statement(store.insert())


def open_memory(clock: Clock, ids: IdSource) -> tuple[SqliteDatabase, str]:
    """A catalog in memory and its new store id."""
    from ochredb.catalog.schema import metadata

    database = SqliteDatabase(None)
    with database.write() as session:
        connection = session.connection  # type: ignore[attr-defined]
        for table in metadata.sorted_tables:
            create_table(connection, table)
        store_id = insert_store(session, clock, ids)
    return database, store_id


def open_directory(
    root: str,
    clock: Clock,
    ids: IdSource,
    *,
    on_full: Callable[[], None] = lambda: None,
) -> tuple[SqliteDatabase, str]:
    """The catalog in directory `root`, created or migrated if need be, and its store id.

    on_full: see SqliteDatabase. Raises StorageFull; then a second try may find enough space.
    """
    path = os.path.join(root, CATALOG_NAME)
    if not os.path.exists(path) and os.path.exists(os.path.join(root, "objects", "store_id")):
        raise Corrupt(f"the catalog {path} is missing: restore a backup")
    seal = Seal(path)
    seal.hold()
    database = SqliteDatabase(
        path,
        write_lock_path=_write_lock(root),
        format_version=FORMAT_VERSION,
        on_full=on_full,
        seal=seal,
    )
    try:
        return database, _opened(root, path, seal, database, clock, ids)
    except BaseException:
        seal.let_go(seal=False)  # As it was found.
        database.close()
        raise


def _opened(
    root: str, path: str, seal: Seal, database: SqliteDatabase, clock: Clock, ids: IdSource
) -> str:
    """The store id, of a catalog that has what was acknowledged."""
    kept = path + "-wal.kept"
    if seal.is_first:
        _keep_log(path, kept)
    try:
        current = _current_store_id(path)
    except sqlite3.DatabaseError as error:
        refusal = database.translated(error)
        if isinstance(refusal, StorageFull):
            raise refusal from error
        # An SQLITE_ERROR is about tables that are not as ours; other operational ones may pass.
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if isinstance(error, sqlite3.OperationalError) and code != sqlite3.SQLITE_ERROR:
            raise Unavailable(f"cannot open the catalog {path}: {error}") from error
        raise InvalidArgument(f"{path} is not an OchreDB catalog: {error}") from error
    if current is None:
        seal.break_before_write()
        current = _migrate(root, path, clock, ids)
    try:
        check_mark(database, _write_lock(root))
    except Corrupt:
        with contextlib.suppress(OSError):
            os.replace(kept, path + "-wal.lost")
        raise
    if seal.is_first:
        with contextlib.suppress(OSError):
            files.unlink_if_exists(kept)
    return current


def format_version(root: str) -> int | None:
    """The format of the catalog in directory `root`; None if there is none. Opens nothing else.

    Raises InvalidArgument for a file that is not a catalog.
    """
    path = os.path.join(root, CATALOG_NAME)
    try:
        row = _store_row(path)
    except sqlite3.DatabaseError as error:
        raise InvalidArgument(f"{path} is not an OchreDB catalog: {error}") from error
    return None if row is None else int(row[1])


def _write_lock(root: str) -> str:
    return os.path.join(root, "write.lock")


def _keep_log(path: str, kept: str) -> None:
    """A second name for the write-ahead log that somebody who was killed left behind.

    SQLite takes of it what it can, and deletes it; if that is too little, it is evidence.
    """
    # Without hard links, or read-only, it is not kept.
    with contextlib.suppress(OSError):
        files.unlink_if_exists(kept)
        if os.path.getsize(path + "-wal"):
            os.link(path + "-wal", kept)


def _current_store_id(path: str) -> str | None:
    """The store id if the catalog is of this version; None if it must be created or migrated."""
    row = _store_row(path)
    if row is None:
        return None
    store_id, found, marked = row
    if found > FORMAT_VERSION:
        raise OtherFormat(newer_message(path, found, FORMAT_VERSION))
    # A catalog that was put together from a dump has no mark.
    return str(store_id) if found == marked == FORMAT_VERSION else None


def _store_row(path: str) -> tuple[str, int, int] | None:
    """Store id, format, and SQLite's own mark of it; None if nothing is there yet.

    Raises InvalidArgument for somebody else's database.
    """
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
        marked = connection.execute("PRAGMA user_version").fetchone()[0]
    finally:
        connection.close()
    return None if row is None else (row[0], row[1], marked)


def _migrate(root: str, path: str, clock: Clock, ids: IdSource) -> str:
    """Create or migrate under the store's lock, so that processes that start together agree."""
    import alembic.command
    from alembic.config import Config
    from sqlalchemy import create_engine
    from sqlalchemy.exc import OperationalError
    from sqlalchemy.pool import NullPool

    # Others may have the catalog open: they wait for the migration as for any other writer.
    with _locked(os.path.join(root, "lock")), _locked(_write_lock(root)):
        try:
            reach("catalog.locked")
            current = _current_store_id(path)
            if current is not None:
                return current
            _prepare(path)
            engine = create_engine("sqlite://", creator=lambda: _connect(path), poolclass=NullPool)
            config = Config()
            config.set_main_option("script_location", str(STEPS))
            with engine.connect() as sql:
                sql.exec_driver_sql("BEGIN IMMEDIATE")
                config.attributes["connection"] = sql
                alembic.command.upgrade(config, "head")
                sql.exec_driver_sql(f"PRAGMA user_version={FORMAT_VERSION}")
                connection = sql.connection.driver_connection
                assert isinstance(connection, sqlite3.Connection)
                session = SqliteSession(connection)
                row = session.one(_STORE)
                store_id = str(row[0]) if row else insert_store(session, clock, ids)
                reach("migration.committing")
                sql.commit()
                reach("migration.committed")
            engine.dispose()
            directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
            try:  # SQLite syncs the directory for its journal, not for a new database file.
                os.fsync(directory)
            finally:
                os.close(directory)
            reach("catalog.synced")
            return store_id
        except (sqlite3.OperationalError, OperationalError) as error:
            raise Unavailable(f"cannot create the catalog {path}: {error}") from error


def _prepare(path: str) -> None:
    """What is set outside of transactions. It counts as long as the file is empty: new, or left."""
    connection = _connect(path)
    try:
        prepare_pages(connection)
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()
    reach("catalog.created")


def prepare_pages(connection: sqlite3.Connection) -> None:
    """How an empty database shall be laid out."""
    connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")


def _connect(path: str) -> sqlite3.Connection:
    """A connection that begins and ends transactions only when told."""
    connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA fullfsync=ON")
    return connection


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def insert_store(session: Session, clock: Clock, ids: IdSource) -> str:
    store_id = ids.uuid7()
    session.run(
        _INSERT_STORE, store_id=store_id, format_version=FORMAT_VERSION, created_us=clock.now_us()
    )
    return store_id


def create_table(connection: sqlite3.Connection, table: object) -> None:
    """Where there is nothing to migrate: create the tables without importing Alembic."""
    from sqlalchemy import Table
    from sqlalchemy.schema import CreateIndex, CreateTable

    assert isinstance(table, Table)
    dialect = sqlalchemy_dialect(SqliteDatabase.dialect)
    connection.execute(str(CreateTable(table).compile(dialect=dialect)))
    for index in table.indexes:
        connection.execute(str(CreateIndex(index).compile(dialect=dialect)))
