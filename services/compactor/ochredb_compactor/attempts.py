"""Background jobs, one at a time in each thread: what failed is tried again, later each time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ochredb.errors import Conflict, Gone, NewerFormat, NotFound, StorageFull, Unavailable
from ochredb_compactor.world import World

log = logging.getLogger("ochredb.compactor")

_RETRY_S_MAX = 60.0
_RETRY_WHEN_FULL_S_MAX = 600.0  # Or as soon as there is space.

Job = Callable[[str, Callable[[], None]], bool | None]


class Stopped(Exception):
    """The service is closing: unfinished work is thrown away, it can be done again."""


class Attempts:
    """Thread-safe. step: given to each job."""

    def __init__(self, world: World, step: Callable[[], None]) -> None:
        self._world, self._step = world, step
        # How often a job failed, when to try again, and whether the disk was full.
        self._failures: dict[tuple[str, str], tuple[int, float, bool]] = {}
        self._changed = threading.Condition()
        self._running = 0

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether no job runs any more."""
        with self._changed:
            return self._changed.wait_for(lambda: self._running == 0, timeout_s)

    def run(self, kind: str, collection_id: str, job: Job) -> bool | None:
        """Run one job; after failures wait longer each time before the next try.

        Returns what the job returns; None if it failed or was not tried.
        """
        key, now = (kind, collection_id), self._world.clock.monotonic_s()
        failures, not_before, full = self._failures.get(key, (0, 0.0, False))
        if now < not_before and (self._world.reserve.is_needed or not full):
            return None
        with self._changed:
            self._running += 1
        try:
            done = job(collection_id, self._step)
        except Conflict:  # Lost a race: nothing to report.
            self._failures.pop(key, None)
        except Stopped:
            raise
        except Exception as error:
            self._failed(key, failures, now, error)
        else:
            self._failures.pop(key, None)
            return done
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()
        return None

    def _failed(self, key: tuple[str, str], failures: int, now_s: float, error: Exception) -> None:
        kind, collection_id = key
        if failures == 0 and isinstance(error, Gone | NotFound):
            # Once, it means that the collection or the version was dropped meanwhile.
            self._failures[key] = (1, now_s, False)
            return
        if isinstance(error, NewerFormat):  # Told without a trace: it is no bug.
            log.error("%s of collection %s is refused: %s", kind, collection_id, error)
        elif isinstance(error, Unavailable | MemoryError):  # No bug: the text says all.
            log.warning("%s of collection %s failed: %s", kind, collection_id, named(error))
        else:
            log.error("%s of collection %s failed", kind, collection_id, exc_info=error)
        # Each attempt takes a little of what is kept for deletes.
        full = isinstance(error, StorageFull)
        wait_s = min(_RETRY_WHEN_FULL_S_MAX if full else _RETRY_S_MAX, 2.0**failures)
        self._failures[key] = (failures + 1, now_s + wait_s, full)


def named(error: BaseException) -> str:
    """Its text; of one that has none its name."""
    return str(error) or type(error).__name__
