"""PostgreSQL as a catalog, for processes on many hosts.

Rules that are easy to break, and why they stand:
* Transactions are READ COMMITTED with row locks, in the order of `database.py`. Each begins by
  taking an advisory lock, shared, and comparing the catalog's format: a migration takes the same
  lock alone, so no process of an older release writes to what it does not know.
* A lost connection is Unavailable before the COMMIT was sent, when nothing can have been changed,
  and OutcomeUnknown from then on. No timeout of the server's ends a COMMIT
  (`PostgresSession.commit`). A server that says nothing at all is given up as if it were gone.
* A single read that finds its connection dead is tried again on another: the server was started
  anew, or another one has taken its place.
* What is read must come from the primary, or a read would not see the writes before it (I4): of
  the hosts of a URL those that are standbys, or read-only as a fenced primary is, are passed over,
  and a server in recovery is refused whatever the URL says. Nothing is read from replicas.
* A read block holds no connection between its statements, so a thread that writes and reads
  meanwhile never waits for itself.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ochredb.catalog.connections import Connections
from ochredb.catalog.database import Row, Session
from ochredb.catalog.postgres_config import PostgresConfig
from ochredb.catalog.postgres_failures import translated
from ochredb.catalog.postgres_session import NoAnswer, PostgresConnection, PostgresSession
from ochredb.catalog.schema import FORMAT_VERSION
from ochredb.catalog.statement import Statement
from ochredb.checksum import signed, xxh3
from ochredb.clock import Clock
from ochredb.crash_points import COMMITTED, COMMITTING, reach
from ochredb.errors import (
    InvalidArgument,
    NewerFormat,
    OchreError,
    OutcomeUnknown,
    OutOfMemory,
    Unavailable,
    newer_message,
)

_T = TypeVar("_T")
_KEY_BYTES_MAX = 1_000  # An index row holds 2,700, of up to three texts, escaped.
_PATIENCE_S = 5.0  # Beyond a statement's timeout, which the server should have kept.
_CONNECTIONS_TRIED = 3  # Before a server that ends each of them is called unavailable.
_REPEAT_PAUSE_S = 0.01
_SERVER_VERSION_MIN = 130_000
_ABANDONED: list[Any] = []  # Connections of a parent process: never closed, never collected.

_SET_UP = """
SELECT pg_is_in_recovery(), current_setting('fsync'), current_setting('server_encoding'),
  current_setting('server_version_num')::int,
  set_config('search_path', %(schema)s, false),
  set_config('synchronous_commit', CASE current_setting('synchronous_commit')
    WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, false),
  set_config('statement_timeout', %(statement_ms)s, false),
  set_config('lock_timeout', %(lock_ms)s, false),
  set_config('tcp_keepalives_idle', '5', false),
  set_config('tcp_keepalives_interval', '2', false),
  set_config('tcp_keepalives_count', '3', false),
  set_config('tcp_user_timeout', '10000', false),
  set_config('idle_in_transaction_session_timeout', %(idle_ms)s, false)
"""
_NOW = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
_TICK = f"SELECT {_NOW}"
_FORMAT = f"SELECT format_version, {_NOW} FROM store"
_TABLES = (
    "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace"
    " AND relkind = 'r' ORDER BY relname"
)
_SIZE = f"SELECT sum(pg_total_relation_size(quote_ident(relname)::regclass)) FROM ({_TABLES}) t"
_BEGIN_READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"


class CatalogClock:
    """The catalog's time, by the host's monotonic clock since the server was last asked.

    Leases, stamps and log time of all hosts are judged by it. Nothing safe rests on it.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_us: int | None = None

    def now_us(self) -> int:
        if self._offset_us is None:  # Nobody has asked yet.
            return self._clock.now_us()
        return int(self._clock.monotonic_s() * 1e6) + self._offset_us

    def monotonic_s(self) -> float:
        return self._clock.monotonic_s()

    def sleep(self, seconds: float) -> None:
        self._clock.sleep(seconds)

    def set(self, server_us: int, asked_s: float) -> None:
        """server_us: what the server said; asked_s: the monotonic time before it was asked.

        It said so some time between then and now. What agrees with that is kept as it is: a clock
        that is moved by each answer's delay would go back and forth.
        """
        least = server_us - int(self._clock.monotonic_s() * 1e6)
        most = server_us - int(asked_s * 1e6)
        if self._offset_us is None:
            self._offset_us = (least + most) // 2
        self._offset_us = min(max(self._offset_us, least), most)


