"""Which writes were applied already: by a client's key, by the name that a caller gave (I8).

A caller that sends a write to one log node and gets no answer sends it to another. Its name for
the write is the fragment row's `request_id`, behind a mark, and is looked up under the log's lock
each time: the attempt that is thought to be lost may be the one that comes last. Folding deletes
fragment rows, so it leaves the names of young ones in `idempotency`, where they expire minutes
later. The fragments of a process that writes by itself have no such name, and cost nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ochredb.catalog.core import BindParameter, bindparam, func, insert, select
from ochredb.catalog.database import Session
from ochredb.catalog.schema import fragments, idempotency
from ochredb.catalog.statement import Statement
from ochredb.errors import Unprocessable
from ochredb.types import Appended

KEYS_KEPT_S = 24 * 3600.0
"""How long a client's key is remembered."""
NAMES_KEPT_S = 600.0
"""And a caller's name: longer than a request may be under way, its last retransmission included."""

_MARK = "~"
_collection: BindParameter[Any] = bindparam("collection")
_BY_KEY = Statement(
    select(idempotency.c.request_hash, idempotency.c.first_offset, idempotency.c.last_offset).where(
        idempotency.c.collection == _collection, idempotency.c.key == bindparam("request")
    )
)
_BY_NAME = Statement(
    select(fragments.c.start, fragments.c.stop)
    .where(fragments.c.collection == _collection, fragments.c.request_id == bindparam("request"))
    .union_all(
        select(idempotency.c.first_offset, idempotency.c.last_offset).where(
            idempotency.c.collection == _collection, idempotency.c.key == bindparam("request")
        )
    )
)
_KEEP_KEY = Statement(insert(idempotency))
_KEEP_NAMES = Statement(
    insert(idempotency).from_select(
        ["collection", "key", "request_hash", "first_offset", "last_offset", "time_us"],
        select(
            fragments.c.collection,
            fragments.c.request_id,
            bindparam("no_hash"),
            fragments.c.start,
            fragments.c.stop,
            fragments.c.time_us - bindparam("earlier_us"),
        ).where(
            fragments.c.collection == _collection,
            fragments.c.stop <= bindparam("floor"),
            func.substr(fragments.c.request_id, 1, 1) == _MARK,
            fragments.c.time_us > bindparam("young_us"),
        ),
    )
)


Found = tuple[bytes | None, Appended]
"""The hash of what was applied, None for one without a client's key, and its offsets."""


def by_keys(session: Session, wanted: Sequence[tuple[str, str]]) -> list[Found | None]:
    """What was applied under clients' keys: (collection, key). One round trip."""
    params = [{"collection": collection, "request": key} for collection, key in wanted]
    found = session.each(_BY_KEY, params)
    return [(rows[0][0], Appended(*rows[0][1:])) if rows else None for rows in found]


def by_names(session: Session, wanted: Sequence[tuple[str, str]]) -> list[Found | None]:
    """What was applied under the names of fragment rows: (collection, name). One round trip."""
    params = [{"collection": collection, "request": name} for collection, name in wanted]
    found = session.each(_BY_NAME, params)
    return [(None, Appended(*rows[0])) if rows else None for rows in found]


def answer(found: Found, key: str, request_hash: bytes | None) -> Appended | Unprocessable:
    """What a repeat is told: the first answer, or that its key belongs to another request."""
    if found[0] != request_hash:
        return Unprocessable(f"Idempotency-Key {key!r} was used for another request")
    return replace(found[1], repeated=True)


def by_key(session: Session, collection: str, key: str, request_hash: bytes) -> Appended | None:
    """The first answer to a client's key. Raises Unprocessable if it was for another request."""
    (found,) = by_keys(session, [(collection, key)])
    if found is None:
        return None
    told = answer(found, key, request_hash)
    if isinstance(told, Unprocessable):
        raise told
    return told


def keep_key(
    session: Session, collection: str, key: str, request_hash: bytes, told: Appended, time_us: int
) -> None:
    """Remember what a client's key was answered."""
    session.later(
        _KEEP_KEY,
        collection=collection,
        key=key,
        request_hash=request_hash,
        first_offset=told.first_offset,
        last_offset=told.last_offset,
        time_us=time_us,
    )


def named(request_id: str) -> str:
    """The fragment row's `request_id` for a caller's name."""
    return _MARK + request_id


def by_name(session: Session, collection: str, request_id: str) -> Appended | None:
    """What a write of this `request_id` (of a fragment row) was given, if it was applied."""
    (found,) = by_names(session, [(collection, request_id)])
    return None if found is None else replace(found[1], repeated=True)


def keep_names(session: Session, collection: str, floor: int, now_us: int) -> None:
    """Before the fragments up to `floor` are deleted: remember the names of the young ones.

    Their rows seem to be older than they are, so that they expire before the keys of clients do.
    """
    session.run(
        _KEEP_NAMES,
        collection=collection,
        floor=floor,
        no_hash=b"",
        young_us=now_us - int(NAMES_KEPT_S * 1e6),
        earlier_us=int((KEYS_KEPT_S - NAMES_KEPT_S) * 1e6),
    )
