"""Stores that fail or dawdle on purpose, as a seed decides.

rng = random.Random(seed)
store = FaultyStore(MemoryStore(), rng, FaultRates(create=0.2, delete=0.1))
"""

from __future__ import annotations

import enum
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Literal

from ochredb.clock import Clock
from ochredb.errors import Unavailable
from ochredb.storage.base import LocalStore, ObjectStore, StoredObject

if TYPE_CHECKING:
    from ochredb.storage.base import Data, Piece

Verb = Literal["create", "get", "list", "delete"]


class Fault(enum.Enum):
    """What goes wrong with one call."""

    NONE = "none"
    BEFORE = "request lost"  # The call has no effect.
    AFTER = "reply lost"  # The call has its whole effect, and the caller is told that it failed.


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRates:
    """The probability, 0 to 1, that a call of each kind fails; get includes ranges and maps."""

    create: float = 0.0
    get: float = 0.0
    list: float = 0.0
    delete: float = 0.0

    def __post_init__(self) -> None:
        if not all(0.0 <= rate <= 1.0 for rate in astuple(self)):
            raise ValueError(f"fault rates are from 0 to 1: {self}")

    @classmethod
    def everywhere(cls, rate: float) -> FaultRates:
        return cls(create=rate, get=rate, list=rate, delete=rate)


class FaultyStore:
    """A store whose every call may fail before it acts, or after, with the reply lost.

    AFTER is the fault that matters: the object is durable and the caller is told that it failed.
    Each call draws once (a failing one twice) from `rng`, so a seed and an order of calls fix the
    faults. `faults` counts what was injected, by (verb, fault).
    """

    def __init__(self, inner: LocalStore, rng: random.Random, rates: FaultRates) -> None:
        self.rates = rates
        self.faults: Counter[tuple[Verb, Fault]] = Counter()
        self._inner = inner
        self._rng = rng

    def create(self, key: str, data: Data) -> None:
        fault = self._begin("create", key)
        self._inner.create(key, data)
        self._end("create", key, fault)

    def get(self, key: str) -> bytes:
        fault = self._begin("get", key)
        content = self._inner.get(key)
        self._end("get", key, fault)
        return content

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        fault = self._begin("get", key)
        content = self._inner.get_range(key, start, stop)
        self._end("get", key, fault)
        return content

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        fault = self._begin("list", prefix)
        yield from self._inner.list(prefix, after=after)
        self._end("list", prefix, fault)

    def delete(self, key: str) -> None:
        fault = self._begin("delete", key)
        self._inner.delete(key)
        self._end("delete", key, fault)

    def map(self, key: str) -> memoryview:
        fault = self._begin("get", key)
        view = self._inner.map(key)
        self._end("get", key, fault)
        return view

    def scratch(self, pieces: Iterable[Piece]) -> memoryview:
        fault = self._begin("create", "scratch")
        view = self._inner.scratch(pieces)
        self._end("create", "scratch", fault)
        return view

    def forget_pages(self, view: memoryview) -> None:
        self._inner.forget_pages(view)

    def refetch(self, key: str, view: memoryview) -> bool:
        return self._inner.refetch(key, view)

    def path(self, key: str) -> str | None:
        return self._inner.path(key)

    def _begin(self, verb: Verb, key: str) -> Fault:
        """Draw the fault of one call, and raise it if it is BEFORE."""
        rate: float = getattr(self.rates, verb)
        if self._rng.random() >= rate:
            return Fault.NONE
        fault = self._rng.choice((Fault.BEFORE, Fault.AFTER))
        self.faults[verb, fault] += 1
        if fault is Fault.BEFORE:
            raise Unavailable(f"{verb} {key}: {fault.value}")
        return fault

    @staticmethod
    def _end(verb: Verb, key: str, fault: Fault) -> None:
        if fault is Fault.AFTER:
            raise Unavailable(f"{verb} {key}: {fault.value}")


class SlowStore:
    """A store whose every call first waits, by its clock, between 0 and `delay_s_max` seconds."""

    def __init__(
        self, inner: ObjectStore, rng: random.Random, clock: Clock, *, delay_s_max: float
    ) -> None:
        self._inner, self._rng, self._clock = inner, rng, clock
        self._delay_s_max = delay_s_max

    def create(self, key: str, data: Data) -> None:
        self._wait()
        self._inner.create(key, data)

    def get(self, key: str) -> bytes:
        self._wait()
        return self._inner.get(key)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        self._wait()
        return self._inner.get_range(key, start, stop)

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        self._wait()
        yield from self._inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        self._wait()
        self._inner.delete(key)

    def _wait(self) -> None:
        self._clock.sleep(self._rng.uniform(0.0, self._delay_s_max))
