"""The rows of `fragments` against one another, their log and their inline payloads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ochredb.catalog import objects as object_table
from ochredb.catalog.core import bindparam, select, update
from ochredb.catalog.database import Session
from ochredb.catalog.schema import fragments, logs
from ochredb.catalog.statement import Statement
from ochredb.checksum import signed, xxh3
from ochredb.errors import Conflict, Corrupt
from ochredb.fragment import Unfoldable, decode

_LOGS = Statement(
    select(
        logs.c.collection, logs.c.indexed_offset, logs.c.next_offset, logs.c.tail_bytes
    ).order_by(logs.c.collection)
)
_ALL = Statement(
    select(
        fragments.c.start,
        fragments.c.stop,
        fragments.c.payload,
        fragments.c.object_key,
        fragments.c.byte_start,
        fragments.c.byte_stop,
        fragments.c.checksum,
    )
    .where(fragments.c.collection == bindparam("collection"), fragments.c.start > bindparam("last"))
    .order_by(fragments.c.start)
    .limit(bindparam("limit"))
)
_OTHERS = Statement(
    select(fragments.c.collection)
    .where(fragments.c.collection.not_in(select(logs.c.collection)))
    .distinct()
)
_REPLACE_FRAGMENT = Statement(
    update(fragments)
    .where(fragments.c.collection == bindparam("log"), fragments.c.start == bindparam("first"))
    .values(
        payload=bindparam("new_payload"),
        object_key=None,
        byte_start=None,
        byte_stop=None,
        checksum=bindparam("new_checksum"),
    )
)
_SET_TAIL_BYTES = Statement(
    update(logs)
    .where(logs.c.collection == bindparam("log"))
    .values(tail_bytes=bindparam("tail_bytes"))
)
_LOCK = Statement(
    select(logs.c.tail_bytes).where(logs.c.collection == bindparam("collection")).with_for_update()
)
_PAGE_FRAGMENTS = 128
_WRONG_BYTES = "fails its checksum"


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentPlace:
    """Where a fragment's bytes are: inline (`payload`) or a byte range of an object."""

    start: int
    stop: int
    payload: bytes | None
    object_key: str | None
    byte_start: int | None
    byte_stop: int | None
    checksum: int

    @property
    def byte_count(self) -> int:
        """Bytes of the range in the object; 0 for an inline payload."""
        if self.byte_start is None or self.byte_stop is None:
            return 0
        return self.byte_stop - self.byte_start


def fragment_problems(session: Session) -> Iterator[tuple[str, str, bool]]:
    """Problem, collection, and whether it is a payload's.

    Cost: inline payloads are read and decoded, some at a time.
    """
    for (collection,) in session.all(_OTHERS):
        yield "there are fragments of a log that does not exist", collection, False
    for collection, indexed, next_offset, tail_bytes in session.all(_LOGS):
        expected, size = indexed + 1, 0
        for row in _of(session, collection):
            start, stop = row[0], row[1]
            if start != expected or stop < start:
                yield f"the log goes on at offset {start} instead of {expected}", collection, False
            problem = _problem(row)
            if problem is not None:
                in_payload = problem == _WRONG_BYTES
                yield f"the fragment at offset {start} {problem}", collection, in_payload
            expected = stop + 1
            size += (
                row[5] - row[4] if row[2] is None and None not in row[4:6] else len(row[2] or b"")
            )
        if expected != next_offset:
            yield (
                f"the log ends at offset {expected - 1} instead of {next_offset - 1}",
                collection,
                False,
            )
        if size != tail_bytes:
            yield (
                f"the log's fragments have {size} bytes instead of {tail_bytes}",
                collection,
                False,
            )


def _of(session: Session, collection: str) -> Iterator[tuple[Any, ...]]:
    last: Any = -(1 << 62)
    while rows := session.all(_ALL, collection=collection, last=last, limit=_PAGE_FRAGMENTS):
        yield from rows
        last = rows[-1][0]


def _problem(row: tuple[Any, ...]) -> str | None:
    start, stop, payload, key, byte_start, byte_stop, checksum = row
    if payload is None:
        inside = key is not None and byte_start is not None and byte_stop is not None
        if not inside or not 0 <= byte_start < byte_stop:
            return "has no place"
        return None
    if key is not None:
        return "has two places"
    if signed(xxh3(payload)) != checksum:
        return _WRONG_BYTES
    try:
        count = len(decode(payload))
    except Unfoldable:
        return None  # It is as it was written: for the quarantine.
    except Corrupt as error:
        return f"cannot be decoded: {error}"
    return None if count == stop - start + 1 else f"has {count} operations"


def replace(
    session: Session,
    collection: str,
    place: FragmentPlace,
    payload: bytes,
    checksum: int,
    now_us: int,
) -> None:
    """See `LogTable.replace_fragment`."""
    row = session.one(_LOCK, collection=collection)
    changed = row is not None and session.run(
        _REPLACE_FRAGMENT,
        log=collection,
        first=place.start,
        new_payload=payload,
        new_checksum=checksum,
    )
    if row is None or not changed:
        raise Conflict(f"fragment {place.start} of collection {collection} was folded")
    size = place.byte_count if place.payload is None else len(place.payload)
    session.run(_SET_TAIL_BYTES, log=collection, tail_bytes=row[0] + len(payload) - size)
    if place.object_key is not None:
        object_table.release_one(
            session,
            place.object_key,
            kind="fragment",
            collection=collection,
            number=place.start,
            now_us=now_us,
        )
