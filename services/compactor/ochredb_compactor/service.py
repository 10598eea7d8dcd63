"""The compactor's threads: one folds tails, others merge and collect (see `priority`).

Work is found by polling one small statement and done in the order of its `urgency`; hints only
shorten the wait. Each job runs under a lease; losing a race (Conflict) is normal and costs only the
work. Any number of processes share the work of one catalog.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from ochredb.catalog.pending import Due
from ochredb.errors import (
    Conflict,
    Exhausted,
    Gone,
    NewerFormat,
    NotFound,
    OchreError,
    Unavailable,
)
from ochredb.processes import is_gone
from ochredb.types import CompactorStatus
from ochredb_compactor.attempts import Attempts, Stopped, named
from ochredb_compactor.garbage import collect, garbage_due, sweep
from ochredb_compactor.leases import Leases
from ochredb_compactor.memory import malloc_trim
from ochredb_compactor.rebuild import Rebuilds
from ochredb_compactor.scheduler import compaction_due
from ochredb_compactor.urgency import is_taken, of_merge, of_tail, ordered
from ochredb_compactor.work import Work
from ochredb_compactor.world import World

if TYPE_CHECKING:
    from ochredb.integrity.evidence import Evidence
    from ochredb_compactor.repair import Repaired

log = logging.getLogger("ochredb.compactor")

_POLL_ACTIVE_S = 0.1
_POLL_SHARED_S = 0.5  # The same where other machines ask the catalog too.
_POLL_IDLE_S = 1.0
_IDLE_FOR_MERGE_S = 1.0
_BUSY_FOR_S = 1.0
_ROUND_S = 2.0  # Then other tails may have become more urgent.
_TAILS_PER_ROUND = 1_000
_SMALL_MERGE_ROWS = 50_000
# Of work that another process may do: starting one takes as long as folding so much.
_LARGE_ROWS, _LARGE_BYTES = 8_000, 16 << 20
_OVERDUE = 4.0  # Times what is due: of the limits of a backlog a sixth.
_STORE = ""  # Instead of a collection, in leases that are about all of them.
_NO_VERSION = -1  # Of a collection that was dropped.
_REWRITES_MAX = 1_000  # Of one collection by one call.
_TRIM_AFTER_S = (5.0, 30.0)  # The last job or write.


class CompactorService:
    """`ochredb.peers.Compactor` in this process, and its background threads."""

    def __init__(
        self,
        world: World,
        owner: str,
        *,
        on_idle: Callable[[], None] = lambda: None,
        on_quiet: Callable[[], None] = lambda: None,
        delegate: Callable[[bool], bool] = lambda _is_large: False,
    ) -> None:
        """owner: unique to this process. on_idle: called about once a second (housekeeping).

        on_quiet: called some seconds after the last job or write, to let go of what they left.
        delegate: whether another process does a job that is due; told whether it is a large one.
        """
        self._world, self._owner = world, owner
        self._on_idle, self._on_quiet = on_idle, on_quiet
        self._delegate = delegate
        self._ended_s = -math.inf  # The last job, that is.
        self._trims = len(_TRIM_AFTER_S)  # Since the last job or write.
        self._wakes: list[threading.Event] = []  # One for each thread.
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._is_paused = world.config.paused
        self._rng = random.Random(owner)
        self._lease = Leases(world, owner, self._ended)
        self._work = Work(world, self._lease)
        self._attempts = Attempts(world, self._step)
        self._rebuilds = Rebuilds(world, self._lease)
        self._after = ""  # The collection up to which tails were looked at last.
        self._trim = malloc_trim()

    def start(self) -> None:
        works: list[tuple[str, Callable[[], bool]]] = [
            ("compact", self._compact_due),
            ("merge", self._merge_due),
        ]
        works += [("merge", self._merge_small_due)] * (self._world.config.merge_threads - 1)
        self._wakes = [threading.Event() for _ in works]
        self._threads = [
            threading.Thread(target=self._run, args=(work, wake), name=name, daemon=True)
            for (name, work), wake in zip(works, self._wakes, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def hint(self, _collection_id: str, _last_offset: int) -> None:
        """Something was appended somewhere: fold sooner. A merge waits for folds alone."""
        quiet_s, self._appended_s = self.since_append_s(), self._world.clock.monotonic_s()
        # Who looks often already is not woken: who appended wants the interpreter, to answer.
        if quiet_s > self._world.config.idle_due_s or not self._world.logs.is_local:
            for wake in self._wakes[:1]:
                wake.set()

    def stop(self) -> None:
        """Stop the threads; in a local catalog fold what is left, for `close_budget_s` at most."""
        self._stop.set()
        self._wake()
        for thread in self._threads:
            thread.join()
        if self._threads and not self._is_paused and self._world.logs.is_local:
            self._fold_on_close()  # Of a shared one others do it.
        self._threads = []

    def drain(self, timeout_s: float) -> bool:
        """Begin no job any more; whether those that run ended by themselves in that time.

        Others are abandoned at their next step: what they did is thrown away and done again by
        somebody else. `stop` is to follow.
        """
        self.pause()
        ended = self._attempts.wait_until_idle(timeout_s)
        if not ended:
            log.info("a job has not ended in %.0f s and is abandoned", timeout_s)
        self._stop.set()
        self._wake()
        return ended

    def pause(self) -> None:
        """Begin no background work in this process; what calls ask for is done."""
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self._wake()

    def status(self) -> CompactorStatus:
        """What is to be done and by whom, of the whole catalog. Cost: as of `LogTable.pending`."""
        pending = self._world.logs.pending()
        return CompactorStatus(
            paused=self._is_paused,
            tails=[work for work in pending if work.tail_rows],
            merges=[work for work in pending if work.unsettled_rows],
            jobs=self._world.jobs.status(),
        )

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
        again = partial(self._work.merge, collection_id, step, idle=True)
        while self._work.until_done(collection_id, again):
            pass

    def fold_now(self, collection_id: str, step: Callable[[], None] | None = None) -> None:
        """Only fold the tail as it is now, or see another process do it: makes room in the log."""
        logs = self._world.logs
        last_offset = logs.snapshot(collection_id).last_offset

        def attempt() -> bool | None:
            if logs.snapshot(collection_id).indexed_offset >= last_offset:
                return True
            return self._work.compact(collection_id, step or _no_step)

        self._work.until_done(collection_id, attempt)

    def settle(self, step: Callable[[], None] | None = None) -> None:
        """Fold every tail and merge until nothing is due anywhere.

        What fails is told at the end, when all others are done (I9): the first failure is raised.
        """
        step = step or _no_step
        logs, failed, done = self._world.logs, dict[str, OchreError](), dict[str, int]()
        while True:
            names = [work.collection for work in logs.pending() if work.collection not in failed]
            # What another compactor calls due, and this one does not, is left to it.
            names = [
                name for name in names if name not in done or self._version(name) != done[name]
            ]
            if not names:
                break
            for name in names:
                step()
                try:
                    self.compact_now(name, step)
                    done[name] = self._version(name)
                except NotFound:  # Dropped meanwhile.
                    done[name] = _NO_VERSION
                except OchreError as error:
                    failed[name] = error
        if failed:
            raise next(iter(failed.values()))

    def _version(self, collection_id: str) -> int:
        try:
            return self._world.logs.snapshot(collection_id).version
        except NotFound:
            return _NO_VERSION

    def rebuild_now(self, collection_id: str, step: Callable[[], None] | None = None) -> None:
        """Write every part anew, with all that is derived. Raises NotFound."""
        version = self._world.logs.snapshot(collection_id).version
        for part in self._world.versions.parts(collection_id, version):
            rebuild = partial(
                self._rebuilds.rebuild, collection_id, step or _no_step, part_id=part.manifest.id
            )
            self._work.until_done(collection_id, rebuild)

    def rebuild_part(self, part_id: str, step: Callable[[], None] | None = None) -> bool:
        """Write one part anew, with all that is derived; False if it was replaced already.

        Raises Corrupt if records of it are damaged too.
        """
        collection_id = self._world.versions.collection_of(part_id)
        if collection_id is None:
            return False
        rebuild = partial(self._rebuilds.rebuild, collection_id, step or _no_step, part_id=part_id)
        return self._work.until_done(collection_id, rebuild)

    def rewrite_now(
        self, collection_id: str, dead_share_max: float, step: Callable[[], None]
    ) -> None:
        """Write the parts anew of which more than this share is dead.

        What was dead when this was called is in none of them afterwards. Raises NotFound, Exhausted
        if others replace parts faster than this writes them.
        """
        clean: set[str] = set()
        for _ in range(_REWRITES_MAX):
            attempt = partial(self._work.rewrite, collection_id, dead_share_max, clean, step)
            if not self._work.until_done(collection_id, attempt):
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

    def _ended(self, kind: str) -> None:
        """A job gave its lease back."""
        self._ended_s = self._world.clock.monotonic_s()
        if kind == "merge":
            self._trim()

    # -- the threads

    def _wake(self) -> None:
        for wake in self._wakes:
            wake.set()

    def _poll_s(self, active: bool) -> float:
        if self._world.logs.is_local:
            return _POLL_ACTIVE_S if active else _POLL_IDLE_S
        # Others ask too: not in step with them.
        return (_POLL_SHARED_S if active else _POLL_IDLE_S) * self._rng.uniform(0.75, 1.25)

    def _run(self, work: Callable[[], bool], wake: threading.Event) -> None:
        while not self._stop.is_set():
            try:
                active = work()
            except Stopped:
                return
            except NewerFormat as error:
                log.error("background work ends: %s", error)
                return
            except Exception as error:
                if self._stop.is_set():
                    return
                if isinstance(error, Unavailable | MemoryError):
                    log.warning("background work failed; it will be tried again: %s", named(error))
                else:
                    log.exception("background work failed; it will be tried again")
                active = False
            if wake.wait(self._poll_s(active)):
                wake.clear()
                self._stop.wait(_POLL_ACTIVE_S)

    def _step(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _compact_due(self) -> bool:
        """One round: the most urgent tails, a piece of each. Whether to look again soon."""
        world, config = self._world, self._world.config
        if self._is_paused:
            self._tidy()
            return False
        busy = self.since_append_s() < _BUSY_FOR_S
        begun_s, more = world.clock.monotonic_s(), False
        for due in self._tails_due(busy):
            self._step()
            if self._is_paused or world.clock.monotonic_s() - begun_s > _ROUND_S:
                break
            if self._is_delegated(due):
                continue
            if self._attempts.run("compact", due.collection, self._work.compact_some):
                more = True
            self._tidy()
        self._tidy()
        if more:  # Itself, and whoever merges what was folded.
            self._wake()
        return self.since_append_s() < config.idle_due_s + 1.0

    def _is_delegated(self, due: Due) -> bool:
        """Whether to leave a tail to another process; not if that gets nowhere."""
        config, work = self._world.config, due.work
        size = max(work.tail_rows / config.tail_rows_due, work.tail_bytes / config.tail_bytes_due)
        is_large = work.tail_rows >= _LARGE_ROWS or work.tail_bytes >= _LARGE_BYTES
        return size < _OVERDUE and self._delegate(is_large)

    def _tails_due(self, busy: bool) -> list[Due]:
        """The next some tails that are due, most urgent first."""
        world, config = self._world, self._world.config
        now_us = world.clock.now_us()
        quiet_s = config.busy_due_s if busy else config.idle_due_s
        rows_min = min(config.settle_rows_due, config.tail_rows_due)
        found = world.logs.tails(
            rows_min, config.tail_bytes_due, now_us - int(quiet_s * 1e6), self._after
        )
        page = list(islice(found, _TAILS_PER_ROUND))
        self._after = max(due.collection for due in page) if len(page) == _TAILS_PER_ROUND else ""
        due = [
            one for one in page
            if compaction_due(one.work, now_us, config, busy=busy)
            and not is_taken(one, now_us, config.lease_ttl_s, is_gone)
        ]  # fmt: skip
        return ordered(due, of_tail, now_us, config, self._rng)

    def rebuild_damaged(self) -> bool:
        """Build anew the parts that readers of this process found damaged; whether some still wait.

        What is damaged is derived: readers go on without it, slower.
        """
        for part_id, collection_id in self._rebuilds.due():
            self._step()
            rebuild = partial(self._rebuilds.rebuild, part_id=part_id)
            self._attempts.run("rebuild", collection_id, rebuild)
        return bool(self._rebuilds.waiting)

    def _merge_due(self) -> bool:
        """Merge what is due, most urgent first, and collect garbage."""
        if self._may_merge():
            active = self.rebuild_damaged()
            active |= self._merge_unsettled(rows_max=None)
        else:
            active = False
        self._housekeep()
        return active

    def _merge_small_due(self) -> bool:
        """What need not wait for a large merge, which takes minutes (I9)."""
        return self._may_merge() and self._merge_unsettled(rows_max=_SMALL_MERGE_ROWS)

    def _may_merge(self) -> bool:
        """A merge writes all of its inputs anew before they are deleted: not on a full disk."""
        return not (self._is_paused or self._world.reserve.is_needed)

    def _merge_unsettled(self, rows_max: int | None) -> bool:
        """rows_max: only where no more rows than that wait for a merge. Whether any did."""
        world, config = self._world, self._world.config
        now_us = world.clock.now_us()
        found = [
            due for due in world.logs.unsettled()
            if rows_max is None or due.work.unsettled_rows <= rows_max
        ]  # fmt: skip
        free = [due for due in found if not is_taken(due, now_us, config.lease_ttl_s, is_gone)]
        for due in ordered(free, of_merge, now_us, config, self._rng):
            self._step()
            if self._is_paused:
                break
            quiet_s = (world.clock.now_us() - due.work.time_us) / 1e6
            idle = due.work.tail_rows == 0 or quiet_s > _IDLE_FOR_MERGE_S
            if self._delegate(due.work.unsettled_rows >= _LARGE_ROWS):
                continue
            self._attempts.run("merge", due.collection, partial(self._work.merge, idle=idle))
        return bool(found)

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
                    log.warning("housekeeping failed: %s", named(error))
                self._idle_failure = type(error)
            else:
                self._idle_failure = None

    def _housekeep(self) -> None:
        now, config = self._world.clock.monotonic_s(), self._world.config
        # Not under writes, which would take the memory again at once.
        quiet_s = min(self.since_append_s(), now - self._ended_s)
        due = sum(quiet_s >= after_s for after_s in _TRIM_AFTER_S)
        if due > self._trims:
            self._on_quiet()  # By now readers have let go of what the jobs replaced.
            self._trim()
        self._trims = due
        if now - self._collected_s >= config.collect_period_s:
            self._collected_s = now
            self._collect_due()
        if now - self._swept_s >= config.sweep_period_s:
            first = self._swept_s == 0.0
            self._swept_s = now
            if not first:  # Not at once after a start: nothing is urgent about orphans.
                self._sweep_due()
                self._swept_s = self._world.clock.monotonic_s()  # It may have taken a period.

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
                raise Stopped

        try:
            for work in self._world.logs.pending():
                step()
                if 0 < work.tail_rows <= 20_000:
                    with contextlib.suppress(Conflict, Gone, NotFound):
                        self._work.compact(work.collection, step)
        except Stopped:
            log.info("closing with operations left in the log; they are durable")
        except OchreError as error:  # A full disk, for one.
            log.warning("closing with operations left in the log; they are durable: %s", error)


def _no_step() -> None:
    """Work that may not be interrupted."""
