"""The compactor's threads: one folds tails, one merges and collects (see `priority`).

Work is found by polling one small statement; appends only shorten the wait. Each job runs under a
lease; losing a race (Conflict) is normal and costs only the work.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ochredb.catalog.jobs import Lease
from ochredb.errors import (
    Conflict,
    Corrupt,
    DeadlineExceeded,
    Exhausted,
    Gone,
    NewerFormat,
    NotFound,
    OchreError,
    StorageFull,
    Unavailable,
)
from ochredb.processes import is_gone
from ochredb_compactor.compaction import compact
from ochredb_compactor.garbage import collect, garbage_due, sweep
from ochredb_compactor.merge import merge
from ochredb_compactor.rebuild import Rebuilds
from ochredb_compactor.scheduler import compaction_due, merge_plan, rewrite_plan
from ochredb_compactor.world import World

if TYPE_CHECKING:
    from ochredb.integrity.evidence import Evidence
    from ochredb_compactor.repair import Repaired

log = logging.getLogger("ochredb.compactor")

_POLL_ACTIVE_S = 0.1
_POLL_IDLE_S = 1.0
_RETRY_S_MAX = 60.0
_RETRY_WHEN_FULL_S_MAX = 600.0  # Or as soon as there is space.
_IDLE_FOR_MERGE_S = 1.0
_BUSY_FOR_S = 1.0
_ATTEMPTS_MAX = 10
_STORE = ""  # Instead of a collection, in leases that are about all of them.
_REWRITES_MAX = 1_000  # Of one collection by one call.
_TRIM_AFTER_S = (5.0, 30.0)


class _Stopped(Exception):
    """The service is closing: unfinished work is thrown away, it can be done again."""


class CompactorService:
    """`ochredb.peers.Compactor` in this process, and its background threads."""

    def __init__(
        self,
        world: World,
        owner: str,
        *,
        on_idle: Callable[[], None] = lambda: None,
        on_quiet: Callable[[], None] = lambda: None,
    ) -> None:
        """owner: unique to this process. on_idle: called about once a second (housekeeping).

        on_quiet: called some seconds after the last job, to let go of what it left behind.
        """
        self._world, self._owner = world, owner
        self._on_idle, self._on_quiet = on_idle, on_quiet
        self._trims_due_s: list[float] = []
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        # How often a job failed, when to try again, and whether the disk was full.
        self._failures: dict[tuple[str, str], tuple[int, float, bool]] = {}
        self._rebuilds = Rebuilds(world, self._lease)
        self._trim = _malloc_trim()

    def start(self) -> None:
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
            for name, work in (("compact", self._compact_due), ("merge", self._merge_due))
        ]
        for thread in self._threads:
            thread.start()

    def hint(self, _collection_id: str, _last_offset: int) -> None:
        """Something was appended somewhere: look sooner."""
        self._appended_s = self._world.clock.monotonic_s()
        self._wake.set()

    def stop(self) -> None:
        """Stop the threads, then fold what is left if that takes at most `close_budget_s`."""
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join()
        if self._threads and not self._world.config.paused:
            self._fold_on_close()
        self._threads = []

    @property
    def graph_insertions(self) -> int:
        """Vectors inserted into graphs since the start, those of abandoned merges included."""
        return self._world.counters.graph_insertions

    def since_append_s(self) -> float:
        """Seconds since this process last took a write; infinite before the first."""
        return self._world.clock.monotonic_s() - self._appended_s

    # -- peers.Compactor

    def compact_now(self, collection_id: str, step: Callable[[], None] | None = None) -> None:
        """Fold the tail, then merge until nothing is due; in the caller's thread.

        step: called between pieces of work; it may raise to give up.
        Waits for another holder's lease (at most its ttl). Raises NotFound.
        """
        step = step or _no_step
        self.fold_now(collection_id, step)
        again = partial(self._merge, collection_id, step, idle=True)
        while self._until_done(collection_id, again):
            pass

    def fold_now(self, collection_id: str, step: Callable[[], None] | None = None) -> None:
        """Only fold the tail as it is now, or see another process do it: makes room in the log."""
        logs = self._world.logs
        last_offset = logs.snapshot(collection_id).last_offset

        def attempt() -> bool | None:
            if logs.snapshot(collection_id).indexed_offset >= last_offset:
                return True
            return self._compact(collection_id, step or _no_step)

        self._until_done(collection_id, attempt)

    def rewrite_now(
        self, collection_id: str, dead_share_max: float, step: Callable[[], None]
    ) -> None:
        """Write the parts anew of which more than this share is dead.

        What was dead when this was called is in none of them afterwards. Raises NotFound, Exhausted
        if others replace parts faster than this writes them.
        """
        clean: set[str] = set()
        for _ in range(_REWRITES_MAX):
            attempt = partial(self._rewrite, collection_id, dead_share_max, clean, step)
            if not self._until_done(collection_id, attempt):
                return
        raise Exhausted("its parts are replaced faster than they can be written anew")

    def collect_now(self, *, sweep_orphans: bool) -> int:
        """Delete what is garbage now; returns how many objects."""
        deleted = self._world.reserve.freeing(lambda: collect(self._world, _no_step))
        return deleted + (sweep(self._world, _no_step) if sweep_orphans else 0)

    def repair(
        self,
        collection_ids: Sequence[str],
        evidence: Evidence,
        *,
        accept_loss: bool,
        step: Callable[[str], None],
    ) -> list[Repaired]:
        """Mend what is damaged of these collections: see `repair.repair`."""
        from ochredb_compactor.repair import repair

        return repair(self._world, self._lease, collection_ids, evidence, accept_loss, step)

    def _until_done(self, collection_id: str, attempt: Callable[[], bool | None]) -> bool:
        """Repeat an attempt that lost a race (Conflict) or found the lease taken (None).

        Raises DeadlineExceeded if whoever has the lease gets nowhere for two of its terms. Where
        others compact again and again, each new version begins the wait anew.
        """
        clock, patience_s = self._world.clock, 2 * self._world.config.lease_ttl_s
        version = self._world.logs.snapshot(collection_id).version
        deadline = clock.monotonic_s() + patience_s
        gone = 0
        while clock.monotonic_s() < deadline:
            try:
                done = attempt()
                if done is not None:
                    return done
            except Conflict:
                pass
            except (Gone, NotFound) as error:
                # Of a dropped collection this raises NotFound. Else an object was collected or
                # swept under a slow attempt: a new one starts from a new snapshot.
                self._world.logs.snapshot(collection_id)
                gone += 1
                if gone == _ATTEMPTS_MAX:  # Each attempt takes a new snapshot: this is damage.
                    raise Corrupt(str(error)) from error
            clock.sleep(0.02)
            now_at = self._world.logs.snapshot(collection_id).version
            if now_at != version:
                deadline, version = clock.monotonic_s() + patience_s, now_at
        raise DeadlineExceeded("another process holds the collection's lease")

    # -- one job

    def _compact(self, collection_id: str, step: Callable[[], None]) -> bool | None:
        """Fold what is in the log now; whether anything was. None: somebody else has the lease."""
        logs = self._world.logs
        with self._lease(collection_id, "compact") as lease:
            if lease is None:
                return None
            before = logs.snapshot(collection_id)
            indexed = before.indexed_offset
            while indexed < before.last_offset and compact(self._world, lease, step) is not None:
                indexed = logs.snapshot(collection_id).indexed_offset
            return before.indexed_offset < before.last_offset

    def _merge(self, collection_id: str, step: Callable[[], None], *, idle: bool) -> bool | None:
        version = self._world.logs.snapshot(collection_id).version
        plan = merge_plan(self._world.versions.parts(collection_id, version), idle=idle)
        if plan is None:
            return False
        with self._lease(collection_id, "merge") as lease:
            if lease is None:
                return None
            merge(self._world, lease, plan, step, settles=idle)
        return True

    @contextlib.contextmanager
    def _lease(self, collection_id: str, kind: str) -> Iterator[Lease | None]:
        """The lease or None; renewed while held, given back at the end."""
        jobs, config = self._world.jobs, self._world.config
        owner = f"{self._owner}/{threading.get_ident()}"
        lease = jobs.acquire(collection_id, kind, owner, config.lease_ttl_s, is_gone)
        if lease is None:
            yield None
            return
        keeper: _Keeper | None = None
        try:
            keeper = _Keeper(self._world, lease)
            yield lease
        except BaseException as error:
            if keeper is not None:
                keeper.stop()
            with contextlib.suppress(OchreError):  # The first error is the one to report.
                jobs.end(lease, f"{type(error).__name__}: {error}"[:500])
            raise
        keeper.stop()
        jobs.end(lease)
        now = self._world.clock.monotonic_s()
        self._trims_due_s = [now + delay_s for delay_s in _TRIM_AFTER_S]
        if kind == "merge":
            self._trim()

    def _rewrite(
        self,
        collection_id: str,
        dead_share_max: float,
        clean: set[str],
        step: Callable[[], None],
    ) -> bool | None:
        version = self._world.logs.snapshot(collection_id).version
        parts = self._world.versions.parts(collection_id, version)
        plan = rewrite_plan(parts, dead_share_max, clean)
        if plan is None:
            return False
        with self._lease(collection_id, "merge") as lease:
            if lease is None:
                return None
            clean.add(merge(self._world, lease, plan, step, settles=True) or plan.inputs[0])
        return True

    # -- the threads

    def _run(self, work: Callable[[], bool]) -> None:
        while not self._stop.is_set():
            try:
                active = work()
            except _Stopped:
                return
            except NewerFormat as error:
                log.error("background work ends: %s", error)
                return
            except Exception as error:
                if self._stop.is_set():
                    return
                if isinstance(error, Unavailable | MemoryError):
                    log.warning("background work failed; it will be tried again: %s", _named(error))
                else:
                    log.exception("background work failed; it will be tried again")
                active = False
            self._wake.wait(_POLL_ACTIVE_S if active else _POLL_IDLE_S)
            if self._wake.is_set():
                self._wake.clear()
                self._stop.wait(_POLL_ACTIVE_S)

    def _step(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _compact_due(self) -> bool:
        world, config = self._world, self._world.config
        if config.paused:
            self._tidy()
            return False
        busy = self.since_append_s() < _BUSY_FOR_S
        quiet_s = config.busy_due_s if busy else config.idle_due_s
        quiet_since_us = world.clock.now_us() - int(quiet_s * 1e6)
        rows_min = min(config.settle_rows_due, config.tail_rows_due)
        for work in world.logs.tails(rows_min, config.tail_bytes_due, quiet_since_us):
            self._step()
            if compaction_due(work, world.clock.now_us(), config, busy=busy):
                self._attempt("compact", work.collection, self._compact)
            self._tidy()
        self._tidy()
        return self.since_append_s() < config.idle_due_s + 1.0

    def rebuild_damaged(self) -> bool:
        """Build anew the parts that readers of this process found damaged; whether some still wait.

        What is damaged is derived: readers go on without it, slower.
        """
        for part_id, collection_id in self._rebuilds.due():
            self._step()
            rebuild = partial(self._rebuilds.rebuild, part_id=part_id)
            self._attempt("rebuild", collection_id, rebuild)
        return bool(self._rebuilds.waiting)

    def _merge_due(self) -> bool:
        world = self._world
        if world.config.paused or world.reserve.is_needed:
            # A merge writes all of its inputs anew before they are deleted: not on a full disk.
            self._housekeep()
            return False
        active = self.rebuild_damaged()
        for work in world.logs.unsettled():
            self._step()
            active = True
            quiet_s = (world.clock.now_us() - work.time_us) / 1e6
            idle = work.tail_rows == 0 or quiet_s > _IDLE_FOR_MERGE_S
            self._attempt("merge", work.collection, partial(self._merge, idle=idle))
        self._housekeep()
        return active

    def _attempt(
        self,
        kind: str,
        collection_id: str,
        job: Callable[[str, Callable[[], None]], bool | None],
    ) -> None:
        """Run one job; after failures wait longer each time before the next try."""
        key, now = (kind, collection_id), self._world.clock.monotonic_s()
        failures, not_before, full = self._failures.get(key, (0, 0.0, False))
        if now < not_before and (self._world.reserve.is_needed or not full):
            return
        try:
            job(collection_id, self._step)
        except Conflict:  # Lost a race: nothing to report.
            self._failures.pop(key, None)
        except _Stopped:
            raise
        except Exception as error:
            if failures == 0 and isinstance(error, Gone | NotFound):
                # Once, it means that the collection or the version was dropped meanwhile.
                self._failures[key] = (1, now, False)
                return
            if isinstance(error, NewerFormat):  # Told without a trace: it is no bug.
                log.error("%s of collection %s is refused: %s", kind, collection_id, error)
            elif isinstance(error, Unavailable | MemoryError):  # No bug: the text says all.
                log.warning("%s of collection %s failed: %s", kind, collection_id, _named(error))
            else:
                log.exception("%s of collection %s failed", kind, collection_id)
            # Each attempt takes a little of what is kept for deletes.
            full = isinstance(error, StorageFull)
            wait_s = min(_RETRY_WHEN_FULL_S_MAX if full else _RETRY_S_MAX, 2.0**failures)
            self._failures[key] = (failures + 1, now + wait_s, full)
        else:
            self._failures.pop(key, None)

    _collected_s = _swept_s = _idle_s = 0.0
    _appended_s = -math.inf
    _idle_failure: type[BaseException] | None = None

    def _tidy(self) -> None:
        """From the folding thread: a merge may keep the other one for minutes."""
        now = self._world.clock.monotonic_s()
        if now - self._idle_s >= 1.0:
            self._idle_s = now
            try:
                self._on_idle()
            except (OchreError, MemoryError) as error:  # A full disk, for one.
                if type(error) is not self._idle_failure:  # Not again each second.
                    log.warning("housekeeping failed: %s", _named(error))
                self._idle_failure = type(error)
            else:
                self._idle_failure = None

    def _housekeep(self) -> None:
        now, config = self._world.clock.monotonic_s(), self._world.config
        if self._trims_due_s and now >= self._trims_due_s[0]:
            self._trims_due_s = self._trims_due_s[1:]
            self._on_quiet()  # By now readers have let go of what the jobs replaced.
            self._trim()
        if now - self._collected_s >= config.collect_period_s:
            self._collected_s = now
            self._collect_due()
        if now - self._swept_s >= config.sweep_period_s:
            first = self._swept_s == 0.0
            self._swept_s = now
            if not first:  # Not at once after a start: nothing is urgent about orphans.
                self._sweep_due()

    def _collect_due(self) -> None:
        """One process collects. That is no matter of safety: a lease never protects a delete."""

        def elected() -> None:
            with self._lease(_STORE, "collect") as lease:
                if lease is not None:
                    collect(self._world, self._step)

        if garbage_due(self._world):
            self._world.reserve.freeing(elected)

    def _sweep_due(self) -> None:
        """The lease of a sweep lasts for the period: one process sweeps, once in a period."""
        jobs, config = self._world.jobs, self._world.config
        lease = jobs.acquire(_STORE, "sweep", self._owner, config.sweep_period_s * 0.9, is_gone)
        if lease is not None:
            sweep(self._world, self._step)

    def _fold_on_close(self) -> None:
        """What is left in the log is durable; folding it only spares the next opener the work."""
        clock = self._world.clock
        deadline = clock.monotonic_s() + self._world.config.close_budget_s

        def step() -> None:
            if clock.monotonic_s() > deadline:
                raise _Stopped

        try:
            for work in self._world.logs.pending():
                step()
                if 0 < work.tail_rows <= 20_000:
                    with contextlib.suppress(Conflict, Gone, NotFound):
                        self._compact(work.collection, step)
        except _Stopped:
            log.info("closing with operations left in the log; they are durable")
        except OchreError as error:  # A full disk, for one.
            log.warning("closing with operations left in the log; they are durable: %s", error)


class _Keeper:
    """Renews a lease from a thread of its own while long work runs."""

    def __init__(self, world: World, lease: Lease) -> None:
        self._world, self._lease = world, lease
        self._done = threading.Event()
        self._timer = threading.Timer(world.config.lease_ttl_s / 3, self._renew)
        self._timer.daemon = True
        self._timer.start()

    def _renew(self) -> None:
        while not self._done.is_set():
            try:
                if not self._world.jobs.renew(self._lease, self._world.config.lease_ttl_s):
                    return  # Taken over: the commit will find out by its fence.
            except OchreError as error:
                log.warning("cannot renew the lease of %s: %s", self._lease.collection, error)
            self._done.wait(self._world.config.lease_ttl_s / 3)

    def stop(self) -> None:
        """No renewal comes after this: it would give life to a lease that has ended."""
        self._done.set()
        self._timer.cancel()
        self._timer.join()


def _named(error: BaseException) -> str:
    """Its text; of one that has none its name."""
    return str(error) or type(error).__name__


def _malloc_trim() -> Callable[[], None]:
    """glibc's malloc_trim: gives the memory of a finished job back to the system."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return lambda: None
    return lambda: trim(0) and None


def _no_step() -> None:
    """Work that may not be interrupted."""
