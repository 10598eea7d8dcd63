"""Objects and who keeps them alive: references, and the life of an object's row.

An object's row is `live` until garbage collection marks it `deleting`, which is final. The
transaction that removes an object's last reference stamps `unreferenced_us`; the grace period
counts from then. Every committer inserts the rows of what it introduces. The sweep of orphans
commits a row in state `swept` before it deletes, and that row stays for days: a writer that slept
past the sweep finds it and fails, instead of referring to what is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ochredb.catalog.core import (
    BindParameter,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
    update,
    upsert,
)
from ochredb.catalog.database import Database, Session, whole
from ochredb.catalog.schema import objects, parts, references, version_parts, versions
from ochredb.catalog.statement import Statement
from ochredb.errors import Conflict

_key: BindParameter[Any] = bindparam("key")
_INSERT = Statement(upsert(objects).on_conflict_do_nothing())
_INSERT_REFERENCE = Statement(insert(references))
_LOCK = Statement(select(objects.c.state).where(objects.c.key == _key).with_for_update())
_STATE = Statement(select(objects.c.state).where(objects.c.key == _key))
_REVIVE = Statement(
    update(objects).where(objects.c.key == bindparam("object_key")).values(unreferenced_us=None)
)
_held = (
    references.c.collection == bindparam("collection"),
    references.c.kind == bindparam("kind"),
    references.c.number >= bindparam("number_min"),
    references.c.number <= bindparam("number_max"),
)
_KEYS_HELD = Statement(select(references.c.key).where(*_held).distinct())
_KEYS_OF_COLLECTION = Statement(
    select(references.c.key).where(references.c.collection == bindparam("collection")).distinct()
)
_RELEASE = Statement(delete(references).where(*_held))
_RELEASE_ONE = Statement(
    delete(references).where(
        references.c.key == bindparam("key"),
        references.c.kind == bindparam("kind"),
        references.c.collection == bindparam("collection"),
        references.c.number == bindparam("number"),
    )
)
_RELEASE_COLLECTION = Statement(
    delete(references).where(references.c.collection == bindparam("collection"))
)
_STAMP = Statement(
    update(objects)
    .where(
        objects.c.key == bindparam("object_key"),
        ~exists().where(references.c.key == objects.c.key),
    )
    .values(unreferenced_us=bindparam("now_us"))
)
_DELETE_PARTS = Statement(delete(parts).where(parts.c.collection == bindparam("collection")))
_DELETE_VERSION_PARTS = Statement(
    delete(version_parts).where(version_parts.c.collection == bindparam("collection"))
)
_DELETE_VERSIONS = Statement(
    delete(versions).where(versions.c.collection == bindparam("collection"))
)
# A pin that is taken while the last reference goes keeps an object that has a stamp.
_due = (
    select(objects.c.key)
    .where(
        objects.c.unreferenced_us <= bindparam("cutoff_us"),
        objects.c.state == "live",
        ~exists().where(references.c.key == objects.c.key),
    )
    .order_by(objects.c.unreferenced_us)
    .limit(bindparam("limit"))
)
_DUE = Statement(_due.with_for_update(of=objects, skip_locked=True))
_ANY_DUE = Statement(_due)
_AHEAD = Statement(
    select(objects.c.key)
    .where(objects.c.unreferenced_us > bindparam("ahead_us"), objects.c.state == "live")
    .limit(1)
)
_LOCK_AHEAD = Statement(
    select(objects.c.key)
    .where(objects.c.unreferenced_us > bindparam("ahead_us"), objects.c.state == "live")
    .order_by(objects.c.key)
    .with_for_update()
)
_STAMP_ANEW = Statement(
    update(objects)
    .where(objects.c.key == bindparam("object_key"))
    .values(unreferenced_us=bindparam("now_us"))
)
_REFERENCED = Statement(select(references.c.key).where(references.c.key == _key).limit(1))
_MARK = Statement(
    update(objects).where(objects.c.key == bindparam("object_key")).values(state="deleting")
)
_DELETING = Statement(
    select(objects.c.key)
    # The time narrows it to few rows by its index: this is asked every few seconds.
    .where(objects.c.unreferenced_us.is_not(None), objects.c.state == "deleting")
    .limit(bindparam("limit"))
)
_FORGET = Statement(delete(objects).where(objects.c.key == _key))
_COUNT = Statement(select(func.count()).select_from(objects))
_COUNT_UNREFERENCED = Statement(
    select(func.count())
    .select_from(objects)
    .where(objects.c.unreferenced_us.is_not(None), objects.c.state != "swept")
)
_FORGET_SWEPT = Statement(
    delete(objects).where(
        objects.c.state == "swept", objects.c.unreferenced_us <= bindparam("cutoff_us")
    )
)


class Swept(Conflict):
    """The object was taken for an orphan: write it again under a new key."""


@dataclass(slots=True)
class Introduction:
    """Of an object, shared by all who have something in it, whichever transactions they end up in.

    begun: one of them has inserted the object's row, whatever became of that transaction.
    """

    begun: bool = False


def introduce_shared(session: Session, key: str, size: int, introduction: Introduction) -> None:
    """Insert the row of an object that other transactions may introduce, too.

    Raises Swept if it was an orphan to a sweep; or if it was introduced earlier and is not known
    any more: what the others had in it has been folded meanwhile, and the object collected.
    """
    if session.run(_INSERT, key=key, size=size, state="live", unreferenced_us=None) == 0:
        row = session.one(_LOCK, key=key)
        if row is None or row[0] != "live":
            raise Swept(f"object {key} was swept: write it again under a new key")
    elif introduction.begun:  # Looked at after the insertion: whoever was first has said so.
        session.run(_FORGET, key=key)
        raise Swept(f"object {key} was collected: write it again under a new key")
    introduction.begun = True


def introduce(session: Session, sizes: Iterable[tuple[str, int]]) -> None:
    """Insert the rows of new objects. Raises Swept if a sweep took one of them for an orphan."""
    for key, size in sorted(sizes):  # A sweep may insert rows for the same keys, in this order.
        introduce_shared(session, key, size, Introduction())


def lock(session: Session, keys: Iterable[str]) -> None:
    """Lock rows of objects, in the order in which everybody does.

    First of all of a transaction that refers to some and lets go of others, as its parts would each
    begin anew. And before references go: of two that let go of one object the second must see the
    first. Else neither is the last under READ COMMITTED, and the object stays for ever.
    """
    session.each(_LOCK, [{"key": key} for key in sorted(set(keys))])


def refer(
    session: Session, keys: Iterable[str], *, kind: str, collection: str, number: int
) -> None:
    """Keep objects alive. Raises Conflict if one of them is being deleted."""
    ordered = sorted(keys)
    locked = session.each(_LOCK, [{"key": key} for key in ordered])
    for key, rows in zip(ordered, locked, strict=True):
        if not rows or rows[0][0] != "live":
            raise Conflict(f"object {key} is being deleted")
    holder = {"kind": kind, "collection": collection, "number": number}
    session.run_many(_INSERT_REFERENCE, [{"key": key, **holder} for key in ordered])
    session.run_many(_REVIVE, [{"object_key": key} for key in ordered])


def refer_fragments(session: Session, held: Sequence[tuple[str, str, int]]) -> None:
    """Keep objects alive that this transaction has introduced: (key, collection, first offset)."""
    session.run_many(
        _INSERT_REFERENCE,
        [
            {"key": key, "kind": "fragment", "collection": collection, "number": number}
            for key, collection, number in held
        ],
    )
    # An earlier flush of the same object may have introduced it, and been folded already.
    session.run_many(_REVIVE, [{"object_key": key} for key in sorted({key for key, _, _ in held})])


def held(
    session: Session, *, kind: str, collection: str, number_max: int, number_min: int = 0
) -> list[str]:
    """The keys that references of one holder kind keep, by their numbers; sorted."""
    rows = session.all(
        _KEYS_HELD,
        kind=kind,
        collection=collection,
        number_min=number_min,
        number_max=number_max,
    )
    return sorted(key for (key,) in rows)


def release(
    session: Session,
    *,
    kind: str,
    collection: str,
    number_max: int,
    now_us: int,
    number_min: int = 0,
) -> None:
    """Drop references of one holder kind, by their numbers; stamp what nobody keeps any more."""
    numbers = {"number_min": number_min, "number_max": number_max}
    keys = held(session, kind=kind, collection=collection, **numbers)
    if not keys:
        return
    lock(session, keys)
    session.run(_RELEASE, kind=kind, collection=collection, **numbers)
    _stamp(session, keys, now_us)


def release_one(
    session: Session, key: str, *, kind: str, collection: str, number: int, now_us: int
) -> None:
    """Drop one reference; stamp the object if nobody else keeps it."""
    lock(session, [key])
    session.run(_RELEASE_ONE, key=key, kind=kind, collection=collection, number=number)
    _stamp(session, [key], now_us)


def release_collections(session: Session, collections: Sequence[str], now_us: int) -> None:
    """Drop every reference of collections together with their versions and parts."""
    holders = [{"collection": collection} for collection in collections]
    rows = session.each(_KEYS_OF_COLLECTION, holders)
    keys = sorted({key for found in rows for (key,) in found})
    lock(session, keys)
    session.run_many(_RELEASE_COLLECTION, holders)
    _stamp(session, keys, now_us)
    for statement in (_DELETE_PARTS, _DELETE_VERSION_PARTS, _DELETE_VERSIONS):
        session.run_many(statement, holders)


def _stamp(session: Session, keys: Iterable[str], now_us: int) -> None:
    session.run_many(_STAMP, [{"object_key": key, "now_us": now_us} for key in keys])


class ObjectTable:
    """What garbage collection asks of the catalog."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def any_due(self, cutoff_us: int, ahead_us: int) -> bool:
        """Whether there are objects to mark or to stamp anew, or marked ones to delete."""
        with self._db.read() as session:
            return (
                session.one(_ANY_DUE, cutoff_us=cutoff_us, limit=1) is not None
                or session.one(_DELETING, limit=1) is not None
                or session.one(_AHEAD, ahead_us=ahead_us) is not None
            )

    @whole
    def mark_due(self, cutoff_us: int, limit: int) -> list[str]:
        """Mark objects unreferenced since `cutoff_us` as deleting; returns their keys."""
        with self._db.read() as session:
            if not session.all(_ANY_DUE, cutoff_us=cutoff_us, limit=1):
                return []
        marked = []
        with self._db.write("gc-mark") as session:
            for (key,) in session.all(_DUE, cutoff_us=cutoff_us, limit=limit):
                # A second statement: under READ COMMITTED it sees what committed while we waited.
                if session.one(_REFERENCED, key=key) is None:
                    session.run(_MARK, object_key=key)
                    marked.append(key)
        return marked

    @whole
    def stamp_anew(self, ahead_us: int, now_us: int) -> None:
        """Give stamps that lie after `ahead_us`, from before the clock was set back, another."""
        with self._db.read() as session:
            if session.one(_AHEAD, ahead_us=ahead_us) is None:
                return
        with self._db.write("gc-stamp-anew") as session:
            ahead = session.all(_LOCK_AHEAD, ahead_us=ahead_us)
            stamps = [{"object_key": key, "now_us": now_us} for (key,) in ahead]
            session.run_many(_STAMP_ANEW, stamps)

    def deleting(self, limit: int) -> list[str]:
        """Keys marked by this or an earlier process and not yet forgotten."""
        with self._db.read() as session:
            return [key for (key,) in session.all(_DELETING, limit=limit)]

    @whole
    def forget(self, keys: Sequence[str]) -> None:
        """Remove the rows of objects that are gone from the store."""
        if keys:
            with self._db.write("gc-forget") as session:
                session.run_many(_FORGET, [{"key": key} for key in sorted(keys)])

    def known(self, keys: Sequence[str]) -> set[str]:
        """Those of `keys` that have a row, unless it says that the object was swept."""
        with self._db.read() as session:
            found = session.each(_STATE, [{"key": key} for key in keys])
        pairs = zip(keys, found, strict=True)
        return {key for key, rows in pairs if rows and rows[0][0] != "swept"}

    def count(self) -> int:
        with self._db.read() as session:
            row = session.one(_COUNT)
        return int(row[0]) if row else 0

    def count_unreferenced(self) -> int:
        """Objects that wait to be deleted."""
        with self._db.read() as session:
            row = session.one(_COUNT_UNREFERENCED)
        return int(row[0]) if row else 0

    @whole
    def condemn(self, keys: Sequence[str], now_us: int) -> list[str]:
        """Insert `swept` rows for orphans; returns those that nobody has introduced meanwhile."""
        condemned = []
        with self._db.write("sweep-condemn") as session:
            for key in sorted(keys):
                inserted = session.run(
                    _INSERT, key=key, size=0, state="swept", unreferenced_us=now_us
                )
                # Not locked: who introduced it may wait for another key of this sweep.
                row = None if inserted else session.one(_STATE, key=key)
                if inserted or (row is not None and row[0] == "swept"):
                    condemned.append(key)
        return condemned

    @whole
    def forget_swept(self, cutoff_us: int) -> None:
        """Remove the rows of what was swept so long ago that no writer can still be asleep."""
        with self._db.write("sweep-forget") as session:
            session.run(_FORGET_SWEPT, cutoff_us=cutoff_us)
