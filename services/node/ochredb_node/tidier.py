"""The housekeeping of a node that only reads: the compactor's threads do it otherwise."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ochredb.catalog.database import SqliteDatabase
from ochredb.errors import NewerFormat, OchreError
from ochredb_query.service import QueryService

log = logging.getLogger("ochredb.node")

_PERIOD_S = 1.0


class Tidier:
    """Lets go of what was not read for a while, about once a second, in a thread.

    Also looks whether a newer OchreDB has migrated the catalog; then reads are refused.
    """

    def __init__(
        self, query: QueryService, database: SqliteDatabase, tidy: Callable[[bool], None]
    ) -> None:
        """tidy: see `Node`."""
        self._query, self._database, self._tidy = query, database, tidy
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tidy", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(_PERIOD_S):
            try:
                self._database.check_format()
                self._tidy(not self._query.trim())
            except NewerFormat as error:
                log.error("reading ends: %s", error)
                return
            except OchreError as error:  # Damage, for one: who reads is told of it.
                log.warning("housekeeping failed: %s", error)
