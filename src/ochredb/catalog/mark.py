"""The mark of the last write that was acknowledged, in the file that writers lock.

A write-ahead log that is cut, damaged or deleted is a shorter one to SQLite: what it held is gone
without a word. So after each commit that appends, the collection and its next offset are written
here, without a sync: it costs a microsecond, and a kill leaves it as it is. Power loss may leave an
older mark, never a newer one than the catalog, whose commit was synced before. Who opens a store
compares.

    magic 8 bytes | collection id, 40 bytes, zero-padded | next offset, 8 | xxh3-64 of these, 8
"""

from __future__ import annotations

import os
import struct

from ochredb.catalog.core import bindparam, select
from ochredb.catalog.database import Database, Session
from ochredb.catalog.schema import logs
from ochredb.catalog.seal import NO_MARK
from ochredb.catalog.sqlite import SqliteSession
from ochredb.catalog.statement import Statement
from ochredb.checksum import xxh3
from ochredb.errors import Corrupt

_MARK = struct.Struct("<8s40sQQ")
_MAGIC = b"OCHRMARK"
_NEXT_OFFSET = Statement(
    select(logs.c.next_offset).where(logs.c.collection == bindparam("collection"))
)
assert _MARK.size == len(NO_MARK)


def acknowledge(session: Session, collection: str, next_offset: int) -> None:
    """When this transaction is committed, remember that the collection's log was so long."""
    if isinstance(session, SqliteSession):
        session.mark = encode(collection, next_offset)


def forget(session: Session) -> None:
    """This transaction drops collections: let none of them be missed."""
    if isinstance(session, SqliteSession):
        session.mark = NO_MARK


def encode(collection: str, next_offset: int) -> bytes:
    """The mark's bytes; none for an id that is longer than ids are."""
    name = collection.encode()
    if len(name) > 40:
        return NO_MARK
    body = _MARK.pack(_MAGIC, name, next_offset, 0)[:-8]
    return body + xxh3(body).to_bytes(8, "little")


def decode(data: bytes) -> tuple[str, int] | None:
    """Collection and next offset; None if there is no mark, or a damaged one."""
    if len(data) != _MARK.size or xxh3(data[:-8]) != int.from_bytes(data[-8:], "little"):
        return None
    magic, name, next_offset, _ = _MARK.unpack(data)
    return (name.rstrip(b"\0").decode(), int(next_offset)) if magic == _MAGIC else None


def check_mark(database: Database, lock_path: str) -> None:
    """Raises Corrupt if the catalog has not what was acknowledged. Cost: 20 µs.

    Other processes write and drop meanwhile: what the catalog lacks counts only if the mark, which
    a drop takes away before it commits, says the same before and after the look.
    """
    while True:
        marked = _read(lock_path)
        if marked is None:
            return
        collection, expected = marked
        with database.read() as session:
            row = session.one(_NEXT_OFFSET, collection=collection)
        if row is not None and row[0] >= expected:
            return
        if _read(lock_path) == marked:
            break
    found = "is not there" if row is None else f"ends at {row[0] - 1}"
    raise Corrupt(
        f"the catalog has lost writes: operation {expected - 1} of collection {collection} was"
        f" acknowledged, and its log {found}. Was its -wal file damaged or deleted? Restore a"
        f" backup; without {os.path.basename(lock_path)} it is opened as it is"
    )


def _read(lock_path: str) -> tuple[str, int] | None:
    """None also if nobody wrote yet, or it cannot be told."""
    try:
        with open(lock_path, "rb") as file:
            return decode(file.read(len(NO_MARK)))
    except OSError:
        return None
