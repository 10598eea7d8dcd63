"""An object store under the scheduler: what each simulated process sees of the one they share.

Every call takes time, may fail before it acts or after, and a listing may be old: it may lack what
was created, and still have what was deleted, a little while ago.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ochredb.clock import Clock
from ochredb.errors import Unavailable
from ochredb.storage.base import StoredObject
from ochredb.storage.memory import MemoryStore
from ochredb.testing.simulation.scheduler import Scheduler

if TYPE_CHECKING:
    from ochredb.storage.base import Data, Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFaults:
    """Probabilities that a call fails before or after it acted; listings may be `stale_s` old."""

    before: float = 0.0
    after: float = 0.0
    stale_s: float = 0.0


class SharedObjects:
    """The objects themselves, and those that were deleted not long ago.

    on_delete: told of every key before it is deleted.
    """

    def __init__(
        self, scheduler: Scheduler, clock: Clock, on_delete: Callable[[str], None]
    ) -> None:
        self.scheduler, self.on_delete = scheduler, on_delete
        self.inner = MemoryStore(clock)
        self.created_s: dict[str, float] = {}
        self.deleted: dict[str, tuple[float, StoredObject]] = {}

    def keys(self) -> set[str]:
        return {item.key for item in self.inner.list("")}


class SimulatedStore:
    """`ochredb.storage.base.LocalStore` of one process."""

    def __init__(self, shared: SharedObjects, faults: StoreFaults, rng: random.Random) -> None:
        self.faults = faults
        self._shared, self._inner, self._rng = shared, shared.inner, rng

    def create(self, key: str, data: Data) -> None:
        self._begin("create")
        self._inner.create(key, data)
        self._shared.created_s[key] = self._shared.scheduler.now_s
        self._end("created")

    def get(self, key: str) -> bytes:
        self._begin("get")
        return self._inner.get(key)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        self._begin("get")
        return self._inner.get_range(key, start, stop)

    def map(self, key: str) -> memoryview:
        self._begin("get")
        return self._inner.map(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        self._begin("list")
        shared, now_s = self._shared, self._shared.scheduler.now_s
        seen_s = now_s - self._rng.uniform(0.0, self.faults.stale_s)
        listed = {
            item.key: item
            for item in self._inner.list(prefix, after=after)
            if shared.created_s.get(item.key, 0.0) <= seen_s
        }
        for key, (deleted_s, item) in shared.deleted.items():
            if deleted_s > seen_s >= shared.created_s[key] and key.startswith(prefix):
                if key > after:
                    listed[key] = item
        for _, item in sorted(listed.items()):
            yield item

    def delete(self, key: str) -> None:
        self._begin("delete")
        for item in self._inner.list(key):
            if item.key == key:
                self._shared.on_delete(key)
                self._shared.deleted[key] = (self._shared.scheduler.now_s, item)
        self._inner.delete(key)
        self._end("deleted")

    def scratch(self, pieces: Iterable[Piece]) -> memoryview:
        return self._inner.scratch(pieces)

    def forget_pages(self, view: memoryview) -> None:
        self._inner.forget_pages(view)

    def refetch(self, key: str, view: memoryview) -> bool:
        return self._inner.refetch(key, view)

    def path(self, key: str) -> str | None:
        return self._inner.path(key)

    def _begin(self, label: str) -> None:
        self._shared.scheduler.pause(label)
        if self._rng.random() < self.faults.before:
            raise Unavailable(f"the store did not take the request ({label})")

    def _end(self, label: str) -> None:
        self._shared.scheduler.pause(label)
        if self._rng.random() < self.faults.after:
            raise Unavailable(f"the store's reply was lost ({label})")
