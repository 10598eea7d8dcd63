"""A SQL database under the scheduler: the catalog of simulated processes.

Tasks are switched before every statement and around every commit. Two kinds:

* `postgresql`: READ COMMITTED. Each statement sees what was committed when it began, and what its
  own transaction wrote. Writes and SELECT ... FOR UPDATE lock rows. Who had to wait for a row looks
  at the row as it is then, and at everything else as it was when the statement began.
* `sqlite`: one writer at a time, and readers that see single committed states.

The committed state is a SQLite database in memory. What a transaction has written is kept as rows:
when another transaction's turn comes it is rolled back, and put in again when it goes on.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ochredb.catalog.database import Aborted, Row, Session
from ochredb.catalog.statement import Statement
from ochredb.errors import OutcomeUnknown, Unavailable
from ochredb.testing.simulation.scheduler import Process, Scheduler, Task
from ochredb.testing.simulation.statements import Key, StatementPlan, TableInfo, plan_of

Dialect = Literal["postgresql", "sqlite"]
_LOCK_TIMEOUT_S = 60.0
_ATTEMPTS_MAX = 6
_WRITER: Key = ("the only writer",)


@dataclass(slots=True)
class Change:
    """A row that a transaction changed; before or after is None for an insertion or a deletion."""

    table: TableInfo
    before: Row | None
    after: Row | None


@dataclass(eq=False)
class Transaction:
    """`changes` are not visible to others before the commit."""

    changes: list[Change] = field(default_factory=list)
    locks: set[Key] = field(default_factory=set)
    waits_for: Transaction | None = None
    waiters: list[Task] = field(default_factory=list)
    is_over: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogFaults:
    """Probabilities: a connection lost at a statement; a commit whose reply is lost, or itself."""

    statement: float = 0.0
    commit_lost: float = 0.0
    reply_lost: float = 0.0


class ConnectionLost(Exception):
    """What a driver raises inside a block: the transaction is rolled back, nothing was changed."""


class Deadlock(ConnectionLost):
    """Likewise, of one of two transactions that wait for each other."""


class SimulatedCatalog:
    """Shared by all processes; each takes its `database(process)`.

    on_commit: told of the rows that a commit changed, before anybody can see them.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        connection: sqlite3.Connection,
        dialect: Dialect,
        faults: CatalogFaults,
        rng: random.Random,
        on_commit: Callable[[Sequence[Change]], None] = lambda _changes: None,
    ) -> None:
        """connection: to a database in memory that has the tables."""
        self.scheduler, self.dialect = scheduler, dialect
        self.faults, self.rng, self.on_commit = faults, rng, on_commit
        self.deadlocks = 0
        self._connection = connection
        self._loaded: Transaction | None = None
        self._owners: dict[Key, Transaction] = {}

    def database(self, process: Process) -> SimulatedDatabase:
        return SimulatedDatabase(self, process)

    def committed(self, text: str, *params: object) -> list[Row]:
        """A look at the committed state from outside of the simulation."""
        self._load(None)
        return self._connection.execute(text, params).fetchall()

    # -- transactions

    def begin(self, transaction: Transaction) -> None:
        if self.dialect == "sqlite":
            while (owner := self._owners.get(_WRITER)) is not None:
                self._wait(transaction, owner)
            self._lock(transaction, [_WRITER])

    def end(self, transaction: Transaction) -> None:
        """Roll back what is not committed, and let go of the locks."""
        if transaction.is_over:
            return
        if self._loaded is transaction:
            self._load(None)
        transaction.is_over = True
        for key in transaction.locks:
            del self._owners[key]
        for task in transaction.waiters:
            self.scheduler.wake(task)

    def commit(self, transaction: Transaction) -> None:
        """Raises OutcomeUnknown: the connection was lost before or after it took effect."""
        assert not transaction.is_over, "an error in the transaction was swallowed"
        self.scheduler.pause("commit")
        chance = self.rng.random()
        if chance < self.faults.commit_lost:
            self.end(transaction)
            raise OutcomeUnknown("the connection was lost at the commit")
        if transaction.changes:
            self._load(transaction)
            self._connection.execute("COMMIT")
            self._loaded = None
            self.on_commit(transaction.changes)
        self.end(transaction)
        self.scheduler.pause("committed")
        if chance > 1.0 - self.faults.reply_lost:
            raise OutcomeUnknown("the connection was lost at the commit")

    def _load(self, transaction: Transaction | None) -> None:
        """Make the database show the committed state, and what this transaction wrote."""
        if self._loaded is transaction:
            return
        if self._loaded is not None:
            self._connection.execute("ROLLBACK")
            self._loaded = None
        if transaction is not None:
            self._connection.execute("BEGIN")
            self._loaded = transaction
            for change in transaction.changes:
                _apply(self._connection, change)

    # -- locks

    def _lock(self, transaction: Transaction, keys: Sequence[Key]) -> None:
        for key in keys:
            transaction.locks.add(key)
            self._owners[key] = transaction

    def _holder(self, transaction: Transaction | None, keys: Sequence[Key]) -> Transaction | None:
        """Somebody else who holds one of these locks."""
        for key in keys:
            owner = self._owners.get(key)
            if owner is not None and owner is not transaction:
                return owner
        return None

    def _wait(self, transaction: Transaction, owner: Transaction) -> None:
        """Until the owner is over. Raises ConnectionLost for a deadlock, and after a time."""
        other: Transaction | None = owner
        while other is not None:
            if other is transaction:
                self.deadlocks += 1
                self.end(transaction)
                raise Deadlock("deadlock detected")
            other = other.waits_for
        task = self.scheduler.current
        assert task is not None
        transaction.waits_for = owner
        owner.waiters.append(task)
        try:
            if not owner.is_over and not self.scheduler.park(_LOCK_TIMEOUT_S):
                self.end(transaction)
                raise ConnectionLost("the lock of a row was not to be had in time")
        finally:
            transaction.waits_for = None
            if task in owner.waiters:
                owner.waiters.remove(task)

    # -- statements

    def begin_statement(self, transaction: Transaction | None) -> None:
        self.scheduler.pause("statement")
        if self.rng.random() < self.faults.statement:
            if transaction is not None:
                self.end(transaction)
            raise ConnectionLost("the connection was lost")
        if transaction is not None and transaction.is_over:
            raise ConnectionLost("the transaction is over")

    def read(
        self, transaction: Transaction | None, statement: Statement, params: dict[str, Any]
    ) -> list[Row]:
        """A statement that gives rows; FOR UPDATE locks them, in a transaction."""
        self.begin_statement(transaction)
        plan = plan_of(statement)
        self._load(transaction)
        if plan.kind == "read" or transaction is None or self.dialect == "sqlite":
            return _rows(self._connection, plan.text, params)
        return self._read_locking(transaction, plan, params)

    def _read_locking(
        self, transaction: Transaction, plan: StatementPlan, params: dict[str, Any]
    ) -> list[Row]:
        with contextlib.ExitStack() as cleanup:
            source = self._connection
            while True:
                keys = [
                    (table.name, 0, *row)
                    for table, query in plan.locked
                    for row in _rows(source, query, params)
                ]
                if plan.skips_locked:
                    free = [key for key in keys if self._holder(transaction, [key]) is None]
                    self._lock(transaction, free)
                    rows = _rows(source, plan.text, params)
                    if len(free) == len(keys):
                        return rows
                    wanted = {key[2:] for key in free}
                    return [row for row in rows if row[: len(next(iter(wanted), ()))] in wanted]
                holder = self._holder(transaction, keys)
                if holder is None:
                    self._lock(transaction, keys)
                    return _rows(source, plan.text, params)
                source = self._wait_and_look(transaction, holder, source, keys, plan, cleanup)

    def write(self, transaction: Transaction, statement: Statement, params: dict[str, Any]) -> int:
        """INSERT, UPDATE or DELETE; rows changed."""
        self.begin_statement(transaction)
        plan = plan_of(statement)
        table = plan.table
        assert table is not None, "a statement that changes rows"
        with contextlib.ExitStack() as cleanup:
            source = self._connection
            while True:
                keys: list[Key] = []
                changes: list[Change] = []
                if plan.kind == "insert":
                    keys = table.keys_given(plan.changed[1] | params)
                holder = self._holder(transaction, keys)
                if holder is None:
                    changes = self._try(transaction, source, plan, table, params)
                    for change in changes:
                        keys += table.keys_of(change.before or change.after or ())
                        if change.before and change.after:
                            keys += table.keys_of(change.after)
                    holder = self._holder(transaction, keys)
                if holder is None:
                    break
                if plan.kind == "insert":  # Whether it conflicts is decided by what is there then.
                    self._wait(transaction, holder)
                    continue
                source = self._wait_and_look(transaction, holder, source, keys, plan, cleanup)
            self._lock(transaction, keys)
            self._load(transaction)
            for change in changes:
                _apply(self._connection, change)
            transaction.changes += changes
            return len(changes)

    def _try(
        self,
        transaction: Transaction,
        source: sqlite3.Connection,
        plan: StatementPlan,
        table: TableInfo,
        params: dict[str, Any],
    ) -> list[Change]:
        """What the statement would change where `source` is; nothing is changed yet."""
        if source is self._connection:
            self._load(transaction)
        text, literals = plan.changed
        known = _by_key(source, table) if plan.kind == "update" else {}
        source.execute("SAVEPOINT attempt")
        try:
            rows = source.execute(text, literals | params).fetchall()
        finally:
            source.execute("ROLLBACK TO attempt")
            source.execute("RELEASE attempt")
        if plan.kind == "insert":
            return [Change(table, None, row) for row in rows]
        if plan.kind == "delete":
            return [Change(table, row, None) for row in rows]
        return [Change(table, known[table.keys_of(row)[0]], row) for row in rows]

    def _wait_and_look(
        self,
        transaction: Transaction,
        holder: Transaction,
        source: sqlite3.Connection,
        keys: Sequence[Key],
        plan: StatementPlan,
        cleanup: contextlib.ExitStack,
    ) -> sqlite3.Connection:
        """Wait for the holder; then: the rows of `keys` as they are, all else as it was before."""
        if source is self._connection:
            source = cleanup.enter_context(contextlib.closing(self.snapshot()))
            for change in transaction.changes:
                _apply(source, change)
        self._wait(transaction, holder)
        self._load(transaction)
        tables = {plan.table.name: plan.table} if plan.table else {}
        tables |= {table.name: table for table, _ in plan.locked}
        for name, number, *values in keys:
            if number:
                continue
            table = tables[name]
            source.execute(table.delete(), values)
            for row in self._connection.execute(table.select(), values):
                source.execute(table.insert(), row)
        return source

    def snapshot(self) -> sqlite3.Connection:
        """A copy of the committed state."""
        self._load(None)
        copy = sqlite3.connect(":memory:", isolation_level=None)
        self._connection.backup(copy)
        return copy


