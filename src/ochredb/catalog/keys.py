"""Which metadata keys, with which types of values, the records of a collection have ever had.

Appends insert what is new to them; only a purge takes away what no record has any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ochredb.catalog.core import BindParameter, bindparam, delete, select, update, upsert
from ochredb.catalog.database import Database, Session, whole
from ochredb.catalog.schema import collection_keys, logs
from ochredb.catalog.statement import Statement
from ochredb.errors import Conflict, NotFound

Known = tuple[str, int, str, str]  # Collection, its revision, key, type.

_collection: BindParameter[Any] = bindparam("collection")
_INSERT = Statement(upsert(collection_keys).on_conflict_do_nothing())
_LOCK = Statement(
    select(logs.c.next_offset).where(logs.c.collection == _collection).with_for_update()
)
_ALL = Statement(
    select(collection_keys.c.key, collection_keys.c.type).where(
        collection_keys.c.collection == _collection
    )
)
_FORGET = Statement(
    delete(collection_keys).where(
        collection_keys.c.collection == bindparam("name"),
        collection_keys.c.key == bindparam("unused_key"),
        collection_keys.c.type == bindparam("unused_type"),
    )
)
_GROW_REVISION = Statement(
    update(logs).where(logs.c.collection == bindparam("log")).values(revision=logs.c.revision + 1)
)


class MetadataKeys:
    """Thread-safe. Remembers which rows are there, as of a collection's revision."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._known: set[Known] = set()

    def insert(
        self, session: Session, collection: str, revision: int, keys: Iterable[tuple[str, str]]
    ) -> list[Known]:
        """Insert the (key, type) pairs that are not known; `committed` makes them known."""
        named = [(collection, revision, key, kind) for key, kind in keys]
        new = [known for known in named if known not in self._known]
        for _, _, key, kind in new:
            session.later(_INSERT, collection=collection, key=key, type=kind)
        return new

    def committed(self, inserted: Iterable[Known]) -> None:
        self._known.update(inserted)

    def all(self, collection: str) -> set[tuple[str, str]]:
        """The (key, type) pairs of a collection."""
        with self._db.read() as session:
            return {(key, kind) for key, kind in session.all(_ALL, collection=collection)}

    @whole
    def forget(self, collection: str, next_offset: int, unused: Iterable[tuple[str, str]]) -> None:
        """Forget keys that no record had when the log ended before `next_offset`.

        Raises Conflict, with nothing changed, if something was written since; NotFound. The
        revision grows, so that whoever knows a key of before inserts it again with the next record
        that has it.
        """
        with self._db.write("keys-forget") as session:
            row = session.one(_LOCK, collection=collection)
            if row is None:
                raise NotFound(f"Collection [{collection}] does not exist.")
            if row[0] != next_offset:
                raise Conflict("the collection was written to")
            forgotten = [
                {"name": collection, "unused_key": key, "unused_type": kind} for key, kind in unused
            ]
            session.run_many(_FORGET, forgotten)
            session.run(_GROW_REVISION, log=collection)
