"""Catalog files that no process has open: copies of a state, and what is done to them.

A copy is one file without a write-ahead log, so that it can be moved about.
"""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ochredb.catalog.core import bindparam, delete, exists, or_, select, update
from ochredb.catalog.database import Session
from ochredb.catalog.schema import (
    FORMAT_VERSION,
    collections,
    databases,
    fragments,
    jobs,
    logs,
    objects,
    parts,
    pins,
    quarantine,
    references,
    store,
    version_parts,
    versions,
)
from ochredb.catalog.sqlite import SqliteDatabase, SqliteSession
from ochredb.catalog.statement import Statement
from ochredb.errors import Corrupt, InvalidArgument, StorageFull, Unavailable, newer_message
from ochredb.parts.manifest import Manifest
from ochredb.storage import files

_ADOPT = Statement(update(store).values(store_id=bindparam("new_id")))


def _newest(collection: Any, version: Any) -> Any:
    """SQL: these columns name the newest version of a collection."""
    return exists().where(logs.c.collection == collection, logs.c.version == version)


# What belongs to the processes of the store, and what only an older version refers to.
_PRUNE = tuple(
    Statement(element)
    for element in (
        delete(pins),
        delete(jobs),
        delete(references).where(
            or_(
                references.c.kind == "pin",
                (references.c.kind == "version")
                & ~_newest(references.c.collection, references.c.number),
            )
        ),
        delete(versions).where(~_newest(versions.c.collection, versions.c.version)),
        delete(version_parts).where(~_newest(version_parts.c.collection, version_parts.c.version)),
        delete(parts).where(~exists().where(version_parts.c.part == parts.c.id)),
        delete(objects).where(~exists().where(references.c.key == objects.c.key)),
    )
)

_COLLECTIONS = Statement(
    select(
        collections.c.id,
        databases.c.tenant,
        databases.c.name,
        collections.c.name,
        logs.c.version,
        logs.c.indexed_offset,
        logs.c.next_offset - 1,
        logs.c.dimension,
    )
    .join(databases, databases.c.id == collections.c.database_id)
    .join(logs, logs.c.collection == collections.c.id)
    .order_by(collections.c.id)
)
_OBJECTS = Statement(select(objects.c.key, objects.c.size).order_by(objects.c.key))
_MANIFESTS = Statement(select(parts.c.manifest))
_BITMAPS = Statement(
    select(version_parts.c.deleted_key, parts.c.manifest)
    .join(parts, parts.c.id == version_parts.c.part)
    .where(version_parts.c.deleted_key.is_not(None))
)
_RANGES = Statement(
    select(
        fragments.c.object_key, fragments.c.byte_start, fragments.c.byte_stop, fragments.c.checksum
    )
    .where(fragments.c.object_key.is_not(None))
    .order_by(fragments.c.object_key, fragments.c.byte_start)
)
_QUARANTINED = Statement(
    select(quarantine.c.object_key, objects.c.size, quarantine.c.checksum)
    .join(objects, objects.c.key == quarantine.c.object_key)
    .order_by(quarantine.c.object_key)
)


@dataclass(frozen=True, slots=True)
class CollectionState:
    """A collection in a copy: `last_offset` is the newest operation that it has."""

    id: str
    tenant: str
    database: str
    name: str
    version: int
    indexed_offset: int
    last_offset: int
    dimension: int | None


@dataclass(frozen=True, slots=True)
class Contents:
    """What a copy refers to.

    objects: keys and sizes, by key. manifests: of all parts. bitmaps: keys of deleted rows and the
    rows of their parts. ranges: (key, first byte, end, checksum) of fragments, in order, those in
    quarantine included.
    """

    collections: list[CollectionState]
    objects: list[tuple[str, int]]
    manifests: list[Manifest]
    bitmaps: list[tuple[str, int]]
    ranges: list[tuple[str, int, int, int]]


def contents(database: SqliteDatabase) -> Contents:
    """Read a copy."""
    with database.read_consistent() as session:
        return Contents(
            [CollectionState(*row) for row in session.all(_COLLECTIONS)],
            [(key, size) for key, size in session.all(_OBJECTS)],
            [Manifest.from_json(text) for (text,) in session.all(_MANIFESTS)],
            [(key, Manifest.from_json(text).rows) for key, text in session.all(_BITMAPS)],
            sorted(
                [
                    *(
                        (key, start, stop, check)
                        for key, start, stop, check in session.all(_RANGES)
                    ),
                    *((key, 0, size, check) for key, size, check in session.all(_QUARANTINED)),
                ]
            ),
        )


def copy_state(session: Session, path: str) -> None:
    """Write what a consistent session sees to a new file, synced. Holds up no writer.

    By SQLite's backup interface: the database's own files are never opened by path.
    Cost: about a second per GB, the interpreter lock released. From PostgreSQL: row by row.
    Raises StorageFull, Unavailable.
    """
    target = sqlite3.connect(path, isolation_level=None)
    try:
        target.execute("PRAGMA synchronous=OFF")
        if isinstance(session, SqliteSession):
            session.connection.backup(target)
        else:
            # Late: it is there if such a session is.
            from ochredb.catalog.postgres_copy import copy_rows
            from ochredb.catalog.postgres_session import PostgresSession

            assert isinstance(session, PostgresSession)
            copy_rows(session, target)
        target.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        kind = StorageFull if full else Unavailable
        raise kind(f"cannot copy the catalog: {error}") from error
    finally:
        target.close()
    _sync(path)


def check_copy(path: str) -> str:
    """The store id in a copy. Raises Corrupt for a damaged one, InvalidArgument for a newer."""
    connection = sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True, isolation_level=None)
    try:
        problems = connection.execute("PRAGMA integrity_check(3)").fetchall()
        if problems != [("ok",)]:
            raise Corrupt(f"the catalog {path} is damaged: {problems[0][0]}")
        row = connection.execute("SELECT store_id, format_version FROM store").fetchone()
    except sqlite3.DatabaseError as error:
        raise Corrupt(f"the catalog {path} is damaged: {error}") from error
    finally:
        connection.close()
    if row is None:
        raise Corrupt(f"the catalog {path} names no store")
    if row[1] > FORMAT_VERSION:
        raise InvalidArgument(newer_message(path, row[1], FORMAT_VERSION))
    return str(row[0])


def prune(path: str) -> None:
    """Leave the newest version of each collection with its log, and nothing of the processes.

    Idempotency keys stay: a client may repeat a write after a restore.
    """
    database = SqliteDatabase(path)
    try:
        with database.write("backup-prune") as session:
            for statement in _PRUNE:
                session.run(statement)
    finally:
        database.close()
    _execute(path, "VACUUM")
    _sync(path)


def adopt(path: str, store_id: str) -> None:
    """Make a copy the catalog of another store, ready to be put in place."""
    database = SqliteDatabase(path)
    try:
        with database.write("restore-adopt") as session:
            session.run(_ADOPT, new_id=store_id)
    finally:
        database.close()
    _execute(path, "PRAGMA journal_mode=WAL")
    _sync(path)


def _execute(path: str, text: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute(text)
    except sqlite3.Error as error:
        raise Unavailable(f"cannot write the catalog {path}: {error}") from error
    finally:
        connection.close()


def _sync(path: str) -> None:
    with files.opened(path, os.O_RDWR) as descriptor:
        files.sync(descriptor)


def _quoted(path: str) -> str:
    return quote(os.path.abspath(path))
