"""Tasks of simulated processes, switched one at a time; which comes next is the seed's decision.

scheduler = Scheduler(seed)
server = scheduler.process("server 1")
scheduler.spawn(server, serve)
scheduler.run()

A task is a greenlet: ordinary blocking code that gives way in `pause`, `sleep` and `park` only.
Simulated time passes there and nowhere else; it costs no real time. A killed process is never heard
of again: its tasks unwind with `Killed`, and whatever they still try to do raises that too.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

import xxhash
from greenlet import getcurrent, greenlet


class Killed(BaseException):
    """The process of this task is gone. No `except Exception` sees it."""


class Stuck(Exception):
    """No task can go on, or simulated time ran out: a deadlock, or a loop that never ends."""


class Process:
    """What is killed as a whole. skew_s: how far its wall clock is from the true time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_alive = True
        self.skew_s = 0.0
        self.tasks: list[Task] = []
        self.on_kill: list[Callable[[], None]] = []


class Task:
    """One thread of a process. `result` and `error` are set when it is done."""

    def __init__(self, number: int, process: Process, work: Callable[[], Any]) -> None:
        self.number, self.process = number, process
        self.is_done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.on_done: list[Callable[[], None]] = []
        self._work = work
        self.turn = 0  # Grows each time it is scheduled: an older entry of the heap is void.
        self.was_woken = False
        self._greenlet: greenlet | None = None

    def go_on(self) -> None:
        """Switch to it, from the loop."""
        if self._greenlet is None:  # Made here: it comes back to where it was made.
            self._greenlet = greenlet(self._run)
            self._greenlet.switch()
        elif self.process.is_alive:
            self._greenlet.switch()
        else:
            self._greenlet.throw(Killed(self.process.name))

    def _run(self) -> None:
        try:
            if self.process.is_alive:
                self.result = self._work()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        self.is_done = True
        self.process.tasks.remove(self)
        for call in self.on_done:
            call()


class Scheduler:
    """Not thread-safe: everything happens in the thread that calls `run`.

    `digest` sums up every switch so far: equal seeds give equal digests.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        # How long a step takes: most are short, some a little longer, few much longer. Per seed.
        self._step_s = 10 ** self.rng.uniform(-4, -2)
        self._slow_share = self.rng.choice((0.0, 0.01, 0.05))
        self._stall_share = self.rng.choice((0.0, 0.0, 0.001, 0.004))
        self.stall_s_max = 10.0
        self._heap: list[tuple[float, int, int, Task]] = []
        self._entries = self._tasks = 0
        self._hash = xxhash.xxh3_64()
        self.steps = 0
        self.current: Task | None = None

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def process(self, name: str) -> Process:
        return Process(name)

    def spawn(self, process: Process, work: Callable[[], Any]) -> Task:
        """A new task; it begins when it is its turn."""
        self._tasks += 1
        task = Task(self._tasks, process, work)
        process.tasks.append(task)
        self._schedule(task, self.now_s)
        return task

    def kill(self, process: Process) -> None:
        """SIGKILL: connections and locks of the process are gone now, its tasks unwind."""
        if not process.is_alive:
            return
        process.is_alive = False
        for call in process.on_kill:
            call()
        for task in process.tasks:
            if task is not self.current:
                self._schedule(task, self.now_s)

    # -- what a task calls

    def pause(self, label: str) -> None:
        """A step that takes some time: others may come first."""
        rng, step_s = self.rng, self._step_s
        seconds = rng.expovariate(1.0) * step_s
        chance = rng.random()
        if chance < self._stall_share:
            seconds += rng.uniform(0.0, self.stall_s_max)
        elif chance < self._slow_share:
            seconds += rng.expovariate(1.0) * 50 * step_s
        self._hash.update(label.encode())
        self.sleep(seconds)

    def sleep(self, seconds: float) -> None:
        task = self._of_now()
        self._schedule(task, self.now_s + max(0.0, seconds))
        self._give_way(task)

    def park(self, timeout_s: float | None = None) -> bool:
        """Wait for `wake`; whether it came before the timeout."""
        task = self._of_now()
        task.was_woken = False
        task.turn += 1
        if timeout_s is not None:
            self._schedule(task, self.now_s + timeout_s)
        self._give_way(task)
        return task.was_woken

    def wake(self, task: Task) -> None:
        """Let a parked task go on. Harmless for one that is not."""
        if not task.is_done and not task.was_woken:
            task.was_woken = True
            self._schedule(task, self.now_s)

    def check_alive(self) -> None:
        """Raises Killed in a task of a dead process."""
        if self.current is not None and not self.current.process.is_alive:
            raise Killed(self.current.process.name)

    # -- the loop

    def run(self, is_done: Callable[[], bool], *, limit_s: float = 100_000.0) -> None:
        """Switch between tasks until `is_done`. Raises Stuck."""
        while not is_done():
            task = self._next()
            if self.now_s > limit_s:
                raise Stuck(f"not done after {limit_s} simulated seconds")
            self.steps += 1
            self._hash.update(task.number.to_bytes(4, "little"))
            self.current = task
            try:
                task.go_on()
            finally:
                self.current = None

    def _next(self) -> Task:
        while self._heap:
            time_s, _, turn, task = heapq.heappop(self._heap)
            if turn == task.turn and not task.is_done:
                self.now_s = max(self.now_s, time_s)
                return task
        raise Stuck("every task waits for another")

    def _schedule(self, task: Task, time_s: float) -> None:
        task.turn += 1
        self._entries += 1
        heapq.heappush(self._heap, (time_s, self._entries, task.turn, task))

    def _of_now(self) -> Task:
        assert self.current is not None, "only tasks can wait"
        self.check_alive()
        return self.current

    def _give_way(self, task: Task) -> None:
        parent = getcurrent().parent
        assert parent is not None
        parent.switch()
        assert self.current is task
        self.check_alive()


class SimulatedClock:
    """`ochredb.clock.Clock` of one process."""

    ORIGIN_US = 1_800_000_000_000_000

    def __init__(self, scheduler: Scheduler, process: Process) -> None:
        self._scheduler, self._process = scheduler, process

    def now_us(self) -> int:
        seconds = self._scheduler.now_s + self._process.skew_s
        return self.ORIGIN_US + int(seconds * 1e6)

    def monotonic_s(self) -> float:
        return self._scheduler.now_s

    def sleep(self, seconds: float) -> None:
        self._scheduler.sleep(seconds)
