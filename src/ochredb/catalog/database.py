"""Where the catalog's SQL runs: what SQLite (`sqlite`) and PostgreSQL (`postgres`) have in common.

A write is one transaction. On PostgreSQL another transaction may make it impossible: then the
database takes it back as a whole, which is `Aborted`, and it is repeated as a whole. A block cannot
be repeated, a method can: methods that are one transaction are decorated.

    @whole
    def create_tenant(self, name: str) -> None:
        with self._db.write("tenant-create") as session: ...

Rows are locked in one order everywhere, so that no two wait for each other: databases, logs by
collection, jobs, pins, then objects by key. What must be true of a locked row is read by a later
statement than the one that locked it: under READ COMMITTED that one may have waited, and shows
everything else as it was before.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from ochredb.catalog.session import Row
from ochredb.catalog.statement import Statement
from ochredb.errors import InvalidArgument, Unavailable

__all__ = ["Aborted", "Database", "Row", "Session", "check_key", "whole"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Session(Protocol):
    """Statements inside one transaction (or, for a read, possibly one statement each)."""

    def all(self, statement: Statement, **params: Any) -> list[Row]: ...

    def one(self, statement: Statement, **params: Any) -> Row | None: ...

    def each(self, statement: Statement, params: Sequence[dict[str, Any]]) -> list[list[Row]]:
        """The rows of a statement for each of several parameters, run in that order.

        One round trip where there are any.
        """
        ...

    def run(self, statement: Statement, **params: Any) -> int:
        """Rows changed."""
        ...

    def later(self, statement: Statement, **params: Any) -> None:
        """`run`, for whoever does not ask how many rows: sent with what follows, at the latest
        with the commit, which raises then what this would have raised."""
        ...

    def run_many(self, statement: Statement, params: Sequence[dict[str, Any]]) -> None:
        """`later` for each of several parameters, in that order."""
        ...


class Database(Protocol):
    """A SQL database that holds a catalog. Thread-safe."""

    @property
    def is_local(self) -> bool:
        """Whether a read is a look into a file of this host, which an event loop may take."""
        ...

    @property
    def key_bytes_max(self) -> int | None:
        """Bytes that a text may have which rows are found by; None: any number."""
        ...

    def read(self) -> contextlib.AbstractContextManager[Session]:
        """Single statements, each of which sees all commits made before it began."""
        ...

    def read_consistent(self) -> contextlib.AbstractContextManager[Session]:
        """Several statements that see one state."""
        ...

    def write(self, name: str = "") -> contextlib.AbstractContextManager[Session]:
        """A transaction, named for `crash_points`: durable at the block's end, or rolled back.

        Raises Unavailable (nothing changed; Aborted: repeat it) or OutcomeUnknown (the commit
        itself failed).
        """
        ...

    def write_beside(
        self, name: str, views: contextlib.ExitStack
    ) -> contextlib.AbstractContextManager[tuple[Session, Session]]:
        """`write`, and a second session that sees what the transaction reads, without its changes.

        The second session is open until `views` is closed.
        """
        ...

    def repeat(self, attempt: int) -> bool:
        """Whether to try again what was aborted for the `attempt`-th time; waits a little first."""
        ...

    def check_format(self) -> None:
        """From now on refuse reads too, if a newer OchreDB has migrated the catalog.

        Called about once a second by every process. Raises NewerFormat.
        """
        ...

    def close(self) -> None: ...


class Aborted(Unavailable):
    """The database took the transaction back because of another one; nothing was changed."""


def check_key(database: Database, field: str, text: str) -> None:
    """Raises InvalidArgument for a text that is too long to find rows of this database by."""
    limit = database.key_bytes_max
    if limit is not None and len(text) * 4 > limit:
        size = len(text.encode())
        if size > limit:
            raise InvalidArgument(f"{field} has {size} bytes: the catalog takes at most {limit}")


class _HasDatabase(Protocol):
    _db: Database


_S = TypeVar("_S", bound=_HasDatabase)


def whole(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
    """Of a method that is one transaction: repeat it as a whole if it was aborted."""

    @functools.wraps(method)
    def repeated(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        attempt = 1
        while True:
            try:
                return method(self, *args, **kwargs)
            except Aborted:
                if not self._db.repeat(attempt):
                    raise
                attempt += 1

    return repeated