class _Reads:
    """A Session of single statements, each on whatever connection is free; also its block."""

    def __init__(self, database: PostgresDatabase) -> None:
        self._database = database

    def __enter__(self) -> Session:
        self._database.check_usable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None: ...

    def all(self, statement: Statement, **params: Any) -> list[Row]:
        return self._database.read_once(lambda session: session.all(statement, **params))

    def one(self, statement: Statement, **params: Any) -> Row | None:
        return self._database.read_once(lambda session: session.one(statement, **params))

    def each(self, statement: Statement, params: Sequence[dict[str, Any]]) -> list[list[Row]]:
        return self._database.read_once(lambda session: session.each(statement, params))

    def run(self, *_statement: Any, **_params: Any) -> int:
        raise Unavailable("a session that reads is readonly")

    def later(self, *_statement: Any, **_params: Any) -> None:
        raise Unavailable("a session that reads is readonly")

    def run_many(self, *_statement: Any) -> None:
        raise Unavailable("a session that reads is readonly")


class PostgresDatabase:
    """See the module. Thread-safe. Connects when it is first used.

    clock: the catalog's time.
    """

    is_local = False
    key_bytes_max = _KEY_BYTES_MAX

    def __init__(self, url: str, config: PostgresConfig, clock: Clock, rng: random.Random) -> None:
        """url: as libpq takes it, several hosts included. Raises InvalidArgument."""
        self.config, self._host_clock, self._rng = config, clock, rng
        self.clock = CatalogClock(clock)
        self._conninfo, self.place = _conninfo(url, config)
        self.lock_key = signed(xxh3(f"ochredb/{config.schema}".encode()))
        self._refusal: Callable[[], Unavailable] | None = None  # Why nothing can be done any more.
        self._begin_write = (
            f"BEGIN; SELECT pg_advisory_xact_lock_shared({self.lock_key});"
            " SELECT format_version FROM store"
        )
        self._reading = _Reads(self)
        self._open_pools()

    # -- connections

    def _open_pools(self) -> None:
        self._pid = os.getpid()
        count, wait_s = self.config.connections_max, self.config.wait_timeout_s
        # Two, so that who holds one for a transaction never waits for another one of these.
        self._reads = Connections(self.connect, count, wait_s, self._host_clock)
        self._writes = Connections(self.connect, count, wait_s, self._host_clock)

    def connect(self) -> PostgresConnection:
        """A connection of the caller's own. Raises InvalidArgument, Unavailable."""
        try:
            connection = PostgresConnection.connect(self._conninfo, autocommit=True)
        except psycopg.Error as error:
            raise self.translated(error) from error
        try:
            self._configure(connection)
        except BaseException as error:
            connection.close()
            if isinstance(error, psycopg.Error):
                raise self.translated(error) from error
            raise
        return connection

    def _configure(self, connection: PostgresConnection) -> None:
        """Settings of a new connection; refuses what would lose writes or miss them."""
        config = self.config
        settings = {
            "schema": config.schema,
            "statement_ms": str(int(config.statement_timeout_s * 1e3)),
            "lock_ms": str(int(config.lock_timeout_s * 1e3)),
            "idle_ms": str(int(config.idle_in_transaction_timeout_s * 1e3)),
        }
        row = connection.execute(_SET_UP, settings, prepare=False).fetchone()
        assert row is not None
        in_recovery, fsync, encoding, version = row[:4]
        if in_recovery:
            raise Unavailable(f"{self.place} is a standby: the catalog is read at its primary")
        if fsync != "on" and not config.allow_fsync_off:
            raise InvalidArgument(f"{self.place} has fsync=off, which loses acknowledged writes")
        if encoding != "UTF8":
            raise InvalidArgument(f"{self.place} has encoding {encoding} instead of UTF8")
        if version < _SERVER_VERSION_MIN:
            raise InvalidArgument(f"{self.place} is PostgreSQL {version // 10_000}: 13 is needed")
        connection.adapt(self._host_clock)
        connection.patience_s = config.statement_timeout_s + _PATIENCE_S
        connection.commit_patience_s = config.commit_timeout_s
        asked_s = self.clock.monotonic_s()
        tick = connection.execute(_TICK, prepare=False).fetchone()
        assert tick is not None
        self.clock.set(tick[0], asked_s)

    def check_usable(self) -> None:
        """Raises Unavailable once it is closed, or migrated by a newer OchreDB."""
        if self._refusal is not None:
            raise self._refusal()
        if self._pid != os.getpid():  # The parent's connections stay the parent's.
            _ABANDONED.append((self._reads, self._writes))
            self._open_pools()

    def _taken(
        self, pool: Connections, begin: Callable[[PostgresSession], _T]
    ) -> tuple[PostgresConnection, _T]:
        """A connection, and what `begin` said on it: on another if this one turned out dead.

        Nothing has been changed before `begin` has returned. `check_usable` comes before: it
        changes the pools in a fork's child.
        """
        left = _CONNECTIONS_TRIED
        while True:
            connection = pool.take()
            try:
                return connection, begin(connection.session)
            except BaseException as error:
                left -= 1
                connection.session.roll_back()  # Which notices that it is dead, at the latest.
                dead = connection.closed and isinstance(error, psycopg.Error)
                again = dead and left > 0 and not isinstance(error, NoAnswer)
                pool.give(connection)
                if again:
                    pool.drop_idle()  # They are likely as dead as this one.
                elif isinstance(error, psycopg.Error):
                    raise self.translated(error) from error
                else:
                    raise

    def translated(self, error: BaseException) -> OchreError:
        """The driver's error as one of ours."""
        return translated(error, self.place)

    # -- blocks

    def read(self) -> contextlib.AbstractContextManager[Session]:
        return self._reading

    def read_once(self, statement: Callable[[PostgresSession], _T]) -> _T:
        """Run one statement outside of a transaction. Cost: one round trip."""
        self.check_usable()
        connection, found = self._taken(self._reads, statement)
        self._reads.give(connection)
        return found

    def read_consistent(self) -> contextlib.AbstractContextManager[Session]:
        return self._consistent(_BEGIN_READ)

    @contextlib.contextmanager
    def _consistent(self, begin: str) -> Iterator[Session]:
        self.check_usable()
        connection, _ = self._taken(self._reads, lambda session: session.begin(begin))
        try:
            yield connection.session
        except psycopg.Error as error:
            raise self.translated(error) from error
        finally:
            connection.session.roll_back()
            self._reads.give(connection)

    @contextlib.contextmanager
    def write(self, name: str = "") -> Iterator[Session]:
        with self._transaction(name, self._begin) as connection:
            yield connection.session

    def _begin(self, session: PostgresSession) -> None:
        row = session.begin(self._begin_write)
        self._check_format(None if row is None else row[0])

    def _begin_repeatable(self, session: PostgresSession) -> None:
        # Before the transaction: its first statement decides what it sees.
        session.begin(f"SELECT pg_advisory_lock_shared({self.lock_key})")
        begin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT format_version FROM store"
        try:
            row = session.begin(begin)
            self._check_format(None if row is None else row[0])
        except BaseException:
            session.connection.close()  # And with it the lock.
            raise

    @contextlib.contextmanager
    def write_beside(
        self, name: str, views: contextlib.ExitStack
    ) -> Iterator[tuple[Session, Session]]:
        with self._transaction(name, self._begin_repeatable) as connection:
            row = connection.session.begin("SELECT pg_export_snapshot()")
            assert row is not None
            begin = f"{_BEGIN_READ}; SET TRANSACTION SNAPSHOT '{row[0]}'"
            state = views.enter_context(self._consistent(begin))
            yield connection.session, state

    @contextlib.contextmanager
    def _transaction(
        self, name: str, begin: Callable[[PostgresSession], None]
    ) -> Iterator[PostgresConnection]:
        self.check_usable()
        connection, _ = self._taken(self._writes, begin)
        session = connection.session
        try:
            try:
                yield connection
                reach(name + COMMITTING)
            except BaseException as error:
                session.roll_back()
                if isinstance(error, psycopg.Error):
                    raise self.translated(error) from error
                if isinstance(error, MemoryError):
                    raise OutOfMemory("not enough memory to write this now") from error
                raise
            try:
                session.commit()
            except psycopg.Error as error:
                session.roll_back()
                # A process that is ended behind its COMMIT says so in the place of an answer: only
                # one that is still there has said that it did not commit.
                if connection.closed:
                    raise OutcomeUnknown(f"the catalog's commit failed: {error}") from error
                raise self.translated(error) from error
            except BaseException:  # An interrupt, too, must not leave it open.
                session.roll_back()
                raise
            reach(name + COMMITTED)
        finally:
            if begin == self._begin_repeatable:
                connection.close()  # And with it the lock. Seldom: a backup begins.
            self._writes.give(connection)

    def repeat(self, attempt: int) -> bool:
        if attempt >= self.config.attempts_max:
            return False
        self._host_clock.sleep(self._rng.uniform(0.0, _REPEAT_PAUSE_S * 2**attempt))
        return True

    # -- space

    def size_bytes(self) -> int:
        """Of all tables and indexes."""
        row = self.read_once(lambda session: session.begin(_SIZE))
        return 0 if row is None else int(row[0])

    def rewrite(self) -> str | None:
        """Write all tables anew, each locked meanwhile; returns why that was not possible.

        Of what was deleted nothing is left then, but in the server's write-ahead log and copies.
        """
        with contextlib.closing(self.connect()) as connection:
            try:
                connection.patience_s = math.inf
                connection.execute("SET statement_timeout = 0")
                for (name,) in connection.execute(_TABLES).fetchall():
                    connection.warned = ""
                    connection.execute(f'VACUUM (FULL) "{name}"'.encode())
                    if connection.warned:
                        return (
                            f"table {name} of the catalog was not written anew: {connection.warned}"
                        )
            except psycopg.Error as error:
                raise self.translated(error) from error
        return None

    # -- life

    def check_format(self) -> None:
        self.check_usable()
        asked_s = self.clock.monotonic_s()
        self._reads.tidy()
        self._writes.tidy()
        row = self.read_once(lambda session: session.begin(_FORMAT))
        if row is not None:
            self.clock.set(row[1], asked_s)
        self._check_format(None if row is None else row[0])

    def _check_format(self, found: int | None) -> None:
        if found is None:
            raise Unavailable(f"the catalog at {self.place} is gone: its store has no row")
        if found > FORMAT_VERSION:
            message = newer_message(f"by now the catalog at {self.place}", found, FORMAT_VERSION)
            self._refusal = partial(NewerFormat, message)
            raise self._refusal()

    def close(self) -> None:
        self._refusal = partial(Unavailable, "the catalog is closed")
        if self._pid == os.getpid():
            self._reads.close()
            self._writes.close()


def _conninfo(url: str, config: PostgresConfig) -> tuple[str, str]:
    """libpq's string, with defaults that find the primary among several hosts, or addresses of one,
    and notice a dead server; and what may be told of it."""
    try:
        given = conninfo_to_dict(url)
    except psycopg.Error as error:
        # Its text may quote the URL, and with it a password.
        raise InvalidArgument("catalog_url is not postgresql://user@host:port/database") from error
    defaults: dict[str, Any] = {
        "connect_timeout": max(2, round(config.connect_timeout_s)),  # libpq: 1 means 2.
        "application_name": config.application_name,
        # Else the first host that answers is taken, and refused for ever if it is a standby.
        "target_session_attrs": "read-write",
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 15_000,
    }
    place = f"{given.get('host') or 'localhost'}:{given.get('port') or 5432}"
    return make_conninfo("", **defaults | given), f"{place}/{given.get('dbname') or ''}"
