"""How many reads a query node works on at once, whose turn it is, and who is sent away.

admission = Admission(AdmissionConfig(), clock, rng)
with admission.turn(tenant, kind, units, cancel):  # Waits for its turn. Raises Exhausted.
    ...

A bounded number runs; a bounded number waits, each in its own thread. Turns are fair between
tenants, in time and not in requests: each tenant has an account of the seconds that its reads took,
and the next turn is that of the waiting tenant that has had least. One that was away has no claim
to what it did not use meanwhile. When the queue is full, who has most waiting loses its newest, so
a flood of one tenant drowns that tenant alone (I9).

What a read will take is estimated from what others of its kind took; the account is put right when
it ends. Reads that are expected to take long may have half of the places only.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from ochredb.cancel import Cancel
from ochredb.clock import Clock
from ochredb.errors import DeadlineExceeded, Exhausted

_KINDS_MAX = 10_000
_TENANTS_MAX = 10_000
_SMOOTHING = 0.2
_FIRST_GUESS_S = 0.005
_RETRY_AFTER_S_MIN, _RETRY_AFTER_S_MAX = 0.1, 30.0
_THREADS_SPARE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """running_max: reads at once; more of them than processors, as some wait for objects.

    queue_max: reads that wait, each in a thread.
    long_s: reads that are expected to take longer may be half of those that run.
    """

    running_max: int = field(default_factory=lambda: max(8, 4 * (os.cpu_count() or 1)))
    queue_max: int = 128
    long_s: float = 0.1

    def __post_init__(self) -> None:
        if self.running_max < 2:
            raise ValueError(f"running_max must be at least 2, not {self.running_max}")
        if self.queue_max < 0:
            raise ValueError(f"queue_max must be at least 0, not {self.queue_max}")
        if not self.long_s > 0:
            raise ValueError(f"long_s must be above 0, not {self.long_s}")

    @property
    def threads(self) -> int:
        """So many a server needs, for there to be always one that says no."""
        return self.running_max + self.queue_max + _THREADS_SPARE


@dataclass(slots=True, eq=False)
class _Read:
    """One that waits or runs. estimate_s: what its tenant's account was charged beforehand."""

    number: int
    tenant: _Tenant
    kind: Hashable
    units: float
    estimate_s: float
    is_long: bool
    began_s: float = 0.0
    woken: threading.Event | None = None  # Of one that waits.
    is_admitted: bool = False
    refusal: Exhausted | None = None


@dataclass(slots=True, eq=False)
class _Tenant:
    """used_s: the seconds it has had, on a scale that all share (see `Admission._now_s`).

    Long reads wait in a line of their own, so that they do not keep short ones from free places.
    """

    used_s: float = 0.0
    running: int = 0
    short: deque[_Read] = field(default_factory=deque)
    long: deque[_Read] = field(default_factory=deque)

    def line_of(self, read: _Read) -> deque[_Read]:
        return self.long if read.is_long else self.short

    @property
    def waits(self) -> bool:
        return bool(self.short or self.long)

    @property
    def waiting_s(self) -> float:
        return sum(read.estimate_s for line in (self.short, self.long) for read in line)

    def heads(self) -> list[_Read]:
        """The first of each line."""
        return [line[0] for line in (self.short, self.long) if line]

    def newest(self) -> _Read:
        return max(
            (line[-1] for line in (self.short, self.long) if line), key=lambda read: read.number
        )


