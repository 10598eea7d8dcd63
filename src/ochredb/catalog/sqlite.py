"""SQLite as a catalog.

Rules that are easy to break, and why they stand:
* Writers queue on `flock(write.lock)` before BEGIN IMMEDIATE: the busy handler alone is unfair
  between processes by 30 to 1, with seconds at the tail.
* Nothing here opens the database, its -wal or its -shm by path: closing such a descriptor would
  drop the process's POSIX locks and lose committed writes.
* Before `fork` every connection is closed: SQLite keeps a table of the process's locks, which a
  child would inherit without holding them (reproduced: the parent's last close then removed the
  write-ahead log under the child's feet). If that was not possible, the child forgets the parent's
  connections without closing them.
* A newer release may migrate the catalog while an older one has it open. Each write transaction
  compares SQLite's `user_version` with the format that this process knows (2 µs); reads go on until
  the node's housekeeping has looked, about a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ochredb.catalog.database import Session
from ochredb.catalog.failures import translated
from ochredb.catalog.memory_lock import MemoryLock
from ochredb.catalog.seal import NO_MARK, Seal, forget_mark, put_mark
from ochredb.catalog.session import DIALECT, SqliteSession
from ochredb.crash_points import COMMITTED, COMMITTING, reach
from ochredb.errors import (
    NewerFormat,
    OchreError,
    OutcomeUnknown,
    OutOfMemory,
    Unavailable,
    newer_message,
)

__all__ = ["SqliteDatabase", "SqliteSession"]

_BUSY_TIMEOUT_S = 30.0
_VACUUM_PAGES = 25  # Freed in one transaction: 0.3 ms, and a commit.
_READER_CACHE_KIB = 512
_WAL_IDLE_BYTES_MAX = 1 << 20
_FORK_WAIT_S = 2.0
_PASSIVE = "PRAGMA wal_checkpoint(PASSIVE)"
_FAILURES = (sqlite3.Error, OSError)
# A commit that ends so has not written its last frame, without which it is none.
_NOT_COMMITTED = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR_WRITE)
_ABANDONED: list[Any] = []  # Connections of a parent process: never closed, never collected.
_DATABASES: weakref.WeakSet[SqliteDatabase] = weakref.WeakSet()


class _Reading:
    """A block that reads: a class, because the snapshot of every read enters one."""

    __slots__ = ("_database", "_session")

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database

    def __enter__(self) -> Session:
        try:
            self._session = self._database.begin_read()
        except _FAILURES as error:
            raise self._database.translated(error) from error
        return self._session

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._database.end_read(self._session)
        if isinstance(error, sqlite3.Error):
            raise self._database.translated(error) from error


class SqliteDatabase:
    """SQLite in WAL mode with full durability; `path` None is a private database in memory.

    Thread-safe: each read in progress has a connection of its own, kept for the next one; writers
    share one.
    """

    dialect: str = DIALECT
    is_local = True
    key_bytes_max = None

    def __init__(
        self,
        path: str | None,
        *,
        write_lock_path: str | None = None,
        format_version: int | None = None,
        on_full: Callable[[], None] = lambda: None,
        seal: Seal | None = None,
    ) -> None:
        """format_version: refuse to work once the catalog has another; None: whatever it has.

        on_full: called when the disk is found full, before StorageFull is raised. seal: held; let
        go of by `close`.
        """
        self._path, self._on_full = path, on_full
        self._write_lock_path = write_lock_path
        self._format_version = format_version
        self.seal = seal
        self._refusal: Callable[[], Unavailable] | None = None  # Why nothing can be done any more.
        self._closed = False
        self._reset()
        _DATABASES.add(self)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._pool = threading.Condition()  # Guards the next three.
        self._connections: list[sqlite3.Connection] = []
        self._idle: list[SqliteSession] = []
        self._reading = 0
        self._checkpointer: SqliteSession | None = None
        self._checkpoint_lock = threading.Lock()  # Guards the checkpointer and the next one.
        self._wal_pages = 0  # In the write-ahead log, when it was last looked at.
        self._lock = MemoryLock()
        self._writer: SqliteSession | None = None
        self._write_lock_fd = -1
        self._held_over_fork: list[Any] = []
        self._open = threading.Event()  # Clear while a fork waits: whoever comes waits behind it.
        self._open.set()

    def before_fork(self) -> None:
        """Wait for what is in progress, close every connection, and keep new ones from opening."""
        self._open.clear()
        for lock in (self._lock, self._checkpoint_lock, self._pool):
            if not lock.acquire(timeout=_FORK_WAIT_S):
                return
            self._held_over_fork.append(lock)
        if self._path is None or (self._writer and self._writer.connection.in_transaction):
            return
        if self._pool.wait_for(lambda: self._reading == 0, _FORK_WAIT_S):
            self._copy_back_to_close()
            self._close_connections()

    def after_fork_in_parent(self) -> None:
        self._open.set()
        while self._held_over_fork:
            self._held_over_fork.pop().release()

    def _close_connections(self) -> None:
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._idle.clear()
        self._writer = self._checkpointer = None

    def after_fork(self) -> None:
        if self._path is None:
            # The child's copy of an in-memory database is private memory: safe to go on with.
            self._pid, self._lock = os.getpid(), MemoryLock()
            self._pool, self._checkpoint_lock = threading.Condition(), threading.Lock()
            self._held_over_fork = []
            self._open.set()
            if self._writer is not None and self._writer.connection.in_transaction:
                self._writer.connection.execute("ROLLBACK")  # Of a thread that stayed behind.
            return
        _ABANDONED.append(self._connections)
        if self._write_lock_fd >= 0:
            # Else the parent's lock would outlive the parent here. (Closing a copy of a descriptor
            # does not release an flock.)
            os.close(self._write_lock_fd)
        if self.seal is not None:
            self.seal.forget()
        self._reset()

    def _connect(self, *, query_only: bool) -> SqliteSession:
        if self.seal is not None:
            self.seal.hold()
        connection = self._open_file()
        for pragma in (
            "synchronous=FULL",
            "fullfsync=ON",  # macOS only; a no-op elsewhere.
            "wal_autocheckpoint=0",
            "journal_size_limit=16777216",
            "temp_store=MEMORY",
            "secure_delete=OFF",
        ):
            connection.execute(f"PRAGMA {pragma}")
        if query_only:
            connection.execute("PRAGMA query_only=ON")
            # There may be many; what they read is small, and in the system's page cache anyway.
            connection.execute(f"PRAGMA cache_size=-{_READER_CACHE_KIB}")
        with self._pool:
            self._connections.append(connection)
        return SqliteSession(connection)

    def _open_file(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self._path or ":memory:",
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )

    def _check(self) -> None:
        if self._pid != os.getpid():
            self.after_fork()
        if not self._open.is_set():
            self._open.wait(3 * _FORK_WAIT_S)
        if self._refusal is not None:
            raise self._refusal()

    def read(self) -> contextlib.AbstractContextManager[Session]:
        if self._path is not None:
            return _Reading(self)
        self._check()
        self._memory_session()
        return self._lock

    def begin_read(self) -> SqliteSession:
        """A session until `end_read`; of a file."""
        self._check()
        return self._reader()

    def _reader(self) -> SqliteSession:
        with self._pool:
            session = self._idle.pop() if self._idle else self._connect(query_only=True)
            self._reading += 1
        return session

    def end_read(self, session: SqliteSession) -> None:
        """Give it back."""
        with self._pool:
            self._reading -= 1
            self._idle.append(session)
            if self._held_over_fork:
                self._pool.notify_all()

    @contextlib.contextmanager
    def read_consistent(self) -> Iterator[Session]:
        with self.read() as session:
            assert isinstance(session, SqliteSession)
            if session.connection.in_transaction:  # In memory, inside a write of this thread.
                yield session
                return
            session.connection.execute("BEGIN")
            try:
                yield session
            finally:
                session.connection.execute("COMMIT")

    @contextlib.contextmanager
    def writing(self) -> Iterator[SqliteSession]:  # No other writer of any process is at work.
        self._check()
        with self._lock, self._between_processes():
            try:
                if self.seal is not None:
                    self.seal.break_before_write()
                if self._writer is None:
                    memory = self._path is None
                    self._writer = (
                        self._memory_session() if memory else self._connect(query_only=False)
                    )
            except _FAILURES as error:
                raise self.translated(error) from error
            yield self._writer

    @contextlib.contextmanager
    def write(self, name: str = "") -> Iterator[Session]:
        with self.writing() as session:
            connection, session.mark = session.connection, None
            try:
                connection.execute("BEGIN IMMEDIATE")
                self._check_format(connection)
                yield session
                if session.mark is NO_MARK:  # What is dropped is not to be missed.
                    forget_mark(self._write_lock_fd)
                reach(name + COMMITTING)
            except BaseException as error:
                _roll_back(connection)
                if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY:
                    self._forget_connections()  # Opened while nothing else was permitted.
                if isinstance(error, _FAILURES):
                    raise self.translated(error) from error
                if isinstance(error, MemoryError):
                    raise OutOfMemory("not enough memory to write this now") from error
                raise
            try:
                connection.execute("COMMIT")
            except BaseException as error:  # An interrupt, too, must not leave it open.
                no_memory = isinstance(error, MemoryError) and connection.in_transaction
                _roll_back(connection)
                if no_memory:
                    raise OutOfMemory("not enough memory to commit this now") from error
                if getattr(error, "sqlite_errorcode", 0) in _NOT_COMMITTED:
                    raise self.translated(error) from error
                if isinstance(error, Exception):
                    refusal = self.translated(error)
                    raise OutcomeUnknown(f"the catalog's commit failed: {refusal}") from error
                raise
            reach(name + COMMITTED)
            if session.mark is not None:
                put_mark(self._write_lock_fd, session.mark)

    @contextlib.contextmanager
    def write_beside(
        self, name: str, views: contextlib.ExitStack
    ) -> Iterator[tuple[Session, Session]]:
        with self.write(name) as session:
            # Opened while nobody else can commit, and before this transaction does.
            state = views.enter_context(self.read_consistent())
            assert isinstance(state, SqliteSession)
            # Its first statement is what its view is of.
            state.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            yield session, state

    def repeat(self, attempt: int) -> bool:
        """Writers wait for one another before they begin: none makes another give up."""
        del attempt
        return False

    def _forget_connections(self) -> None:
        """Close what is not in use, so that it is opened anew with what is permitted then.

        All of them: SQLite's connections of one process share how the log's index was opened.
        """
        with self._checkpoint_lock, self._pool:
            unused = [item for item in (self._writer, self._checkpointer, *self._idle) if item]
            for session in unused:
                self._connections.remove(session.connection)
                session.connection.close()
            self._idle.clear()
            self._writer = self._checkpointer = None

    def check_format(self) -> None:
        """From now on refuse reads too, if a newer OchreDB has migrated the catalog."""
        with self.read() as session:
            assert isinstance(session, SqliteSession)
            self._check_format(session.connection)

    def _check_format(self, connection: sqlite3.Connection) -> None:
        known = self._format_version
        if known is None:
            return
        found = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if found > known:  # A catalog that was made from a dump and never opened to write has 0.
            message = newer_message(f"by now the catalog {self._path}", found, known)
            self._refusal = partial(NewerFormat, message)
            raise self._refusal()

    def _memory_session(self) -> SqliteSession:
        if self._writer is None:
            self._writer = self._connect(query_only=False)
        self._lock.session = self._writer
        return self._writer

    @contextlib.contextmanager
    def _between_processes(self) -> Iterator[None]:
        if self._write_lock_path is None:
            yield
            return
        if self._write_lock_fd < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            try:
                self._write_lock_fd = os.open(self._write_lock_path, flags, 0o644)
            except OSError as error:
                raise self.translated(error) from error
        fcntl.flock(self._write_lock_fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._write_lock_fd, fcntl.LOCK_UN)

    def checkpoint(self, *, restart_above_bytes: int = 64 << 20) -> bool:
        """Copy the write-ahead log into the database; never blocks writers below the bound.

        Above it, waits for readers so that the log starts again from its beginning. If nothing was
        written since the last call, cuts the log's file to nothing. Returns whether that is so.
        """
        if self._path is None:
            return False
        self._check()
        try:
            with self._checkpoint_lock:
                if self._checkpointer is None:
                    self._checkpointer = self._connect(query_only=False)
                connection = self._checkpointer.connection
                logged, copied = self.copy_back(connection)
                reach("checkpoint.copied")
                quiet = logged == copied == self._wal_pages
                self._wal_pages = logged
                page_size = connection.execute("PRAGMA page_size").fetchone()[0]
                if quiet and self.wal_bytes() > _WAL_IDLE_BYTES_MAX:
                    # It holds writers up while it waits for readers: so it does not wait.
                    connection.execute("PRAGMA busy_timeout=0")
                    try:
                        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    finally:
                        connection.execute(f"PRAGMA busy_timeout={int(_BUSY_TIMEOUT_S * 1000)}")
                    self._wal_pages = 0
                elif logged * page_size > restart_above_bytes:
                    # What came meanwhile first: writers are held up only while the rest is copied.
                    self.copy_back(connection)
                    connection.execute("PRAGMA wal_checkpoint(RESTART)")
                    self.copy_back(connection)  # Seals the rest.
                reach("checkpoint.done")
                return quiet
        except (sqlite3.OperationalError, OSError) as error:
            busy = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
            if getattr(error, "sqlite_errorcode", None) not in busy:
                raise self.translated(error) from error
            return False

    def copy_back(self, connection: sqlite3.Connection) -> tuple[int, int]:
        """A checkpoint that waits for nobody. Returns the frames of the write-ahead log, and how
        many of them are in the database. Raises sqlite3.Error, OSError."""
        if self.seal is None:
            logged, copied = connection.execute(_PASSIVE).fetchone()[1:]
            return logged, copied
        with self.seal.copying() as copying:
            if copying.is_idle:
                return copying.first, copying.first
            # While this reads the log does not begin anew, and nobody copies what comes later.
            session = self._reader()
            try:
                session.connection.execute("BEGIN")
                session.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                logged, copied = connection.execute(_PASSIVE).fetchone()[1:]
                copying.settle(logged, copied)
                return logged, copied
            finally:
                _roll_back(session.connection)
                self.end_read(session)

    def _copy_back_to_close(self) -> None:
        """Else SQLite would, with the last connection, and the seal would not know of it."""
        if self.seal is not None and self._writer is not None:
            with contextlib.suppress(*_FAILURES):
                self.copy_back(self._writer.connection)

    def wal_bytes(self) -> int:
        """Size of the log's file: it stays as large as the log once was, up to a limit."""
        try:
            return os.stat(f"{self._path}-wal").st_size
        except FileNotFoundError:
            return 0

    def release_free_pages(self, pages_max: int) -> None:
        """Give up to `pages_max` free pages back to the file system (auto_vacuum=INCREMENTAL).
        In short transactions, and page by page: the driver steps such a statement once only.
        """
        while pages_max > 0:
            with self.read() as session:
                assert isinstance(session, SqliteSession)
                free = int(session.connection.execute("PRAGMA freelist_count").fetchone()[0])
            count = min(free, pages_max, _VACUUM_PAGES)
            if count == 0:
                return
            with self.write("free-pages") as session:
                assert isinstance(session, SqliteSession)
                for _ in range(count):
                    session.connection.execute("PRAGMA incremental_vacuum(1)")
            pages_max -= count

    def translated(self, error: BaseException) -> OchreError:
        """SQLite's error as one of ours."""
        return translated(error, self._path, self._on_full)

    def close(self) -> None:
        if self._pid != os.getpid():
            self.after_fork()
        with self._lock:
            self._copy_back_to_close()
            self._refusal = partial(Unavailable, "the catalog is closed")
            with self._pool:
                self._close_connections()
            if self._write_lock_fd >= 0:
                os.close(self._write_lock_fd)
                self._write_lock_fd = -1
            if self.seal is not None:
                self.seal.let_go()


def _roll_back(connection: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.Error, MemoryError):  # SQLite itself may have done it.
        connection.execute("ROLLBACK")


def _for_all(work: Callable[[SqliteDatabase], None]) -> Callable[[], None]:
    def run() -> None:
        for database in list(_DATABASES):
            work(database)

    return run


os.register_at_fork(
    before=_for_all(SqliteDatabase.before_fork),
    after_in_parent=_for_all(SqliteDatabase.after_fork_in_parent),
    after_in_child=_for_all(SqliteDatabase.after_fork),
)
