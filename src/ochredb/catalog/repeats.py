"""Which writes were applied already: by a client's key, by the name that a caller gave (I8).

A caller that sends a write to one log node and gets no answer sends it to another. Its name for
the write is the fragment row's `request_id`, behind a mark, and is looked up under the log's lock
each time: the attempt that is thought to be lost may be the one that comes last. Folding deletes
fragment rows, so it leaves the names of young ones in `idempotency`, where they expire minutes
later. The fragments of a process that writes by itself have no such name, and cost nothing here.
"""

from __future__ import annotations

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


def by_key(session: Session, collection: str, key: str, request_hash: bytes) -> Appended | None:
    """The first answer to a client's key. Raises Unprocessable if it was for another request."""
    row = session.one(_BY_KEY, collection=collection, request=key)
    if row is None:
        return None
    if row[0] != request_hash:
        raise Unprocessable(f"Idempotency-Key {key!r} was used for another request")
    return Appended(row[1], row[2], repeated=True)


def named(request_id: str) -> str:
    """The fragment row's `request_id` for a caller's name."""
    return _MARK + request_id


def by_name(session: Session, collection: str, request_id: str) -> Appended | None:
    """What a write of this `request_id` (of a fragment row) was given, if it was applied."""
    row = session.one(_BY_NAME, collection=collection, request=request_id)
    return None if row is None else Appended(row[0], row[1], repeated=True)


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