class Admission:
    """Thread-safe. Where there is room a turn costs 4 microseconds."""

    def __init__(self, config: AdmissionConfig, clock: Clock, rng: random.Random) -> None:
        self._config, self._clock, self._rng = config, clock, rng
        self._lock = threading.Lock()
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()  # By last use.
        self._waiting: dict[str, _Tenant] = {}
        self._queued = self._running = self._running_long = 0
        self._numbers = itertools.count()
        # The account of whoever had the last turn when it had it: where a newcomer begins.
        self._now_s = 0.0
        self._usual_s: OrderedDict[Hashable, float] = OrderedDict()  # For one unit, by kind.
        self._any_s = _FIRST_GUESS_S

    @property
    def running(self) -> int:
        return self._running

    @property
    def queued(self) -> int:
        return self._queued

    @contextlib.contextmanager
    def turn(self, tenant: str, kind: Hashable, units: float, cancel: Cancel) -> Iterator[None]:
        """Wait for a place. Raises Exhausted (too many wait), or what `cancel` raises.

        kind: reads of one kind take equally long for each of their units.
        """
        read = self._enter(tenant, kind, units)
        if not read.is_admitted:
            self._wait(tenant, read, cancel)
        try:
            yield
        finally:
            self._leave(read)

    # -- coming

    def _enter(self, name: str, kind: Hashable, units: float) -> _Read:
        """Begin it, or put it into the queue. Raises Exhausted."""
        with self._lock:
            estimate_s = self._usual_s.get(kind, self._any_s) * units
            tenant = self._tenant(name)
            is_long = estimate_s > self._config.long_s
            read = _Read(next(self._numbers), tenant, kind, units, estimate_s, is_long)
            if not self._waiting and self._has_place(read):
                self._begin(read)
                return read
            if self._queued >= self._config.queue_max:
                self._push_out(name, tenant, read)
            read.woken = threading.Event()
            self._waiting[name] = tenant
            tenant.line_of(read).append(read)
            self._queued += 1
            self._begin_next()  # It may be short where the others that wait are long.
            return read

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(self._now_s)
            if len(self._tenants) > _TENANTS_MAX:
                self._forget_one()
        else:
            self._tenants.move_to_end(name)
        return tenant

    def _forget_one(self) -> None:
        """The one that was away longest."""
        for name, tenant in self._tenants.items():
            if not tenant.running and not tenant.waits:
                del self._tenants[name]
                return

    def _push_out(self, name: str, tenant: _Tenant, read: _Read) -> None:
        """Make room for a read: who has most waiting, this one included, gives up its newest."""
        longest, most_s = name, tenant.waiting_s + read.estimate_s
        for other, one in self._waiting.items():
            waiting_s = one.waiting_s
            if waiting_s > most_s or (waiting_s == most_s and other != name):
                longest, most_s = other, waiting_s
        refusal = self._refusal()
        if longest == name:
            raise refusal
        newest = self._waiting[longest].newest()
        self._remove(longest, newest)
        newest.refusal = refusal
        assert newest.woken is not None
        newest.woken.set()

    def _refusal(self) -> Exhausted:
        """When to come back: about when what waits now will have been read."""
        waiting_s = sum(tenant.waiting_s for tenant in self._waiting.values())
        after_s = waiting_s / self._config.running_max * self._rng.uniform(1.0, 1.5)
        return Exhausted(
            f"{self._queued} reads wait on this query node already",
            retry_after_s=min(_RETRY_AFTER_S_MAX, max(_RETRY_AFTER_S_MIN, after_s)),
        )

    def _wait(self, name: str, read: _Read, cancel: Cancel) -> None:
        woken = read.woken
        assert woken is not None
        take_back = cancel.when_cancelled(woken.set)
        try:
            woken.wait(cancel.remaining_s())
        finally:
            take_back()
            with self._lock:
                has_turn = read.is_admitted
                if not has_turn and read.refusal is None:
                    self._remove(name, read)
        if has_turn:
            return
        if read.refusal is not None:
            raise read.refusal
        cancel.check()
        raise DeadlineExceeded("the read's turn did not come in time")

    def _remove(self, name: str, read: _Read) -> None:
        read.tenant.line_of(read).remove(read)
        self._queued -= 1
        if not read.tenant.waits:
            del self._waiting[name]

    # -- turns

    def _has_place(self, read: _Read) -> bool:
        if self._running >= self._config.running_max:
            return False
        return not read.is_long or self._running_long < self._config.running_max // 2

    def _begin(self, read: _Read) -> None:
        tenant = read.tenant
        self._now_s = max(self._now_s, tenant.used_s)
        # What it did not use while it was away is not saved up.
        tenant.used_s = self._now_s + read.estimate_s
        tenant.running += 1
        self._running += 1
        self._running_long += read.is_long
        read.is_admitted, read.began_s = True, self._clock.monotonic_s()

    def _begin_next(self) -> None:
        """Give the free places to those that have had least."""
        while self._waiting and self._running < self._config.running_max:
            able = [
                (tenant.used_s, read.number, name, read)
                for name, tenant in self._waiting.items()
                for read in tenant.heads()
                if self._has_place(read)
            ]
            if not able:
                return
            _, _, name, read = min(able)
            self._remove(name, read)
            self._begin(read)
            assert read.woken is not None
            read.woken.set()

    def _leave(self, read: _Read) -> None:
        with self._lock:
            took_s = self._clock.monotonic_s() - read.began_s
            read.tenant.used_s += took_s - read.estimate_s
            read.tenant.running -= 1
            self._running -= 1
            self._running_long -= read.is_long
            self._learn(read, took_s)
            self._begin_next()

    def _learn(self, read: _Read, took_s: float) -> None:
        one_s = took_s / read.units
        usual_s = self._usual_s.get(read.kind)
        if usual_s is None:
            if len(self._usual_s) >= _KINDS_MAX:
                self._usual_s.popitem(last=False)
            self._usual_s[read.kind] = one_s
        else:
            self._usual_s[read.kind] = usual_s + _SMOOTHING * (one_s - usual_s)
        self._any_s += _SMOOTHING * (one_s - self._any_s)
