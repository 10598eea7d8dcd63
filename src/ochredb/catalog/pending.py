"""Which collections compaction or merging could do something for.

Every compactor of a cluster asks this every second or so, so it must not look at collections that
have nothing to do. Fragments are deleted when they are folded, so the collections that have any are
those with a tail: they are found by skipping from one to the next in the primary key of
`fragments`, two looks into indexes each, however many other collections there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ochredb.catalog.core import and_, bindparam, func, select
from ochredb.catalog.database import Database
from ochredb.catalog.schema import fragments, jobs, logs
from ochredb.catalog.statement import Statement
from ochredb.types import PendingWork

_PAGE = 200  # Collections given by one statement.

_with_tail: Any = (
    select(func.min(fragments.c.collection).label("collection"))
    .where(fragments.c.collection > bindparam("after"))
    .cte("with_tail", recursive=True)
)
_with_tail = _with_tail.union_all(
    select(
        select(func.min(fragments.c.collection))
        .where(fragments.c.collection > _with_tail.c.collection)
        .scalar_subquery()
    ).where(_with_tail.c.collection.is_not(None))
)
_work: Any = (
    logs.c.collection,
    logs.c.next_offset - 1 - logs.c.indexed_offset,
    logs.c.tail_bytes,
    logs.c.time_us,
    logs.c.unsettled_rows,
)
_lease: Any = (jobs.c.owner, jobs.c.until_us)
_TAILS = Statement(
    select(*_work, func.coalesce(fragments.c.time_us, logs.c.time_us), *_lease)
    .select_from(
        _with_tail.join(logs, logs.c.collection == _with_tail.c.collection)
        .outerjoin(
            fragments,
            and_(
                fragments.c.collection == logs.c.collection,
                fragments.c.start == logs.c.indexed_offset + 1,
            ),
        )
        .outerjoin(jobs, and_(jobs.c.collection == logs.c.collection, jobs.c.kind == "compact"))
    )
    .where(
        logs.c.next_offset > logs.c.indexed_offset + 1,
        (logs.c.next_offset - 1 - logs.c.indexed_offset >= bindparam("rows_min"))
        | (logs.c.tail_bytes >= bindparam("bytes_min"))
        | (logs.c.time_us <= bindparam("quiet_since_us")),
    )
    .limit(_PAGE)
)
_UNSETTLED = Statement(
    select(*_work, logs.c.time_us, *_lease)
    .select_from(
        logs.outerjoin(jobs, and_(jobs.c.collection == logs.c.collection, jobs.c.kind == "merge"))
    )
    .where(logs.c.unsettled_rows > 0)
)
_PENDING = Statement(
    select(*_work).where(
        (logs.c.next_offset > logs.c.indexed_offset + 1) | (logs.c.unsettled_rows > 0)
    )
)


@dataclass(frozen=True, slots=True)
class Due:
    """A collection's work, and who is at it: `owner` has, or had, the lease until `until_us`.

    oldest_us: log time of its oldest operation that is not folded; of a merge: of its last write.
    """

    work: PendingWork
    oldest_us: int
    owner: str | None
    until_us: int | None

    @property
    def collection(self) -> str:
        return self.work.collection


def tails(
    database: Database, rows_min: int, bytes_min: int, quiet_since_us: int, after: str
) -> Iterator[Due]:
    """Collections with a tail of some size, or without writes for some time.

    In short statements, in order, those behind `after`. Cost: 10 microseconds and a share of a
    statement for each collection with a tail.
    """
    last: str | None = after
    while last is not None:
        with database.read() as session:
            rows = session.all(
                _TAILS,
                rows_min=rows_min,
                bytes_min=bytes_min,
                quiet_since_us=quiet_since_us,
                after=last,
            )
        yield from (Due(PendingWork(*row[:5]), *row[5:]) for row in rows)
        last = max(row[0] for row in rows) if len(rows) == _PAGE else None


def unsettled(database: Database) -> list[Due]:
    """Collections whose parts wait for a merge."""
    with database.read() as session:
        return [Due(PendingWork(*row[:5]), *row[5:]) for row in session.all(_UNSETTLED)]


def pending(database: Database) -> list[PendingWork]:
    """All of both. Cost: a pass over the rows of all collections, 0.2 ms per thousand."""
    with database.read() as session:
        return [PendingWork(*row) for row in session.all(_PENDING)]
