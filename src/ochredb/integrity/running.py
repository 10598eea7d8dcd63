"""Checks that a server runs for others: begun, looked at, given up; repairs, if that was asked for.

One at a time: it reads the whole disk. It runs in a thread of its own, which gives up the
interpreter's lock where it reads and hashes, and is known in this process only: after a restart it
has to be begun again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from ochredb.backup.source import Backups
from ochredb.clock import Clock
from ochredb.errors import Exhausted, NotFound, Unimplemented
from ochredb.ids import IdSource
from ochredb.integrity.check import check_store
from ochredb.integrity.mend_parts import Rebuild, mended

log = logging.getLogger("ochredb.integrity")

_ABANDONED_AFTER_S = 60.0  # Nobody asked for so long: nobody is there any more.


class _GivenUp(Exception):
    """Nobody waits for this check any more."""


class Checks:
    """The checks of one server: at most one runs, and its report is kept until it is ended."""

    def __init__(
        self,
        open_backups: Callable[[], Backups],
        clock: Clock,
        ids: IdSource,
        rebuild: Rebuild | None = None,
    ) -> None:
        """rebuild: of the store's compactor; None if this process has none."""
        self._open_backups, self._clock, self._ids = open_backups, clock, ids
        self._rebuild = rebuild
        self._lock = threading.Lock()
        self._running: _Run | None = None

    def begin(self, *, repair: bool = False) -> str:
        """The id of a check that runs from now on. Raises Exhausted while another one runs.

        repair: build anew what it finds damaged, where that can be.
        """
        if repair and self._rebuild is None:
            raise Unimplemented("this process does not compact")
        backups = self._open_backups()
        with self._lock:
            if self._running is not None and not self._running.is_over:
                raise Exhausted("another check is running; retry later", retry_after_s=10.0)
            rebuild = self._rebuild if repair else None
            self._running = _Run(self._ids.uuid7(), backups, self._clock, rebuild)
            return self._running.id

    def state(self, check_id: str) -> dict[str, Any]:
        """How far it is, and its report once it is there. Raises NotFound."""
        return self._find(check_id).state()

    def end(self, check_id: str) -> None:
        """Forget a check, and give it up if it runs; one that has ended is no error."""
        with self._lock:
            if self._running is not None and self._running.id == check_id:
                self._running.give_up()
                self._running = None

    def _find(self, check_id: str) -> _Run:
        with self._lock:
            if self._running is None or self._running.id != check_id:
                raise NotFound(f"check [{check_id}] does not exist, or has ended")
            return self._running


class _Run:
    def __init__(
        self, check_id: str, backups: Backups, clock: Clock, rebuild: Rebuild | None
    ) -> None:
        self.id = check_id
        self._backups, self._clock, self._rebuild = backups, clock, rebuild
        self._asked_s = clock.monotonic_s()
        self._progress: tuple[str, int, int] = ("catalog", 0, 0)
        self._report: dict[str, Any] | None = None
        self._error: str | None = None
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="check", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def give_up(self) -> None:
        self._given_up.set()

    def state(self) -> dict[str, Any]:
        self._asked_s = self._clock.monotonic_s()
        what, done, total = self._progress
        return {
            "id": self.id, "what": what, "done_bytes": done, "total_bytes": total,
            "report": self._report, "error": self._error,
        }  # fmt: skip

    def _run(self) -> None:
        try:
            report = check_store(self._backups, self._clock, self._told)
            if self._rebuild is not None:
                report = mended(report, self._rebuild, self._told)
            self._report = report.to_document()
        except _GivenUp:
            log.info("check %s was given up", self.id)
        except Exception as error:
            log.exception("check %s failed", self.id)
            self._error = f"{type(error).__name__}: {error}"

    def _told(self, what: str, done_bytes: int, total_bytes: int) -> None:
        self._progress = what, done_bytes, total_bytes
        late = self._clock.monotonic_s() - self._asked_s > _ABANDONED_AFTER_S
        if late or self._given_up.is_set():
            raise _GivenUp
