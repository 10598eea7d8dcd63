"""The housekeeping of a process that does not compact: a compactor's folding thread does it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ochredb.errors import NewerFormat, OchreError

log = logging.getLogger("ochredb.node")

_PERIOD_S = 1.0


class Tidier:
    """Calls `turn` about once a second, in a thread, until a newer OchreDB has the catalog."""

    def __init__(self, turn: Callable[[], None]) -> None:
        self._turn = turn
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tidy", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        failure: type[BaseException] | None = None
        while not self._done.wait(_PERIOD_S):
            try:
                self._turn()
            except NewerFormat as error:
                log.error("housekeeping ends: %s", error)
                return
            except (OchreError, MemoryError) as error:  # Damage, for one: who reads is told of it.
                if type(error) is not failure:  # Not again each second.
                    log.warning("housekeeping failed: %s", str(error) or type(error).__name__)
                failure = type(error)
            else:
                failure = None
