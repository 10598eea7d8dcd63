"""Calls made later, by one thread that sleeps in between; and a few threads that do things beside.

No request has a thread of its own: the timer's is woken at most about once in the shortest delay
that is in use, and the helpers' only when there is something to do.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
from collections.abc import Callable

from ochredb.clock import Clock

log = logging.getLogger("ochredb.cluster")

_HELPERS_MAX = 8
_VOID_AT_ONCE = 2


class Timer:
    """Thread-safe; its thread begins with the first call that is asked for."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._heap: list[tuple[float, int, Callable[[], None], Callable[[], bool]]] = []
        self._numbers = itertools.count()
        self._wakes_s = float("inf")  # When the thread looks next.
        self._thread: threading.Thread | None = None
        self._closed = False

    def call_later(
        self, delay_s: float, call: Callable[[], None], is_void: Callable[[], bool] = lambda: False
    ) -> None:
        """Have `call`, which must be quick, called in the timer's thread, but not after `close`.

        is_void: whether nobody wants that any more, as of most calls. It is asked now and then, so
            that the thread need not wake for each, and they take no memory until they are due.
        """
        due_s = self._clock.monotonic_s() + delay_s
        with self._lock:
            for _ in range(_VOID_AT_ONCE):  # Or those of long delays would pile up.
                if self._heap and self._heap[0][3]():
                    heapq.heappop(self._heap)
            heapq.heappush(self._heap, (due_s, next(self._numbers), call, is_void))
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="ochredb-timer", daemon=True)
                self._thread.start()
            elif due_s < self._wakes_s:
                self._changed.notify_all()

    def close(self) -> None:
        """Forget what was to be called."""
        with self._lock:
            self._closed = True
            self._heap.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except Exception:  # The other calls are made all the same.
                log.exception("a delayed call failed")

    def _next(self) -> Callable[[], None] | None:
        """What is due next, when it is due; None once closed."""
        with self._lock:
            while not self._closed:
                while self._heap and self._heap[0][3]():
                    heapq.heappop(self._heap)
                now_s = self._clock.monotonic_s()
                if self._heap and self._heap[0][0] <= now_s:
                    self._wakes_s = now_s
                    return heapq.heappop(self._heap)[2]
                self._wakes_s = self._heap[0][0] if self._heap else float("inf")
                self._changed.wait(self._wakes_s - now_s if self._heap else None)
            return None


class Helpers:
    """A few threads, started when they are needed. Nothing waits for one: `run` says no instead."""

    def __init__(self, threads_max: int = _HELPERS_MAX) -> None:
        self._threads_max = threads_max
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    def run(self, work: Callable[[], object]) -> bool:
        """Whether a thread does it; False if all are busy."""
        with self._lock:
            if self._closed:
                return False
            if self._idle:
                self._idle -= 1
            elif len(self._threads) < self._threads_max:
                thread = threading.Thread(target=self._run, name="ochredb-helper", daemon=True)
                thread.start()
                self._threads.append(thread)
            else:
                return False
            self._work.put(work)
            return True

    def close(self) -> None:
        """What runs is left to end by itself."""
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception:
                log.exception("work beside a request failed")
            finally:
                with self._lock:
                    self._idle += 1
