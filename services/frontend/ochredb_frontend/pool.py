"""A bounded pool of threads that an event loop hands blocking work to, fair between tenants.

future = pool.submit(work, tenant="t")  # Raises Exhausted.

The next thread that is free is that of the waiting tenant that has fewest threads already; of those
alike, of the one that has waited longest since it came or last had one. Whoever keeps threads
longer so gets fewer of them at a time, and what a job will take need not be known. When too many
jobs wait, the tenant with most of them gives up its last: a flood of one tenant drowns that tenant
alone (I9).
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ochredb.errors import Exhausted, OutOfMemory

T = TypeVar("T")
W = TypeVar("W")
_TOGETHER_MAX = 16  # Of a batch: bounds how long the first of it waits for the last.


@dataclass(slots=True, eq=False)
class _Job:
    """What one thread takes at a time: one piece of work, or several of one group.

    members: each with the future of its result. group: None for what runs alone.
    """

    loop: asyncio.AbstractEventLoop
    run: Callable[[Sequence[Any]], Sequence[Any]]
    group: Hashable
    members: list[tuple[Any, asyncio.Future[Any]]]


@dataclass(slots=True, eq=False)
class _Line:
    """Of one tenant that waits or runs. waiting: members of `jobs`. running: threads.

    since: orders the tenants by when they began to wait for their next thread.
    """

    tenant: str | None
    jobs: deque[_Job] = field(default_factory=deque)
    waiting: int = 0
    running: int = 0
    since: int = 0


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
        self._threads: list[threading.Thread] = []
        # A turn for each job that waits, whichever thread takes which; and `_spare` turns of jobs
        # that were pushed out, for the next ones to use. False: the end of a thread.
        self._turns: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._spare = 0
        self._lock = threading.Lock()  # Guards `_spare` and what follows.
        self._numbers = itertools.count()
        self._lines: dict[str | None, _Line] = {}
        # By group: the job that waits, for more of its kind to join.
        self._open: dict[Hashable, _Job] = {}

    @property
    def pending(self) -> int:
        """Jobs that wait or run."""
        return self._pending

    def submit(self, work: Callable[[], T], *, tenant: str | None = None) -> asyncio.Future[T]:
        """Run `work` in a thread. Raises Exhausted if too many jobs wait already, as may the
        future if more come.

        tenant: whose turn it takes; what belongs to no tenant is together one of them.
        """
        return self._enter(tenant, None, work, _alone)

    def submit_together(
        self,
        group: Hashable,
        work: W,
        run: Callable[[Sequence[W]], Sequence[T]],
        *,
        tenant: str | None = None,
    ) -> asyncio.Future[T]:
        """Run `work` together with others of its group and tenant that wait for a thread too.

        run: gives a result for each of up to 16; must not raise. Raises Exhausted like `submit`.
        """
        return self._enter(tenant, (tenant, group), work, run)

    def close(self, timeout_s: float = 10.0) -> None:
        """Let the threads end after the jobs that were submitted; wait for them that long."""
        for _ in self._threads:
            self._turns.put(False)
        for thread in self._threads:
            thread.join(timeout_s)
        self._threads.clear()

    # -- coming

    def _enter(
        self,
        tenant: str | None,
        group: Hashable,
        work: Any,
        run: Callable[[Sequence[Any]], Sequence[Any]],
    ) -> asyncio.Future[Any]:
        """Raises Exhausted if too many jobs wait already, OutOfMemory without any thread."""
        self._make_sure_of_threads()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        with self._lock:
            line = self._lines.get(tenant) or _Line(tenant)
            if self._pending >= self._pending_max:
                self._push_out(line)
            self._pending += 1
            self._lines[tenant] = line
            line.waiting += 1
            job = None if group is None else self._open.get(group)
            if job is not None and len(job.members) < _TOGETHER_MAX:
                job.members.append((work, future))
                return future
            if not line.jobs:
                line.since = next(self._numbers)
            job = _Job(loop, run, group, [(work, future)])
            line.jobs.append(job)
            if group is not None:
                self._open[group] = job
            if self._spare:
                self._spare -= 1
            else:
                self._turns.put(True)
        return future

    def _make_sure_of_threads(self) -> None:
        if len(self._threads) >= self._thread_count or self._pending >= self._pending_max:
            return
        name = f"ochredb-{self.name}-{len(self._threads)}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # The system gives no more: those that run do it all.
            if not self._threads:
                raise OutOfMemory(f"no thread for {self.name} requests: {error}") from error
        else:
            self._threads.append(thread)

    def _push_out(self, newcomer: _Line) -> None:
        """Make room for one of `newcomer`: who has most waiting, it included, gives up its last."""
        refusal = Exhausted(f"too many {self.name} requests are waiting; retry later")
        # Of those with as many, one that runs something has had more already.
        most, longest = (newcomer.waiting + 1, newcomer.running), newcomer
        for line in self._lines.values():
            if line is not newcomer and (line.waiting, line.running) > most:
                most, longest = (line.waiting, line.running), line
        if longest is newcomer:
            raise refusal
        job = longest.jobs[-1]
        _, future = job.members.pop()
        if not job.members:
            longest.jobs.pop()
            self._spare += 1
            self._no_longer_open(job)
        longest.waiting -= 1
        self._forget_if_idle(longest)
        self._pending -= 1
        if not future.done():
            future.set_exception(refusal)

    def _no_longer_open(self, job: _Job) -> None:
        if job.group is not None and self._open.get(job.group) is job:
            del self._open[job.group]

    def _forget_if_idle(self, line: _Line) -> None:
        if not line.jobs and not line.running:
            del self._lines[line.tenant]

    # -- in the threads

    def _run(self) -> None:
        while (turn := self._take()) is not None:
            line, job = turn
            results: Sequence[Any] = ()
            error: BaseException | None = None
            try:
                results = job.run([work for work, _ in job.members])
            except BaseException as caught:
                error = caught
            futures = [future for _, future in job.members]
            try:
                job.loop.call_soon_threadsafe(self._finish, futures, results, error)
            except RuntimeError:  # The loop is closed: the server has stopped waiting for answers.
                return
            with self._lock:
                line.running -= 1
                line.since = next(self._numbers)
                self._forget_if_idle(line)
            del turn, line, job, futures, results, error  # While it waits.

    def _take(self) -> tuple[_Line, _Job] | None:
        """Whoever's turn it is, once there is somebody; None at the end."""
        while self._turns.get():
            with self._lock:
                waiting = [line for line in self._lines.values() if line.jobs]
                if not waiting:
                    self._spare -= 1
                    continue
                line = min(waiting, key=lambda line: (line.running, line.since))
                job = line.jobs.popleft()
                line.waiting -= len(job.members)
                line.running += 1
                self._no_longer_open(job)
                return line, job
        return None

    # -- at the end

    def _finish(
        self,
        futures: Sequence[asyncio.Future[Any]],
        results: Sequence[Any],
        error: BaseException | None,
    ) -> None:
        self._pending -= len(futures)
        for number, future in enumerate(futures):
            if future.done():  # Answered already: out of time, or the client is gone.
                continue
            if error is None:
                future.set_result(results[number])
            else:
                future.set_exception(error)


def _alone(works: Sequence[Callable[[], Any]]) -> list[Any]:
    return [work() for work in works]
