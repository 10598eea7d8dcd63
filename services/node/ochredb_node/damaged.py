"""Damaged indexes that were found by a process without a compactor: others build them anew.

A reader does without what is damaged of an index, slower. Where its process compacts, that is
mended in its background work; elsewhere a compactor of the cluster is asked to.
"""

from __future__ import annotations

import logging
import threading

from ochredb.cancel import Cancelled
from ochredb.clock import Clock
from ochredb.errors import Corrupt, OchreError
from ochredb.parts.open_parts import OpenParts
from ochredb.peers import Compactor

log = logging.getLogger("ochredb.node")

_AGAIN_S = 10.0  # After a compactor that could not be reached, or could not do it.


class DamagedParts:
    """`turn` is called about once a second, by one thread."""

    def __init__(self, parts: OpenParts, compactor: Compactor, clock: Clock) -> None:
        self._parts, self._compactor, self._clock = parts, compactor, clock
        self._waiting: dict[str, str] = {}  # Parts, and what is wrong with them.
        self._not_before_s = 0.0
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def turn(self) -> None:
        """Ask for what was found since the last time; never waits for it."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._waiting.update(self._parts.take_damaged())
        if self._waiting and self._clock.monotonic_s() >= self._not_before_s:
            self._thread = threading.Thread(target=self._ask, name="ask-rebuild", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Give up what was asked for."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()

    def _ask(self) -> None:
        for part_id, problem in list(self._waiting.items()):
            try:
                rebuilt = self._compactor.rebuild_part(part_id, self._step)
            except Cancelled:
                return
            except Corrupt as error:  # What is lost of its records, somebody has to say.
                log.error("part %s cannot be built anew: %s", part_id, error)
            except OchreError as error:
                log.warning("part %s (%s) is not built anew yet: %s", part_id, problem, error)
                self._not_before_s = self._clock.monotonic_s() + _AGAIN_S
                return
            else:
                if rebuilt:
                    log.warning("part %s was damaged and has been built anew", part_id)
            del self._waiting[part_id]

    def _step(self) -> None:
        if self._is_closed.is_set():
            raise Cancelled("the process ends")
