"""Creating and migrating a catalog in PostgreSQL: the steps of `migrate`, in one transaction.

Whoever starts first does it, under an advisory lock that each write transaction of every process
takes too, shared: a migration waits for them, and they find the new format behind it.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ochredb.catalog.postgres_config import PostgresConfig
from ochredb.catalog.schema import FORMAT_VERSION
from ochredb.clock import Clock
from ochredb.crash_points import reach
from ochredb.errors import InvalidArgument, Unavailable, newer_message
from ochredb.ids import IdSource

if TYPE_CHECKING:
    from ochredb.catalog.postgres import PostgresDatabase
    from ochredb.catalog.postgres_session import PostgresConnection

_MIGRATION_TIMEOUT = (
    "SET statement_timeout = 0; SET lock_timeout = '60s';"
    " SET idle_in_transaction_session_timeout = 0"
)
_TABLES = "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace(%s) AND relkind = 'r'"
_STORE = "SELECT store_id, format_version FROM store"

# Beside what the tables have everywhere: what many processes ask of a catalog of many collections.
# Appends touch none of these columns, so rows of `logs` stay where they are (heap-only updates).
_INDEXES = (
    "logs_by_unsettled ON logs (collection) WHERE unsettled_rows > 0",
    "versions_by_creation ON versions (created_us)",
    "collections_in_order ON collections (database_id, created_us, id)",
)


def open_postgres(
    url: str, clock: Clock, ids: IdSource, config: PostgresConfig | None = None
) -> tuple[PostgresDatabase, str]:
    """The catalog at `url`, created or migrated if need be, and its store id.

    clock: the host's; the catalog's is `PostgresDatabase.clock`. Raises InvalidArgument for what is
    no catalog of ours, a newer one, or a server that would lose writes; Unavailable.
    """
    database = _database(url, clock, config)
    with _connected(database) as connection:
        current = _current(database, connection)
        if current is None or current[1] != FORMAT_VERSION:
            return database, _migrate(database, connection, database.clock, ids)
        return database, current[0]


def format_version(url: str, clock: Clock, config: PostgresConfig | None = None) -> int | None:
    """The format of the catalog at `url`; None if there is none. Changes nothing."""
    database = _database(url, clock, config)
    with _connected(database) as connection:
        current = _current(database, connection)
    return None if current is None else current[1]


@contextlib.contextmanager
def _connected(database: PostgresDatabase) -> Iterator[PostgresConnection]:
    """Raises InvalidArgument if the server lets this user or database not in, Unavailable if it is
    away or goes away meanwhile."""
    import psycopg

    from ochredb.catalog.postgres_failures import is_refused

    try:
        connection = database.connect()
    except Unavailable as error:
        if is_refused(error.__cause__):
            raise InvalidArgument(f"catalog_url: {error}") from error
        raise
    try:
        yield connection
    except psycopg.Error as error:
        raise database.translated(error) from error
    finally:
        connection.close()


def _database(url: str, clock: Clock, config: PostgresConfig | None) -> PostgresDatabase:
    try:
        from ochredb.catalog.postgres import PostgresDatabase
    except ImportError as error:
        raise InvalidArgument(
            f"a catalog in PostgreSQL needs `pip install 'ochredb[cluster]'`: {error}"
        ) from error
    rng = random.Random(IdSource(clock).uuid7())
    return PostgresDatabase(url, config or PostgresConfig(), clock, rng)


def _current(database: PostgresDatabase, connection: PostgresConnection) -> tuple[str, int] | None:
    """Store id and format; None if there is nothing yet. Raises InvalidArgument for another's."""
    schema = database.config.schema
    found = connection.execute(_TABLES, [schema]).fetchall()
    tables = {name for (name,) in found}
    if not tables:
        return None
    if not tables.issuperset({"store", "alembic_version"}):
        raise InvalidArgument(
            f"schema {schema} of {database.place} is not an OchreDB catalog: it has other tables;"
            " give OchreDB a schema of its own"
        )
    row = connection.execute(_STORE).fetchone()
    if row is None:
        raise InvalidArgument(f"schema {schema} of {database.place} names no store")
    if row[1] > FORMAT_VERSION:
        told = f"the catalog at {database.place}"
        raise InvalidArgument(newer_message(told, row[1], FORMAT_VERSION))
    return str(row[0]), int(row[1])


def _migrate(
    database: PostgresDatabase, connection: PostgresConnection, clock: Clock, ids: IdSource
) -> str:
    """Create or migrate, alone, so that processes that start together agree."""
    import alembic.command
    import psycopg
    from alembic.config import Config
    from sqlalchemy import create_engine
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.pool import NullPool

    from ochredb.catalog.migrate import STEPS, insert_store

    config = Config()
    config.set_main_option("script_location", str(STEPS))
    try:
        connection.patience_s = math.inf
        connection.execute(_MIGRATION_TIMEOUT)
        connection.autocommit = False
        engine = create_engine(
            "postgresql+psycopg://", creator=lambda: connection, poolclass=NullPool
        )
        with engine.connect() as sql:  # From here on: what it asks first, it rolls back.
            sql.exec_driver_sql(f"SELECT pg_advisory_xact_lock({database.lock_key})")
            sql.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {database.config.schema}")
            reach("catalog.locked")
            current = _current(database, connection)
            if current is not None and current[1] == FORMAT_VERSION:
                return current[0]
            config.attributes["connection"] = sql
            alembic.command.upgrade(config, "head")
            for index in _INDEXES:
                sql.exec_driver_sql(f"CREATE INDEX IF NOT EXISTS {index}")
            if current is None:
                store_id = insert_store(connection.session, clock, ids)
            else:
                store_id = current[0]
            reach("migration.committing")
            sql.commit()
            reach("migration.committed")
            return store_id
    except DBAPIError as error:
        raise database.translated(error.orig or error) from error
    except psycopg.Error as error:
        raise database.translated(error) from error
