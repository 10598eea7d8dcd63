"""The simulated database behaves as PostgreSQL does under READ COMMITTED, race by race."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from ochredb.catalog.core import bindparam, insert, select, update, upsert
from ochredb.catalog.database import Aborted, Session
from ochredb.catalog.migrate import open_memory
from ochredb.catalog.schema import collection_keys, jobs, pins
from ochredb.catalog.statement import Statement
from ochredb.errors import OchreError, Unavailable
from ochredb.ids import IdSource
from ochredb.testing.simulation.catalog import CatalogFaults, Dialect, SimulatedCatalog
from ochredb.testing.simulation.scheduler import Process, Scheduler, SimulatedClock

_NAME: Any = bindparam("name")
_READ = Statement(select(jobs.c.fence).where(jobs.c.collection == _NAME))
_LOCK = Statement(select(jobs.c.fence).where(jobs.c.collection == _NAME).with_for_update())
_LOCK_AND_JOIN = Statement(
    select(jobs.c.fence, pins.c.until_us)
    .where(jobs.c.collection == _NAME, pins.c.id == jobs.c.collection)
    .with_for_update(of=jobs)
)
_SET = Statement(
    update(jobs).where(jobs.c.collection == bindparam("which")).values(fence=bindparam("to"))
)
_ADD = Statement(
    update(jobs).where(jobs.c.collection == bindparam("which")).values(fence=jobs.c.fence + 1)
)
_SET_PIN = Statement(
    update(pins).where(pins.c.id == bindparam("which")).values(until_us=bindparam("to"))
)
_INSERT_JOB = Statement(insert(jobs))
_INSERT_PIN = Statement(insert(pins))
_INSERT_KEY = Statement(upsert(collection_keys).on_conflict_do_nothing())


class World:
    """Tasks `begin` one after the other, a second apart; within one they take their own time."""

    def __init__(self, dialect: Dialect) -> None:
        self.scheduler = Scheduler(1)
        self.scheduler._slow_share = self.scheduler._stall_share = 0.0
        self.process: Process = self.scheduler.process("one")
        clock = SimulatedClock(self.scheduler, self.process)
        self._memory, _ = open_memory(clock, IdSource(clock, random.Random(1)))
        assert self._memory._writer is not None
        connection = self._memory._writer.connection
        self.catalog = SimulatedCatalog(
            self.scheduler, connection, dialect, CatalogFaults(), random.Random(1)
        )
        self.database = self.catalog.database(self.process)
        self.tasks: list[Any] = []
        self.do(self._fill)
        self.run()

    def _fill(self) -> None:
        with self.database.write() as session:
            for name in ("a", "b"):
                session.run(
                    _INSERT_JOB, collection=name, kind="k", owner="", fence=1, until_us=0,
                    attempts=0, last_error=None,
                )  # fmt: skip
                session.run(_INSERT_PIN, id=name, owner="", created_us=0, until_us=1)

    def do(self, work: Callable[[], None], after_s: float = 0.0) -> None:
        def later() -> None:
            self.scheduler.sleep(after_s)
            work()

        self.tasks.append(self.scheduler.spawn(self.process, later))

    def transaction(
        self, work: Callable[[Session], object], after_s: float, stays_s: float = 0.0
    ) -> list[object]:
        """What `work` gives is in the list when it is over; a failure of the catalog as well."""
        results: list[object] = []

        def run() -> None:
            try:
                with self.database.write() as session:
                    results.append(work(session))
                    self.scheduler.sleep(stays_s)
            except OchreError as error:
                results.append(error)

        self.do(run, after_s)
        return results

    def run(self) -> None:
        self.scheduler.run(lambda: all(task.is_done for task in self.tasks))
        for task in self.tasks:
            if task.error is not None:
                raise task.error

    def fence(self, name: str = "a") -> int:
        return int(
            self.catalog.committed("SELECT fence FROM jobs WHERE collection = ?", name)[0][0]
        )


@pytest.fixture
def world() -> World:
    return World("postgresql")


def test_a_statement_sees_what_was_committed_when_it_began(world: World) -> None:
    def read_twice(session: Session) -> list[object]:
        before = session.one(_READ, name="a")
        world.scheduler.sleep(10.0)
        return [before, session.one(_READ, name="a")]

    seen = world.transaction(read_twice, 0.0)
    world.transaction(lambda session: session.run(_SET, which="a", to=5), 1.0, stays_s=2.0)
    unseen = world.transaction(lambda session: session.one(_READ, name="a"), 2.0)
    world.run()
    assert seen == [[(1,), (5,)]]
    assert unseen == [(1,)]  # It was not committed then.


def test_an_update_of_a_locked_row_counts_on_what_was_committed(world: World) -> None:
    for after_s in (0.0, 0.5, 0.6):
        world.transaction(lambda session: session.run(_ADD, which="a"), after_s, stays_s=2.0)
    world.run()
    assert world.fence() == 4


def test_reading_before_the_lock_loses_an_update_and_after_it_does_not(world: World) -> None:
    def add(session: Session, statement: Statement) -> None:
        row = session.one(statement, name="a")
        assert row is not None
        world.scheduler.sleep(2.0)
        session.run(_SET, which="a", to=row[0] + 1)

    for statement, expected in ((_READ, 2), (_LOCK, 4)):
        for after_s in (0.0, 0.5):
            world.transaction(partial(add, statement=statement), after_s)
        world.run()
        assert world.fence() == expected


def test_who_waited_sees_the_locked_row_as_it_is_and_the_joined_one_as_it_was(
    world: World,
) -> None:
    def change(session: Session) -> None:
        session.run(_SET, which="a", to=7)
        session.run(_SET_PIN, which="a", to=7)

    world.transaction(change, 0.0, stays_s=3.0)
    joined = world.transaction(lambda session: session.one(_LOCK_AND_JOIN, name="a"), 1.0)
    world.run()
    assert joined == [(7, 1)]


def test_an_insertion_waits_for_another_of_the_same_key(world: World) -> None:
    def insert_key(session: Session) -> int:
        return session.run(_INSERT_KEY, collection="c", key="k", type="int")

    first = world.transaction(insert_key, 0.0, stays_s=3.0)
    second = world.transaction(insert_key, 1.0)
    world.run()
    assert (first, second) == ([1], [0])


def test_a_rollback_lets_the_one_that_waited_go_on_alone(world: World) -> None:
    def fail(session: Session) -> None:
        session.run(_ADD, which="a")
        world.scheduler.sleep(3.0)
        raise Unavailable("as if")

    world.transaction(fail, 0.0)
    world.transaction(lambda session: session.run(_ADD, which="a"), 1.0)
    world.run()
    assert world.fence() == 2


def test_a_deadlock_ends_one_of_the_two(world: World) -> None:
    def both(session: Session, first: str, second: str) -> str:
        session.one(_LOCK, name=first)
        world.scheduler.sleep(1.0)
        session.one(_LOCK, name=second)
        return "done"

    one = world.transaction(lambda session: both(session, "a", "b"), 0.0)
    other = world.transaction(lambda session: both(session, "b", "a"), 0.5)
    world.run()
    assert world.catalog.deadlocks == 1
    outcomes = one + other
    assert outcomes.count("done") == 1
    assert [type(item) for item in outcomes if item != "done"] == [Aborted]


def test_sqlite_has_one_writer_whose_changes_nobody_sees_before_the_commit() -> None:
    world = World("sqlite")

    def add(session: Session) -> None:
        row = session.one(_READ, name="a")
        assert row is not None
        world.scheduler.sleep(2.0)
        session.run(_SET, which="a", to=row[0] + 1)

    seen: list[object] = []

    def look() -> None:
        with world.database.read() as session:
            seen.append(session.one(_READ, name="a"))

    for after_s in (0.0, 0.5):
        world.transaction(add, after_s, stays_s=1.0)
    world.do(look, 2.5)
    world.run()
    assert (world.fence(), seen) == (3, [(1,)])


def test_a_killed_process_lets_go_of_its_locks(world: World) -> None:
    other = world.scheduler.process("other")
    database = world.catalog.database(other)

    def hold() -> None:
        with database.write() as session:
            session.run(_ADD, which="a")
            world.scheduler.sleep(1_000.0)

    world.scheduler.spawn(other, hold)
    world.do(lambda: world.scheduler.kill(other), 2.0)
    waited = world.transaction(lambda session: session.run(_ADD, which="a"), 1.0)
    world.run()
    assert (waited, world.fence()) == ([1], 2)
    assert not other.tasks or world.scheduler.now_s < 1_000.0