class SimulatedSession:
    """`ochredb.catalog.database.Session`: of a transaction, or without one."""

    def __init__(self, catalog: SimulatedCatalog, transaction: Transaction | None) -> None:
        self._catalog, self._transaction = catalog, transaction

    def all(self, statement: Statement, **params: Any) -> list[Row]:
        return self._catalog.read(self._transaction, statement, params)

    def one(self, statement: Statement, **params: Any) -> Row | None:
        return next(iter(self.all(statement, **params)), None)

    def run(self, statement: Statement, **params: Any) -> int:
        assert self._transaction is not None, "a session that reads cannot write"
        return self._catalog.write(self._transaction, statement, params)

    def each(self, statement: Statement, params: Sequence[dict[str, Any]]) -> list[list[Row]]:
        return [self.all(statement, **some) for some in params]

    def later(self, statement: Statement, **params: Any) -> None:
        self.run(statement, **params)

    def run_many(self, statement: Statement, params: Sequence[dict[str, Any]]) -> None:
        for some in params:
            self.run(statement, **some)


class _SnapshotSession(SimulatedSession):
    """Several statements that see one state."""

    def __init__(self, catalog: SimulatedCatalog, copy: sqlite3.Connection) -> None:
        super().__init__(catalog, None)
        self._copy = copy

    def all(self, statement: Statement, **params: Any) -> list[Row]:
        self._catalog.begin_statement(None)
        return _rows(self._copy, plan_of(statement).text, params)


