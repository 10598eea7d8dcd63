"""Leases: who may compact, merge or collect, by time, and a fencing number that settles it.

A lease only avoids double work. Safety rests on the fence and the version, both checked inside the
commit's own transaction (I7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ochredb.catalog.core import bindparam, delete, exists, select, update, upsert
from ochredb.catalog.database import Database, Session, whole
from ochredb.catalog.schema import jobs, logs
from ochredb.catalog.statement import Statement
from ochredb.clock import Clock
from ochredb.types import JobStatus

_here = (jobs.c.collection == bindparam("job_collection"), jobs.c.kind == bindparam("job_kind"))
_GET = Statement(
    select(jobs.c.owner, jobs.c.fence, jobs.c.until_us, jobs.c.attempts)
    .where(*_here)
    .with_for_update()
)
_INSERT = Statement(upsert(jobs).on_conflict_do_nothing())
_TAKE = Statement(
    update(jobs)
    .where(*_here)
    .values(
        owner=bindparam("new_owner"),
        fence=bindparam("new_fence"),
        until_us=bindparam("new_until"),
        attempts=jobs.c.attempts + 1,
    )
)
_RENEW = Statement(
    update(jobs)
    .where(*_here, jobs.c.fence == bindparam("held_fence"))
    .values(until_us=bindparam("new_until"))
)
_END = Statement(
    update(jobs)
    .where(*_here, jobs.c.fence == bindparam("held_fence"))
    .values(until_us=0, attempts=bindparam("new_attempts"), last_error=bindparam("error"))
)
# In this order too, whoever locks several.
_LOCK_ALL = Statement(
    select(jobs.c.kind).order_by(jobs.c.collection, jobs.c.kind).with_for_update()
)
_STATUS = Statement(
    select(
        jobs.c.collection,
        jobs.c.kind,
        jobs.c.owner,
        jobs.c.until_us,
        jobs.c.attempts,
        jobs.c.last_error,
    )
    .where((jobs.c.until_us > bindparam("now_us")) | jobs.c.last_error.is_not(None))
    .order_by(jobs.c.until_us.desc(), jobs.c.collection, jobs.c.kind)
    .limit(1_000)
)
_FORGET_ERRORS = Statement(
    update(jobs).where(jobs.c.last_error.is_not(None)).values(last_error=None)
)
_FORGET_DROPPED = Statement(
    delete(jobs).where(
        jobs.c.until_us == 0,
        jobs.c.collection != "",
        ~exists().where(logs.c.collection == jobs.c.collection),
    )
)


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to try one kind of job on one collection."""

    collection: str
    kind: str
    owner: str
    fence: int


class Jobs:
    """Blocking; each call is one transaction."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._db, self._clock = database, clock

    @whole
    def acquire(
        self,
        collection: str,
        kind: str,
        owner: str,
        ttl_s: float,
        is_dead: Callable[[str], bool] = lambda _owner: False,
    ) -> Lease | None:
        """The lease, or None while somebody else's has not run out.

        is_dead: whether an owner is known not to run any more, so that nobody waits for its lease.
        """
        with self._db.write("lease-acquire") as session:
            now = self._clock.now_us()
            until = now + int(ttl_s * 1e6)
            row = session.one(_GET, job_collection=collection, job_kind=kind)
            if row is None:
                inserted = session.run(
                    _INSERT,
                    collection=collection,
                    kind=kind,
                    owner=owner,
                    fence=1,
                    until_us=until,
                    attempts=1,
                    last_error=None,
                )
                # Else somebody else was first, just now.
                return Lease(collection, kind, owner, 1) if inserted else None
            # None is given for longer than its ttl: then the clock was set back meanwhile.
            left_us = row[2] - now
            running = 0 < left_us <= 2 * int(ttl_s * 1e6)
            if running and row[0] != owner and not is_dead(row[0]):
                return None
            fence = int(row[1]) + 1
            session.run(
                _TAKE,
                job_collection=collection,
                job_kind=kind,
                new_owner=owner,
                new_fence=fence,
                new_until=until,
            )
            return Lease(collection, kind, owner, fence)

    @whole
    def renew(self, lease: Lease, ttl_s: float) -> bool:
        """Extend the lease; False if it has been taken over."""
        with self._db.write("lease-renew") as session:
            until = self._clock.now_us() + int(ttl_s * 1e6)
            return (
                session.run(
                    _RENEW,
                    job_collection=lease.collection,
                    job_kind=lease.kind,
                    held_fence=lease.fence,
                    new_until=until,
                )
                > 0
            )

    @whole
    def end(self, lease: Lease, error: str | None = None) -> None:
        """Give the lease back; `error` is kept for whoever looks."""
        with self._db.write("lease-end") as session:
            session.run(
                _END,
                job_collection=lease.collection,
                job_kind=lease.kind,
                held_fence=lease.fence,
                new_attempts=0 if error is None else 1,
                error=error,
            )

    def status(self) -> list[JobStatus]:
        """The jobs that run, by whichever process, and those that failed last; at most 1,000."""
        now = self._clock.now_us()
        with self._db.read() as session:
            return [
                JobStatus(
                    collection_id=collection,
                    kind=kind,
                    owner=owner,
                    running=until_us > now,
                    until_us=until_us,
                    attempts=attempts,
                    last_error=error,
                )
                for collection, kind, owner, until_us, attempts, error in session.all(
                    _STATUS, now_us=now
                )
            ]

    @whole
    def tidy(self) -> None:
        """Forget the texts of errors, which may name records, and jobs on dropped collections."""
        with self._db.write("jobs-tidy") as session:
            session.all(_LOCK_ALL)
            session.run(_FORGET_ERRORS)
            session.run(_FORGET_DROPPED)


def holds(session: Session, lease: Lease) -> bool:
    """Inside a commit: is this still the newest lease of its kind?"""
    row = session.one(_GET, job_collection=lease.collection, job_kind=lease.kind)
    return row is not None and row[1] == lease.fence
