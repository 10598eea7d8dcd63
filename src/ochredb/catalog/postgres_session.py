"""Statements on one connection of PostgreSQL, by psycopg.

Statements are prepared once on each connection. Texts may hold what PostgreSQL's may not: NUL is
stored as two characters U+0001, and U+0001 itself as U+0001 U+0002, which keeps their order
(docs/formats/catalog.md).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.adapt import Dumper, Loader
from psycopg.pq import Format
from psycopg.types.numeric import Int8BinaryDumper, NumericBinaryLoader

from ochredb.catalog.session import Row
from ochredb.catalog.statement import Statement
from ochredb.clock import Clock, SystemClock
from ochredb.errors import OutcomeUnknown

_T = TypeVar("_T")
DIALECT = "postgresql"
_TEXT_OID = 25
_QUEUE_MAX = 1_000  # Statements that are kept back at most.
_NO_TIMEOUT = "SET LOCAL statement_timeout = 0"


class _TextDumper(Dumper):
    """See the module."""

    format = Format.BINARY
    oid = _TEXT_OID

    def dump(self, obj: str) -> bytes:
        if "\0" in obj or "\1" in obj:
            obj = obj.replace("\1", "\1\2").replace("\0", "\1\1")
        return obj.encode()


class _TextLoader(Loader):
    """See the module."""

    format = Format.BINARY

    def load(self, data: Any) -> str:
        text = str(data, "utf-8")
        if "\1" in text:
            return text.replace("\1\1", "\0").replace("\1\2", "\1")
        return text


class _SumLoader(NumericBinaryLoader):
    """Sums of whole numbers, which PostgreSQL makes decimals."""

    def load(self, data: Any) -> int:  # type: ignore[override]
        return int(super().load(data))


class NoAnswer(psycopg.OperationalError):
    """The server was silent for longer than it may be; the connection was given up."""


class PostgresConnection(psycopg.Connection[Row]):
    """A connection with its session. warned: what the server said of the last commit, or nothing.

    patience_s: for an answer, and for that to a commit. Timeouts of statements are kept by the
    server; this one notices that there is none any more.
    opened_s, used_s: monotonic times, for `Connections`.
    """

    session: PostgresSession
    warned = ""
    patience_s = 10.0  # As long as nothing else is said.
    commit_patience_s = math.inf
    opened_s = used_s = 0.0
    _clock: Clock = SystemClock()

    def wait(self, gen: PQGen[_T], *more: Any, **named: Any) -> _T:
        """As psycopg's, which may wait without end. Raises NoAnswer."""
        return super().wait(self._patient(gen), *more, **named)

    def _patient(self, gen: PQGen[_T]) -> PQGen[_T]:
        try:
            wanted = next(gen)
            until_s = self._clock.monotonic_s() + self.patience_s
            while True:
                ready = yield wanted
                if not ready and self._clock.monotonic_s() > until_s:
                    self.pgconn.finish()
                    raise NoAnswer(f"no answer for {self.patience_s:g} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            result: _T = end.value
            return result

    def adapt(self, clock: Clock) -> None:
        """Once, after it was opened. clock: by which patience is measured."""
        self._clock = clock
        self.session = PostgresSession(self)
        self.prepare_threshold = sys.maxsize  # What is to be prepared says so.
        self.prepared_max = None
        # One type for all numbers: a statement is prepared for the types of its parameters.
        self.adapters.register_dumper(int, Int8BinaryDumper)
        self.adapters.register_dumper(str, _TextDumper)
        for name in ("text", "varchar"):
            self.adapters.register_loader(name, _TextLoader)
        self.adapters.register_loader("numeric", _SumLoader)
        self.add_notice_handler(self._noticed)

    def _noticed(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            self.warned = notice.message_primary or "warned"


class PostgresSession:
    """A Session on one connection, which the caller begins and ends transactions on.

    A statement costs a round trip; those of `later` and `run_many` none of their own.
    """

    __slots__ = ("_queue", "connection")

    def __init__(self, connection: PostgresConnection) -> None:
        self.connection = connection
        self._queue: list[tuple[str, dict[str, Any]]] = []

    def all(self, statement: Statement, **params: Any) -> list[Row]:
        return self._execute(statement, params).fetchall()

    def one(self, statement: Statement, **params: Any) -> Row | None:
        return self._execute(statement, params).fetchone()

    def each(self, statement: Statement, params: Sequence[dict[str, Any]]) -> list[list[Row]]:
        if not params:
            return []
        text, literals = statement.compiled(DIALECT)
        with self.connection.pipeline():
            self._send_queue()
            sent = [self._send(text, literals | some if literals else some) for some in params]
        return [cursor.fetchall() for cursor in sent]

    def portions(self, statement: Statement, count: int) -> Iterator[list[Row]]:
        """The rows of a statement without parameters, `count` at a time; in a transaction."""
        text, literals = statement.compiled(DIALECT)
        with self.connection.cursor("portions", binary=True) as cursor:
            cursor.execute(text, literals)
            while rows := cursor.fetchmany(count):
                yield rows

    def run(self, statement: Statement, **params: Any) -> int:
        return self._execute(statement, params).rowcount

    def later(self, statement: Statement, **params: Any) -> None:
        text, literals = statement.compiled(DIALECT)
        self._queue.append((text, literals | params if literals else params))
        if len(self._queue) > _QUEUE_MAX:
            with self.connection.pipeline():
                self._send_queue()

    def run_many(self, statement: Statement, params: Sequence[dict[str, Any]]) -> None:
        for some in params:
            self.later(statement, **some)

    def _execute(self, statement: Statement, params: dict[str, Any]) -> psycopg.Cursor[Row]:
        text, literals = statement.compiled(DIALECT)
        if literals:
            params = literals | params
        if not self._queue:
            return self._send(text, params)
        with self.connection.pipeline():
            self._send_queue()
            cursor = self._send(text, params)
        return cursor

    def _send(self, text: str, params: dict[str, Any]) -> psycopg.Cursor[Row]:
        cursor = self.connection.cursor(binary=True)
        return cursor.execute(text, params, prepare=True)

    def _send_queue(self) -> None:
        queue, self._queue = self._queue, []
        for text, params in queue:
            self._send(text, params)

    def begin(self, text: str) -> Row | None:
        """Run statements that begin a transaction; the row that the last one gives, if any."""
        self._queue.clear()
        cursor = self.connection.execute(text)
        while cursor.nextset():
            pass
        row: Row | None = cursor.fetchone() if cursor.description else None
        return row

    def commit(self) -> None:
        """Raises psycopg.Error, or OutcomeUnknown if no standby has confirmed what was committed.

        No timeout of the server's ends a commit: it would end the wait for a standby, and be called
        a success.
        """
        connection = self.connection
        connection.warned = ""
        patience_s, connection.patience_s = connection.patience_s, connection.commit_patience_s
        try:
            done = self._send_commit()
        finally:
            connection.patience_s = patience_s
        if done.statusmessage != "COMMIT":
            raise psycopg.errors.InFailedSqlTransaction(f"COMMIT ended in {done.statusmessage}")
        if connection.warned:
            raise OutcomeUnknown(f"the catalog's commit is uncertain: {connection.warned}")

    def _send_commit(self) -> psycopg.Cursor[Row]:
        connection = self.connection
        if self._queue:
            with connection.pipeline():
                self._send_queue()
                connection.execute(_NO_TIMEOUT, prepare=False)
                done = connection.execute("COMMIT", prepare=False)
        else:
            done = connection.execute(f"{_NO_TIMEOUT}; COMMIT", prepare=False)
            while done.nextset():
                pass
        return done

    def roll_back(self) -> None:
        """Leave the connection as it was before the transaction, or closed."""
        self._queue.clear()
        try:
            if not self.connection.closed:
                self.connection.execute("ROLLBACK", prepare=False)
        except psycopg.Error:
            self.connection.close()