class SimulatedDatabase:
    """`ochredb.catalog.database.Database` of one process."""

    is_local = False
    key_bytes_max = None

    def __init__(self, catalog: SimulatedCatalog, process: Process) -> None:
        self._catalog = catalog
        self._reader = SimulatedSession(catalog, None)
        self._open: set[Transaction] = set()
        process.on_kill.append(self._lost)

    def _lost(self) -> None:
        """The process was killed: its server notices at once."""
        for transaction in self._open:
            self._catalog.end(transaction)

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        self._catalog.scheduler.check_alive()
        with _translated():
            yield self._reader

    @contextlib.contextmanager
    def read_consistent(self) -> Iterator[Session]:
        with _translated(), contextlib.ExitStack() as cleanup:
            self._catalog.begin_statement(None)
            copy = cleanup.enter_context(contextlib.closing(self._catalog.snapshot()))
            yield _SnapshotSession(self._catalog, copy)

    @contextlib.contextmanager
    def write(self, name: str = "") -> Iterator[Session]:  # noqa: ARG002
        catalog = self._catalog
        catalog.scheduler.check_alive()
        transaction = Transaction()
        self._open.add(transaction)
        try:
            with _translated():
                catalog.begin(transaction)
                yield SimulatedSession(catalog, transaction)
            catalog.commit(transaction)
        finally:
            catalog.end(transaction)
            self._open.remove(transaction)

    @contextlib.contextmanager
    def write_beside(
        self, name: str, views: contextlib.ExitStack
    ) -> Iterator[tuple[Session, Session]]:
        with self.write(name) as session:
            yield session, views.enter_context(self.read_consistent())

    def repeat(self, attempt: int) -> bool:
        self._catalog.scheduler.sleep(self._catalog.rng.uniform(0.0, 0.05 * attempt))
        return attempt < _ATTEMPTS_MAX

    def check_format(self) -> None:
        """There is one release."""

    def close(self) -> None:
        """Nothing is kept open."""


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """The driver's errors as ours, where they leave a block."""
    try:
        yield
    except ConnectionLost as error:
        kind = Aborted if isinstance(error, Deadlock) else Unavailable
        raise kind(f"the catalog is unavailable: {error}") from error


def _rows(source: sqlite3.Connection, query: tuple[str, dict[str, Any]], params: Any) -> list[Row]:
    text, literals = query
    return source.execute(text, literals | params).fetchall()


def _by_key(source: sqlite3.Connection, table: TableInfo) -> dict[Key, Row]:
    rows = source.execute(f"SELECT * FROM {table.name}")
    return {table.keys_of(row)[0]: row for row in rows}


def _apply(connection: sqlite3.Connection, change: Change) -> None:
    table = change.table
    if change.before is not None:
        connection.execute(table.delete(), table.keys_of(change.before)[0][2:])
    if change.after is not None:
        connection.execute(table.insert(), change.after)
