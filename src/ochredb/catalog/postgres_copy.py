"""A state of a catalog in PostgreSQL as one file of SQLite, as backups have it; and back."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from urllib.parse import quote

from ochredb.catalog.core import delete, select
from ochredb.catalog.database import Database
from ochredb.catalog.migrate import create_table, prepare_pages
from ochredb.catalog.postgres_session import PostgresSession
from ochredb.catalog.schema import collections
from ochredb.catalog.session import Row
from ochredb.catalog.statement import Statement
from ochredb.errors import InvalidArgument

_ROWS_AT_ONCE = 100  # Some hold a request of half a MB.
_ANY = Statement(select(collections.c.id).limit(1))


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


def fill(database: Database, path: str) -> None:
    """Put the rows of a copy into a new catalog, in one transaction; its store id stays its own.

    Raises InvalidArgument if somebody has made collections there.
    """
    from sqlalchemy import insert

    from ochredb.catalog.schema import metadata

    source = sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=ro", uri=True)
    tables = [table for table in metadata.sorted_tables if table.name != "store"]
    try:
        with database.write("restore-adopt") as session:
            if session.one(_ANY) is not None:
                raise InvalidArgument("the catalog has collections: restore into a new schema")
            for table in tables:  # The default tenant, if a process was here before.
                session.later(Statement(delete(table)))
                names = [column.name for column in table.columns]
                columns = ", ".join(f'"{name}"' for name in names)
                rows = source.execute(f'SELECT {columns} FROM "{table.name}"')
                into = Statement(insert(table))
                while some := rows.fetchmany(_ROWS_AT_ONCE):
                    session.run_many(into, [dict(zip(names, row, strict=True)) for row in some])
    finally:
        source.close()
