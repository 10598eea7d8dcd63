"""`threading` and `queue` for code that runs as tasks of a scheduler.

with simulated_threads(scheduler, [module, ...]):  # Each module says `threading.Lock()` and so on.
    ...

What is made meanwhile by these modules waits for the scheduler instead of the system.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from ochredb.testing.simulation.scheduler import Scheduler, Task


class _Waiters:
    """Tasks that wait for one thing, woken all at once: each looks again for itself."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._tasks: list[Task] = []

    def wait(self, timeout_s: float | None = None) -> bool:
        task = self._scheduler.current
        assert task is not None, "outside of the simulation nothing may wait"
        self._tasks.append(task)
        try:
            return self._scheduler.park(timeout_s)
        finally:
            if task in self._tasks:
                self._tasks.remove(task)

    def wake_all(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            self._scheduler.wake(task)


class SimulatedLock:
    """threading.Lock; with `reentrant` RLock."""

    def __init__(self, scheduler: Scheduler, *, reentrant: bool = False) -> None:
        self._scheduler, self._reentrant = scheduler, reentrant
        self._waiters = _Waiters(scheduler)
        self._owner: object = None
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me: object = self._scheduler.current or "setup"
        if self._reentrant and self._owner is me:
            self._depth += 1
            return True
        while self._depth:
            if not blocking or not self._waiters.wait(None if timeout < 0 else timeout):
                return False
        self._owner, self._depth = me, 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._waiters.wake_all()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_error: object) -> None:
        self.release()


class SimulatedEvent:
    """threading.Event."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._waiters = _Waiters(scheduler)
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._waiters.wake_all()

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        while not self._is_set:
            if not self._waiters.wait(timeout):
                break
        return self._is_set


class SimulatedCondition:
    """threading.Condition on a lock of these."""

    def __init__(self, scheduler: Scheduler, lock: SimulatedLock) -> None:
        self._waiters = _Waiters(scheduler)
        self._lock = lock

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_error: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        self._lock.release()
        try:
            return self._waiters.wait(timeout)
        finally:
            self._lock.acquire()

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        while not predicate():
            if not self.wait(timeout):
                return predicate()
        return True

    def notify_all(self) -> None:
        self._waiters.wake_all()


class SimulatedThread:
    """threading.Thread, and with `delay_s` threading.Timer, of the process that starts it."""

    def __init__(
        self,
        scheduler: Scheduler,
        target: Callable[..., object],
        args: Sequence[Any] = (),
        delay_s: float = 0.0,
    ) -> None:
        self._scheduler, self._target, self._args = scheduler, target, args
        self._delay_s, self._is_cancelled = delay_s, False
        self._finished = SimulatedEvent(scheduler)
        self._task: Task | None = None
        self.daemon = True

    def start(self) -> None:
        starter = self._scheduler.current
        assert starter is not None, "threads are started by tasks"
        self._task = self._scheduler.spawn(starter.process, self._run)
        self._task.on_done.append(self._finished.set)

    def _run(self) -> None:
        if self._delay_s:
            self._scheduler.sleep(self._delay_s)
        if not self._is_cancelled:
            self._target(*self._args)

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._task is not None:  # Or it would sleep on, and whoever joins it with it.
            self._scheduler.wake(self._task)

    def join(self, timeout: float | None = None) -> None:
        if self._task is not None:
            self._finished.wait(timeout)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.is_done


class SimulatedQueue:
    """queue.SimpleQueue."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._waiters = _Waiters(scheduler)
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)
        self._waiters.wake_all()

    def get(self) -> Any:
        while not self._items:
            self._waiters.wait()
        return self._items.popleft()


class SimulatedThreading:
    """The names of `threading` and `queue` that the kernel uses."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._idents = itertools.count(1)
        self.local = threading.local  # Of what is not kept over a switch.

    def Lock(self) -> SimulatedLock:  # noqa: N802
        return SimulatedLock(self._scheduler)

    def RLock(self) -> SimulatedLock:  # noqa: N802
        return SimulatedLock(self._scheduler, reentrant=True)

    def Condition(self, lock: SimulatedLock | None = None) -> SimulatedCondition:  # noqa: N802
        return SimulatedCondition(self._scheduler, lock or self.RLock())

    def Event(self) -> SimulatedEvent:  # noqa: N802
        return SimulatedEvent(self._scheduler)

    def Thread(  # noqa: N802
        self,
        target: Callable[..., object],
        args: Sequence[Any] = (),
        name: str = "",  # noqa: ARG002
        daemon: bool = True,  # noqa: ARG002
    ) -> SimulatedThread:
        return SimulatedThread(self._scheduler, target, args)

    def Timer(  # noqa: N802
        self, interval: float, function: Callable[[], object]
    ) -> SimulatedThread:
        return SimulatedThread(self._scheduler, function, delay_s=interval)

    def SimpleQueue(self) -> SimulatedQueue:  # noqa: N802
        return SimulatedQueue(self._scheduler)

    def get_ident(self) -> int:
        task = self._scheduler.current
        return 0 if task is None else task.number

    def get_native_id(self) -> int:
        return threading.get_native_id()


@contextlib.contextmanager
def replaced(changes: Sequence[tuple[ModuleType, Mapping[str, object]]]) -> Iterator[None]:
    """Other values for names of modules, for a while."""
    before = [(module, {name: getattr(module, name) for name in new}) for module, new in changes]
    try:
        for module, new in changes:
            for name, value in new.items():
                setattr(module, name, value)
        yield
    finally:
        for module, old in before:
            for name, value in old.items():
                setattr(module, name, value)


@contextlib.contextmanager
def simulated_threads(scheduler: Scheduler, modules: Sequence[ModuleType]) -> Iterator[None]:
    """Let these modules' `threading` (and `queue`) be simulated ones."""
    fake = SimulatedThreading(scheduler)
    changes = [
        (module, {name: fake for name in ("threading", "queue") if hasattr(module, name)})
        for module in modules
    ]
    with replaced(changes):
        yield
