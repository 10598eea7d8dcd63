"""A state of a catalog in PostgreSQL as a catalog of SQLite: one file, as backups have it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from ochredb.catalog.migrate import create_table, prepare_pages
from ochredb.catalog.postgres_session import PostgresSession
from ochredb.catalog.session import Row
from ochredb.catalog.statement import Statement

_ROWS_AT_ONCE = 100  # Some hold a request of half a MB.


def copy_rows(session: PostgresSession, target: sqlite3.Connection) -> None:
    """Make the tables in an empty database, and fill them with what a consistent session sees.

    Cost: about 10 microseconds a row; memory for 100 of them.
    """
    from sqlalchemy import Column, MetaData, String, Table, select

    from ochredb.catalog.schema import FORMAT_VERSION, metadata

    prepare_pages(target)
    # With the number of the last step, none is done again when the copy is opened as a store.
    steps = Table(
        "alembic_version", MetaData(), Column("version_num", String(32), primary_key=True)
    )
    for table in (*metadata.sorted_tables, steps):
        create_table(target, table)
        places = ", ".join("?" for _ in table.columns)
        target.execute("BEGIN")
        target.executemany(
            f'INSERT INTO "{table.name}" VALUES ({places})',
            _rows(session, Statement(select(table))),
        )
        target.execute("COMMIT")
    target.execute(f"PRAGMA user_version={FORMAT_VERSION}")


def _rows(session: PostgresSession, statement: Statement) -> Iterator[Row]:
    for rows in session.portions(statement, _ROWS_AT_ONCE):
        yield from rows
