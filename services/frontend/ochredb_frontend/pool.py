"""A bounded pool of threads that an event loop hands blocking work to."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from ochredb.errors import Exhausted, OutOfMemory

T = TypeVar("T")
W = TypeVar("W")
_TOGETHER_MAX = 16  # Of a batch: bounds how long the first of it waits for the last.
_Job = tuple[Callable[[], object], "asyncio.AbstractEventLoop", "asyncio.Future[object]"]


class WorkerPool:
    """`threads` threads and a queue of at most `queue_max` waiting jobs.

    Cost of one hop: about 0.05 ms. Threads start with the first job and are daemons: `close` waits
    for running jobs. All methods are called from the event loop's thread.
    """

    def __init__(self, name: str, *, threads: int, queue_max: int) -> None:
        self.name = name
        self._thread_count = threads
        self._pending_max = threads + queue_max
        self._pending = 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        # By group: what the next thread that is free takes along, and the future of each.
        self._lock = threading.Lock()
        self._waiting: dict[Hashable, list[tuple[Any, asyncio.Future[Any]]]] = {}

    @property
    def pending(self) -> int:
        """Jobs that wait or run."""
        return self._pending

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Run `work` in a thread. Raises Exhausted if too many jobs wait already."""
        loop, future = self._begin()
        self._jobs.put((work, loop, future))
        return future

    def submit_together(
        self, group: Hashable, work: W, run: Callable[[Sequence[W]], Sequence[T]]
    ) -> asyncio.Future[T]:
        """Run `work` together with others of its group that wait for a thread too.

        run: gives a result for each of up to 16; must not raise. Raises Exhausted.
        """
        loop, future = self._begin()
        with self._lock:
            waiting = self._waiting.get(group)
            if waiting is not None and len(waiting) < _TOGETHER_MAX:
                waiting.append((work, future))
                return future
            batch = self._waiting[group] = [(work, future)]

        def run_batch() -> object:
            with self._lock:
                if self._waiting.get(group) is batch:
                    del self._waiting[group]
            first, *others = run([item for item, _ in batch])
            for (_, other), result in zip(batch[1:], others, strict=True):
                loop.call_soon_threadsafe(self._finish, other, result, None)
            return first

        self._jobs.put((run_batch, loop, future))
        return future

    def _begin(self) -> tuple[asyncio.AbstractEventLoop, asyncio.Future[Any]]:
        """Raises Exhausted if too many jobs wait already, OutOfMemory without any thread."""
        if self._pending >= self._pending_max:
            raise Exhausted(f"too many {self.name} requests are waiting; retry later")
        if len(self._threads) < self._thread_count:
            try:
                self._start_thread()
            except RuntimeError as error:  # The system gives no more: those that run do it all.
                if not self._threads:
                    raise OutOfMemory(f"no thread for {self.name} requests: {error}") from error
        loop = asyncio.get_running_loop()
        self._pending += 1
        return loop, loop.create_future()

    def _start_thread(self) -> None:
        name = f"ochredb-{self.name}-{len(self._threads)}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, loop, future = job
            try:
                result, error = work(), None
            except BaseException as caught:
                result, error = None, caught
            del job, work
            try:
                loop.call_soon_threadsafe(self._finish, future, result, error)
            except RuntimeError:  # The loop is closed: the server has stopped waiting for answers.
                return

    def _finish(
        self, future: asyncio.Future[object], result: object, error: BaseException | None
    ) -> None:
        self._pending -= 1
        if future.done():  # Answered already: out of time, or the client is gone.
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def close(self, timeout_s: float = 10.0) -> None:
        """Let the threads end after the jobs that were submitted; wait for them that long."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
        self._threads.clear()
