"""Quick reads that arrived in one turn of the event loop, run as one batch.

Most of what a short search costs beside the search itself are calls that cost the same for eight
queries as for one. And the search itself does without the interpreter's lock: it runs in a thread
beside, so that with many clients two processors are at work, one parsing and encoding, one
searching. Where searches are so long that they are most of the work, there is a thread for each
processor.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import sys
import threading
from collections.abc import Callable, Hashable
from functools import partial

from ochredb.cancel import Cancel
from ochredb.peers import ON_LOOP_US_MAX, Batch
from ochredb.vectors.threads import PROCESSORS
from ochredb_frontend.service import Frontend, QuickAnswer, QuickAnswers

_READS_MAX = 16  # Of a batch: bounds how long the loop is held, and how long a read waits.
_LONG_WAITING_MAX = 64  # Beyond, the pool decides whether there is room for more.
_CROWDED_TURNS = 8
# From here on parsing and encoding, about 0.25 ms, leave a processor idle beside one that searches.
_LONG_SEARCH_US = 400.0

Answer = Callable[[bytes | Exception], None]
Item = tuple[QuickAnswer, Cancel, Answer]
_Job = tuple[Batch, asyncio.AbstractEventLoop, Callable[[], None]]


class Together:
    """Used by the event loop's thread only.

    Whether a read has company is known only after it: so reads run at once until a turn of the loop
    had several, and from then on wait for the end of their turn, and for the batch before theirs,
    until turns have one again.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._waiting: dict[Hashable, list[Item]] = {}  # By group, oldest first.
        self._waiting_count = 0
        self._reads_of_turn = 0
        self._crowded_turns = 0
        self._searchers = [_Searcher() for _ in range(PROCESSORS)]

    def run(self, read: QuickAnswer, cancel: Cancel, answer: Answer) -> bool:
        """Have `answer` called, now or later; False if too many wait."""
        group = read.quick.group
        if group is None:
            _run(read, cancel, answer)
            return True
        is_long = read.quick.search_us > ON_LOOP_US_MAX
        if is_long and self._waiting_count >= _LONG_WAITING_MAX:
            return False
        if not self._reads_of_turn:
            asyncio.get_running_loop().call_soon(self._turn_is_over)
        self._reads_of_turn += 1
        if not self._crowded_turns and not is_long:
            _run(read, cancel, answer)
            return True
        self._waiting.setdefault(group, []).append((read, cancel, answer))
        self._waiting_count += 1
        return True

    def close(self) -> None:
        """Let the threads end."""
        for searcher in self._searchers:
            searcher.close()

    def _turn_is_over(self) -> None:
        crowded = self._reads_of_turn > 1
        self._crowded_turns = _CROWDED_TURNS if crowded else max(0, self._crowded_turns - 1)
        self._reads_of_turn = 0
        self._begin()

    def _begin(self, waiting_max: int = _READS_MAX) -> None:
        """Hand what waits to threads beside; if they are busy and too much waits, do it here.

        But not what would hold the loop for long.
        """
        while self._waiting:
            (read, _, _), *_ = next(iter(self._waiting.values()))
            idle = self._idle_searchers(read.quick.search_us)
            if not idle and (
                self._waiting_count < waiting_max or read.quick.search_us > ON_LOOP_US_MAX
            ):
                return
            items = self._next_items(max(1, len(idle)))
            try:
                answers = self._frontend.together([read for read, _, _ in items])
            except Exception:
                _run_alone(items)
                continue
            done = partial(self._searched, items, answers)
            if not idle or not idle[0].search(answers.batch, done):
                answers.batch.search()
                _answer(items, answers)

    def _idle_searchers(self, search_us: float) -> list[_Searcher]:
        """Those that searches of this length may have."""
        searchers = self._searchers if search_us >= _LONG_SEARCH_US else self._searchers[:1]
        return [searcher for searcher in searchers if not searcher.busy]

    def _next_items(self, shares: int) -> list[Item]:
        """Of the group that waits longest, one of so many shares; at most a batch."""
        group, items = next(iter(self._waiting.items()))
        del self._waiting[group]
        count = min(_READS_MAX, math.ceil(len(items) / shares))
        if items[count:]:
            self._waiting[group] = items[count:]
        self._waiting_count -= count
        return items[:count]

    def _searched(self, items: list[Item], answers: QuickAnswers) -> None:
        self._begin(sys.maxsize)  # First, so that both processors have something to do.
        _answer(items, answers)
        self._begin()


class _Searcher:
    """A thread that searches one batch at a time. Used by the event loop's thread only."""

    def __init__(self) -> None:
        self.busy = False
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def search(self, batch: Batch, done: Callable[[], None]) -> bool:
        """Have `done` called on the event loop once the batch has been searched.

        Returns False if it cannot take it: it is busy, or the system has no thread to give.
        """
        if self.busy:
            return False
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="ochredb-search", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        self.busy = True
        self._jobs.put((batch, asyncio.get_running_loop(), done))
        return True

    def _finish(self, done: Callable[[], None]) -> None:
        self.busy = False
        done()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch, loop, done = job
            try:
                batch.search()
            finally:  # What it failed with is raised when its answers are asked for.
                with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits.
                    loop.call_soon_threadsafe(self._finish, done)
            del job, batch, done  # Nothing is kept while there is nothing to do.

    def close(self) -> None:
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join()


def _answer(items: list[Item], answers: QuickAnswers) -> None:
    try:
        bodies = answers.encoded(Cancel())
    except Exception:
        _run_alone(items)
        return
    for (_, _, answer), body in zip(items, bodies, strict=True):
        answer(body)


def _run_alone(items: list[Item]) -> None:
    """A batch failed: each is tried alone, so that one fails alone (I9)."""
    for item in items:
        _run(*item)


def _run(read: QuickAnswer, cancel: Cancel, answer: Answer) -> None:
    try:
        body = read.run(cancel)
    except Exception as error:
        answer(error)
    else:
        answer(body)
