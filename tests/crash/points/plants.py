"""Bugs planted into the process that is killed, to see that the aftermath finds each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ochredb.catalog import appends, objects, repeats, sqlite, versions
from ochredb.catalog.statement import Statement
from ochredb.integrity import evidence
from ochredb.integrity.evidence import Evidence
from ochredb.storage import files

from .journal import Call, Journal, Json, perform


@dataclass(frozen=True)
class Plant:
    """scenario, crash_point: the case that finds it. words: in what is found."""

    scenario: str
    crash_point: str
    words: str
    put: Callable[[], None]


def _unsynced_objects() -> None:
    sync = files.sync

    def sync_folder(path: str) -> None:
        with files.opened(path) as descriptor:
            sync(descriptor)

    files.sync, files.sync_folder = _nothing, sync_folder  # type: ignore[assignment]


def _unsynced_names() -> None:
    files.sync_folder = _nothing  # type: ignore[assignment]


def _unsynced_commits() -> None:
    connect = sqlite.SqliteDatabase._connect

    def carelessly(self: Any, *, query_only: bool) -> sqlite.SqliteSession:
        session = connect(self, query_only=query_only)
        session.connection.execute("PRAGMA synchronous=OFF")
        return session

    sqlite.SqliteDatabase._connect = carelessly  # type: ignore[method-assign]


def _hasty_answers() -> None:
    def answer_first(self: Journal, call: Call, store: str, request: Json) -> None:
        self._line({"sent": store, "request": request})
        self._line({"answered": store})
        perform(call, request)

    Journal.perform = answer_first  # type: ignore[method-assign]


def _without(skipped: Statement) -> Callable[[], None]:
    """A transaction that lacks one of its statements."""

    def put() -> None:
        run, run_many = sqlite.SqliteSession.run, sqlite.SqliteSession.run_many

        def all_but_one(self: Any, statement: Statement, **params: Any) -> int:
            return 0 if statement is skipped else run(self, statement, **params)

        def none_of_one(self: Any, statement: Statement, params: Any) -> None:
            run_many(self, statement, [] if statement is skipped else params)

        sqlite.SqliteSession.run = all_but_one  # type: ignore[method-assign]
        sqlite.SqliteSession.run_many = none_of_one  # type: ignore[method-assign]

    return put


def _losses_named_late() -> None:
    Evidence.keep_loss = _nothing  # type: ignore[assignment,method-assign]


def _unsynced_evidence() -> None:
    evidence._sync_name = _nothing  # type: ignore[assignment]


def _nothing(*_what: object) -> None:
    """Instead of a sync, or of telling something."""


PLANTS = {
    "objects are not synced": Plant(
        "compact", "version.committed:2", "tree-after-power-loss: ", _unsynced_objects
    ),
    "their names are not synced": Plant(
        "compact", "version.committed:2", "tree-after-power-loss: ", _unsynced_names
    ),
    "commits are not synced": Plant(
        "write", "append.committing:4", "tree-after-power-loss: store: I1", _unsynced_commits
    ),
    "answered before the commit": Plant(
        "write", "append.committing:2", "tree: store: I1", _hasty_answers
    ),
    "fragments are not noted": Plant(
        "write", "append.committed:2", "store: I2", _without(appends._INSERT_FRAGMENT)
    ),
    "keys are not noted": Plant(
        "write", "append.committed:2", "store: I8", _without(repeats._KEEP_KEY)
    ),
    "references are not noted": Plant(
        "compact", "version.committed", "store: I6", _without(objects._INSERT_REFERENCE)
    ),
    "a request is given up before that is said": Plant(
        "repair", "replace-fragment.committed:2", "given up", _losses_named_late
    ),
    "records are given up before that is said": Plant(
        "repair", "version.committed:2", "given up", _losses_named_late
    ),
    "damaged bytes are kept in unsynced folders": Plant(
        "repair", "object.folders-synced", "tree-after-power-loss: store: 1 of", _unsynced_evidence
    ),
    "versions are not noted": Plant(
        "compact", "version.committed", "store: I7", _without(versions._INSERT_VERSION)
    ),
}
