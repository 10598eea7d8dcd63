"""Operations that cannot be folded: kept with their bytes until somebody drops them.

A row is a range of offsets of a collection's log and a fragment that holds just these operations
(docs/formats/fragment.md), or what should have been one. It is inserted by the transaction that
moves the indexed offset past it, so each operation is in the log, in a part or here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ochredb.catalog import objects as object_table
from ochredb.catalog.core import BindParameter, bindparam, delete, insert, select
from ochredb.catalog.database import Database, Session, whole
from ochredb.catalog.schema import quarantine
from ochredb.catalog.statement import Statement
from ochredb.clock import Clock
from ochredb.errors import NotFound

_REFERENCE = "quarantine"
_collection: BindParameter[Any] = bindparam("collection")
_columns = select(
    quarantine.c.collection,
    quarantine.c.start,
    quarantine.c.stop,
    quarantine.c.reason,
    quarantine.c.payload,
    quarantine.c.object_key,
    quarantine.c.checksum,
    quarantine.c.time_us,
)
_LIST = Statement(
    _columns.where(
        (quarantine.c.collection > bindparam("after_collection"))
        | (
            (quarantine.c.collection == bindparam("after_collection"))
            & (quarantine.c.start > bindparam("after_start"))
        )
    )
    .order_by(quarantine.c.collection, quarantine.c.start)
    .limit(bindparam("limit"))
)
_GET = Statement(
    _columns.where(quarantine.c.collection == _collection, quarantine.c.start == bindparam("start"))
)
_INSERT = Statement(insert(quarantine))
_DELETE = Statement(
    delete(quarantine).where(
        quarantine.c.collection == _collection, quarantine.c.start == bindparam("start")
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """Operations start..stop (offsets, both included) of a collection, and why they are here.

    payload or object_key: where their bytes are; checksum: xxh3-64 of them, signed.
    """

    collection: str
    start: int
    stop: int
    reason: str
    payload: bytes | None
    object_key: str | None
    checksum: int
    time_us: int = 0

    @property
    def count(self) -> int:
        return self.stop - self.start + 1


def record(session: Session, items: Sequence[Quarantined], now_us: int) -> None:
    """Insert rows, and references to the objects that they name; these have rows already."""
    for item in items:
        session.run(
            _INSERT,
            collection=item.collection,
            start=item.start,
            stop=item.stop,
            reason=item.reason,
            payload=item.payload,
            object_key=item.object_key,
            checksum=item.checksum,
            time_us=now_us,
        )
        if item.object_key is not None:
            object_table.refer(
                session,
                [item.object_key],
                kind=_REFERENCE,
                collection=item.collection,
                number=item.start,
            )


class QuarantineTable:
    """What is in quarantine. Blocking, thread-safe."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._db, self._clock = database, clock

    def list(self, after: tuple[str, int] = ("", 0), limit: int = 1_000) -> list[Quarantined]:
        """Rows of all collections, by collection and first offset, from behind `after` on."""
        with self._db.read() as session:
            rows = session.all(_LIST, after_collection=after[0], after_start=after[1], limit=limit)
        return [_quarantined(row) for row in rows]

    def get(self, collection: str, start: int) -> Quarantined:
        """Raises NotFound."""
        with self._db.read() as session:
            row = session.one(_GET, collection=collection, start=start)
        if row is None:
            raise NotFound(f"nothing of collection {collection} is in quarantine at offset {start}")
        return _quarantined(row)

    @whole
    def drop(self, collection: str, start: int) -> Quarantined:
        """Forget a row and its bytes; they are the last copy. Raises NotFound."""
        with self._db.write("quarantine-drop") as session:
            row = session.one(_GET, collection=collection, start=start)
            if row is None:
                raise NotFound(
                    f"nothing of collection {collection} is in quarantine at offset {start}"
                )
            session.run(_DELETE, collection=collection, start=start)
            object_table.release(
                session,
                kind=_REFERENCE,
                collection=collection,
                number_min=start,
                number_max=start,
                now_us=self._clock.now_us(),
            )
        return _quarantined(row)


def _quarantined(row: tuple[Any, ...]) -> Quarantined:
    collection, start, stop, reason, payload, object_key, checksum, time_us = row
    return Quarantined(
        collection=collection,
        start=start,
        stop=stop,
        reason=reason,
        payload=payload,
        object_key=object_key,
        checksum=checksum,
        time_us=time_us,
    )
