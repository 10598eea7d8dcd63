"""A catalog that may only be read: on a read-only file system, or another user's.

SQLite reads a database in WAL mode without writing if it finds its shared-memory file, even that of
a writer that was killed, whose commits are in the write-ahead log only. Without that file (the last
writer closed in good order, or the file was not copied along) it would have to create one. Then the
database and its log are copied to a private place, and read there. A mere look at the database file
(`immutable=1`) would miss what is in the log.

A copy is made only while nobody writes: a writer has the shared-memory file open. Before each read
two file times are compared, and what has changed since the copy is opened anew, so a writer that
comes later is seen (I4).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from urllib.parse import quote

from ochredb.catalog.migrate import CATALOG_NAME
from ochredb.catalog.schema import FORMAT_VERSION
from ochredb.catalog.sqlite import SqliteDatabase, SqliteSession
from ochredb.errors import Forbidden, InvalidArgument, OtherFormat, Unavailable, newer_message

_COPY_ATTEMPTS_MAX = 10
_STORE = "SELECT store_id, format_version FROM store"
_Signature = tuple[tuple[int, int, int] | None, ...]


def read_only_reason(root: str) -> str | None:
    """Why a store in this directory can be read but not written; None if it can, or is not there.

    The directory decides. In one that can be written, files that cannot are a fault that may be
    mended while a process runs. Cost: two system calls.
    """
    if not os.path.isfile(os.path.join(root, CATALOG_NAME)):
        return None
    by_effective = os.access in os.supports_effective_ids
    if os.access(root, os.W_OK | os.X_OK, effective_ids=by_effective):
        return None
    if os.statvfs(root).f_flag & os.ST_RDONLY:
        return "its file system is read-only"
    return "this user may not write there"


def open_read_only(root: str, reason: str) -> tuple[SqliteDatabase, str]:
    """The catalog of an existing store, and its store id; see `read_only_reason`.

    Raises Unavailable, or InvalidArgument for what is not a catalog of this version.
    """
    database = ReadOnlyDatabase(root, reason)
    try:
        with database.read() as session:
            assert isinstance(session, SqliteSession)
            row = session.connection.execute(_STORE).fetchone()
        if row is not None and row[1] > FORMAT_VERSION:
            raise OtherFormat(newer_message(root, row[1], FORMAT_VERSION))
        if row is None or row[1] != FORMAT_VERSION:
            version = None if row is None else row[1]
            raise OtherFormat(
                f"{root} has format version {version}, and this OchreDB reads {FORMAT_VERSION}: "
                "open it once where it can be written"
            )
        return database, str(row[0])
    except BaseException:
        database.close()
        raise


class ReadOnlyDatabase(SqliteDatabase):
    """See the module. `write` raises Forbidden."""

    def __init__(self, root: str, reason: str) -> None:
        self._root, self._reason = root, reason
        self._source = os.path.join(root, CATALOG_NAME)
        self._turn = threading.Lock()  # Guards the next two, and who opens anew.
        self._copy: str | None = None  # The folder of a private copy.
        self._copied: _Signature = ()
        self._owner_pid = os.getpid()
        super().__init__(self._source, format_version=FORMAT_VERSION)
        self._settle()

    def begin_read(self) -> SqliteSession:
        if self._copy is not None and _signature(self._source) != self._copied:
            with self._turn:
                if self._copy is not None and _signature(self._source) != self._copied:
                    self._settle()
        return super().begin_read()

    def end_read(self, session: SqliteSession) -> None:
        super().end_read(session)
        with self._pool:  # What was opened before the last turn is not used again.
            if session.connection not in self._connections and session in self._idle:
                self._idle.remove(session)
                session.connection.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[SqliteSession]:
        why = self._reason
        if read_only_reason(self._root) is None:
            why = "it could not be written when it was opened; open it again"
        raise Forbidden(f"{self._root} is open for reading only: {why}")
        yield  # Makes it a generator, as the base's is.

    def checkpoint(self, *, restart_above_bytes: int = 64 << 20) -> bool:
        """There is nothing to copy back."""
        del restart_above_bytes
        return False

    def close(self) -> None:
        super().close()
        if self._copy is not None and self._owner_pid == os.getpid():
            shutil.rmtree(self._copy, ignore_errors=True)
            self._copy = None

    def _open_file(self) -> sqlite3.Connection:
        if self._copy is not None:
            return super()._open_file()
        return _connected(self._source)

    def _settle(self) -> None:
        """Read in place if that is possible, else from a copy."""
        old = self._copy
        copy: str | None = None
        copied: _Signature = ()
        if not _readable_in_place(self._source):
            copy, copied = _copied(self._source)
        with self._pool:
            for session in self._idle:
                session.connection.close()
            self._idle.clear()
            self._connections.clear()  # Those in use are closed when they come back.
            self._copy, self._copied = copy, copied
            self._path = self._source if copy is None else os.path.join(copy, CATALOG_NAME)
        if old is not None:
            # Connections that are still in use have the files open.
            shutil.rmtree(old, ignore_errors=True)


def _connected(path: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(path)}?mode=ro",
        uri=True,
        timeout=30.0,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
    )


def _readable_in_place(path: str) -> bool:
    connection = _connected(path)
    try:
        connection.execute(_STORE).fetchone()
        return True
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_ERROR:  # About tables that are not as ours.
            raise InvalidArgument(f"{path} is not an OchreDB catalog: {error}") from error
        return False
    except sqlite3.DatabaseError as error:
        raise InvalidArgument(f"{path} is not an OchreDB catalog: {error}") from error
    finally:
        connection.close()


def _copied(path: str) -> tuple[str, _Signature]:
    """A folder with a copy of the database and its log, and what they were. Raises Unavailable.

    Nothing of this process has the files open: closing them would drop its locks.
    """
    folder = tempfile.mkdtemp(prefix="ochredb-read-only-")
    try:
        for _ in range(_COPY_ATTEMPTS_MAX):
            before = _signature(path)
            for suffix in ("", "-wal"):
                target = os.path.join(folder, CATALOG_NAME + suffix)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(target)
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(path + suffix, target)
            if _signature(path) == before:
                return folder, before
        raise Unavailable(f"{path} cannot be copied: it changes all the time")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise Unavailable(f"cannot copy {path} to {folder}: {error}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _signature(path: str) -> _Signature:
    """What tells a changed database: number, size and time of the file and of its log."""
    found: list[tuple[int, int, int] | None] = []
    for name in (path, path + "-wal"):
        try:
            status = os.stat(name)
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)
