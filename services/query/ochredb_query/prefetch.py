"""What reads will need, done before they need it, by a thread of its own.

New versions of collections that are read here, for one: a hint says that there is a version; it may
come late, twice or never. Then the first read opens the parts, and only takes longer (I11).
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable

from ochredb.errors import NotFound, OchreError

log = logging.getLogger("ochredb.query")

_WAITING_MAX = 10_000


class Prefetcher:
    """One thread, started with the first that is added. Thread-safe.

    Names wait in the order in which they were added, each once, with the largest number.
    """

    def __init__(
        self, work: Callable[[str, int], None], what: str = "version {number} of collection {name}"
    ) -> None:
        """work: given a name and a number; may take long. what: they are, for the log."""
        self._work, self._what = work, what
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, int] = OrderedDict()
        self._thread: threading.Thread | None = None
        self._is_busy = self._is_closed = False

    def add(self, name: str, number: int) -> bool:
        """Returns at once: whether it will be done."""
        with self._changed:
            if self._is_closed:
                return False
            self._waiting[name] = max(number, self._waiting.get(name, 0))
            if len(self._waiting) > _WAITING_MAX:
                self._waiting.popitem(last=False)
            if self._thread is None or not self._thread.is_alive():  # Of before a fork.
                self._thread = threading.Thread(
                    target=self._run, name="ochredb-prefetch", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
            return True

    def settle(self, timeout_s: float) -> bool:
        """Wait until nothing is left to do; whether that was in time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._waiting and not self._is_busy, timeout_s
            )

    def close(self) -> None:
        """Forget what waits; what is being done is."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                name, number = self._waiting.popitem(last=False)
                self._is_busy = True
            try:
                self._work(name, number)
            except NotFound:
                pass  # Replaced again, or dropped.
            except OchreError as error:  # The first read does it, or says what is wrong.
                what = self._what.format(name=name, number=number)
                log.warning("%s is not prefetched: %s", what, error)
            except Exception:
                log.exception("prefetching %s failed", name)
