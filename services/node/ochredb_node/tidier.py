"""The housekeeping of a node that only reads: the compactor's threads do it otherwise."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ochredb_query.service import QueryService

_PERIOD_S = 1.0


class Tidier:
    """Lets go of what was not read for a while, about once a second, in a thread."""

    def __init__(self, query: QueryService, tidy: Callable[[bool], None]) -> None:
        """tidy: see `Node`."""
        self._query, self._tidy = query, tidy
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tidy", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(_PERIOD_S):
            self._tidy(not self._query.trim())
