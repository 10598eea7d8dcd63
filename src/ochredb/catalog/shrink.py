"""Giving back what the catalog's files take: for a vacuum, not for every second.

`rewrite` leaves nothing of what was deleted in the database's pages; that is in the write-ahead log
until `cut_log` has succeeded.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from ochredb.catalog.database import Database
from ochredb.catalog.sqlite import SqliteDatabase, SqliteSession
from ochredb.crash_points import reach

if TYPE_CHECKING:
    from ochredb.catalog.postgres import PostgresDatabase

_CUT_WAIT_MS = 200  # For readers: writers wait as long.
_IN_THE_WAY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def cut_log(database: SqliteDatabase) -> bool:
    """Copy the write-ahead log into the database and cut its file to nothing, if that can be.

    Waits a little for readers, and holds writers up meanwhile. Returns whether it is cut: a long
    read, of a backup for one, may be in the way.
    """
    with database.writing() as session:
        connection = session.connection
        before = connection.execute("PRAGMA busy_timeout").fetchone()[0]
        connection.execute(f"PRAGMA busy_timeout={_CUT_WAIT_MS}")
        try:
            database.copy_back(connection)  # Then nothing is left to copy, and the seal knows all.
            row = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            reach("catalog.log-cut")
            return bool(row[0] == 0)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode not in _IN_THE_WAY:
                raise database.translated(error) from error
            return False
        except OSError as error:
            raise database.translated(error) from error
        finally:
            connection.execute(f"PRAGMA busy_timeout={before}")


def rewrite(database: Database) -> str | None:
    """Write the whole database anew, without what was deleted; returns what is left, if it is.

    SQLite: readers go on, writers wait, about a second per 100 MB. It needs as much memory, and as
    much disk for a while. PostgreSQL: a table is locked while it is written.
    """
    if not isinstance(database, SqliteDatabase):
        return _postgres(database).rewrite()
    with database.writing() as session:
        try:
            session.connection.execute("VACUUM")
        except sqlite3.Error as error:
            raise database.translated(error) from error
        reach("catalog.rewritten")
    return None


def size_bytes(database: Database) -> int:
    """Of the database; SQLite's with its write-ahead log."""
    if not isinstance(database, SqliteDatabase):
        return _postgres(database).size_bytes()
    pages, page_bytes = _number(database, "page_count"), _number(database, "page_size")
    return pages * page_bytes + database.wal_bytes()


def free_pages(database: SqliteDatabase) -> int:
    """Pages that hold nothing."""
    return _number(database, "freelist_count")


def _postgres(database: Database) -> PostgresDatabase:
    from ochredb.catalog.postgres import PostgresDatabase  # It is there if such a database is.

    assert isinstance(database, PostgresDatabase)
    return database


def _number(database: SqliteDatabase, pragma: str) -> int:
    with database.read() as session:
        assert isinstance(session, SqliteSession)
        return int(session.connection.execute(f"PRAGMA {pragma}").fetchone()[0])
