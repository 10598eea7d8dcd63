"""What a process does about once a second beside its roles' work.

Each process tidies up after itself: memory, mapped pages, SQLite's write-ahead log. What is of the
whole catalog, pins and idempotency keys that have expired, is done by those that compact. Several
may do it at the same time: each is one small transaction that finds nothing left to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ochredb.ages import Ages
from ochredb.catalog.database import Database
from ochredb.catalog.logs import LogTable
from ochredb.catalog.pins import PinTable
from ochredb.catalog.repeats import KEYS_KEPT_S
from ochredb.catalog.sqlite import SqliteDatabase
from ochredb.clock import Clock
from ochredb.plan import cost
from ochredb.storage.base import LocalStore
from ochredb.storage.directory import DirectoryStore
from ochredb.storage.space import Reserve
from ochredb_query.service import QueryService

_FREE_PAGES_PER_TURN = 2_000
_FREE_PAGES_UNDER_WRITES = 200  # They would take most of them again, and wait for each commit.
_IDLE_AFTER_S = 1.0  # Without a write.
_SELDOM_S = 10.0
_FOLDERS_PERIOD_S = 600.0
_TEMPORARY_KEPT_S = 600.0
_MEASURE_AFTER_S = 5.0  # After the start; by then first answers have been given.


class Housekeeping:
    """`turn` is called by one thread, about once a second."""

    def __init__(
        self,
        *,
        database: Database,
        store: LocalStore,
        logs: LogTable,
        query: QueryService | None,
        reserve: Reserve,
        ages: Ages,
        clock: Clock,
        appends: bool,
        compacts: bool,
        is_read_only: bool,
        since_append_s: Callable[[], float],
        tidy: Callable[[bool], None],
    ) -> None:
        """query: of this process. appends: this process keeps SQLite's write-ahead log short.

        compacts: this process does what is of the whole catalog.

        since_append_s: since this process last took a write. tidy: see `Node`.
        """
        self._database, self._store, self._logs = database, store, logs
        self._query, self._reserve, self._ages, self._clock = query, reserve, ages, clock
        self._appends, self._compacts, self._is_read_only = appends, compacts, is_read_only
        self._since_append_s, self._tidy = since_append_s, tidy
        self._seldom_s = self._folders_s = 0.0
        self._measure_due_s = math.inf

    def start(self) -> None:
        """The roles are at work: when costs are measured counts from here."""
        if self._query is not None and not self._is_read_only:
            self._measure_due_s = self._clock.monotonic_s() + _MEASURE_AFTER_S

    def turn(self) -> None:
        """Raises NewerFormat once a newer OchreDB has migrated the catalog, and other errors."""
        if not self._is_read_only:
            self._reserve.take_back()
        was_read = True
        try:
            self._database.check_format()
            was_read = self._query is not None and self._query.trim()
        finally:  # However long the catalog is away, memory is looked after.
            self._tidy(not was_read and self._since_append_s() > _IDLE_AFTER_S)
            self._logs.recent.age()
        if self._is_read_only:
            return
        if self._appends and isinstance(self._database, SqliteDatabase):
            self._checkpoint(self._database)
        now_s = self._clock.monotonic_s()
        if now_s >= self._measure_due_s:
            self._measure_due_s = math.inf
            cost.measure(self._clock)
        if self._compacts and now_s - self._seldom_s > _SELDOM_S:
            self._seldom_s = now_s
            self._expire()
            if isinstance(self._database, SqliteDatabase):
                written = self._since_append_s() < _SELDOM_S
                pages = _FREE_PAGES_UNDER_WRITES if written else _FREE_PAGES_PER_TURN
                self._database.release_free_pages(pages)
            if isinstance(self._store, DirectoryStore):
                self._clean(self._store, now_s)

    def _checkpoint(self, database: SqliteDatabase) -> None:
        # Half a checkpoint would only eat what is kept for deletes.
        if self._reserve.has_room(database.wal_bytes()) and database.checkpoint():
            database.release_free_pages(_FREE_PAGES_PER_TURN)

    def _expire(self) -> None:
        PinTable(self._database, self._clock, self._ages).release_expired()
        self._logs.expire_idempotency(KEYS_KEPT_S + self._ages.slack_s(KEYS_KEPT_S))

    def _clean(self, store: DirectoryStore, now_s: float) -> None:
        store.clean_temporary(self._ages.before_us(_TEMPORARY_KEPT_S))
        if now_s - self._folders_s > _FOLDERS_PERIOD_S:
            self._folders_s = now_s
            store.remove_empty_folders()
