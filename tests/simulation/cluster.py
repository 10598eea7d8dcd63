"""Simulated processes with OchreDB's roles in them: servers, compactors, collectors."""

from __future__ import annotations

import contextlib
import math
import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TypeVar

import ochredb.cluster.budget
import ochredb.cluster.nodes
import ochredb.cluster.timer
import ochredb.parts.open_parts
import ochredb.parts.reader
import ochredb.parts.verified
import ochredb.priority
import ochredb.recent
import ochredb.tail
import ochredb_compactor.attempts
import ochredb_compactor.garbage
import ochredb_compactor.leases
import ochredb_compactor.memory
import ochredb_compactor.scheduler
import ochredb_compactor.service
import ochredb_frontend.service
import ochredb_log.group_commit
import ochredb_log.line
import ochredb_query.loaded
import ochredb_query.selected
import ochredb_query.service
from ochredb.cancel import Cancel
from ochredb.catalog.appends import BacklogLimits
from ochredb.catalog.jobs import Jobs, Lease
from ochredb.catalog.logs import LogTable
from ochredb.catalog.migrate import open_memory
from ochredb.catalog.namespace import Namespace
from ochredb.catalog.objects import ObjectTable
from ochredb.catalog.versions import NewVersion, VersionPart, VersionTable
from ochredb.errors import OchreError, Unavailable
from ochredb.ids import IdSource
from ochredb.parts.open_parts import OpenParts
from ochredb.peers import Log
from ochredb.testing.simulation.catalog import (
    CatalogFaults,
    Dialect,
    SimulatedCatalog,
    SimulatedDatabase,
)
from ochredb.testing.simulation.scheduler import (
    Process,
    Scheduler,
    SimulatedClock,
    Task,
)
from ochredb.testing.simulation.store import SharedObjects, SimulatedStore, StoreFaults
from ochredb.testing.simulation.threads import SimulatedEvent, replaced, simulated_threads
from ochredb_compactor.config import CompactorConfig
from ochredb_compactor.service import CompactorService
from ochredb_compactor.world import World
from ochredb_frontend.service import Frontend
from ochredb_log.config import LogConfig
from ochredb_log.service import LogService
from ochredb_query.config import QueryConfig
from ochredb_query.service import QueryService

from .oracle import Oracle
from .routed import routed_log

_T = TypeVar("_T")
GRACE_S = 4.0
LEAP_S_MAX = 7_200.0
_THREADED: tuple[ModuleType, ...] = (
    ochredb.cluster.budget,
    ochredb.cluster.nodes,
    ochredb.cluster.timer,
    ochredb.parts.open_parts,
    ochredb.parts.reader,
    ochredb.parts.verified,
    ochredb.priority,
    ochredb.recent,
    ochredb.tail,
    ochredb_compactor.attempts,
    ochredb_compactor.leases,
    ochredb_compactor.memory,
    ochredb_compactor.service,
    ochredb_frontend.service,
    ochredb_log.group_commit,
    ochredb_log.line,
    ochredb_query.loaded,
    ochredb_query.selected,
    ochredb_query.service,
)


class Lost(Exception):
    """The connection to a process was lost: what was asked may have been done, or be done yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """How bad things are in one simulation, as its seed decides."""

    dialect: Dialect
    catalog: CatalogFaults
    store: StoreFaults
    kills: bool
    skew_s: float
    leaps: bool  # Of the wall clock, by hours. Deletion may then come early, and nothing else.
    calls_lost: float
    inline_bytes_max: int
    tail_rows_max: int
    routed: bool = False  # Each server writes through the logs of all.

    @classmethod
    def drawn(cls, rng: random.Random) -> Weather:
        rate = rng.choice((0.0, 0.005, 0.03))
        return cls(
            dialect=rng.choice(("postgresql", "sqlite")),
            catalog=CatalogFaults(
                statement=rate / 10, commit_lost=rate / 2, reply_lost=rng.choice((0.0, rate))
            ),
            store=StoreFaults(
                before=rate, after=rng.choice((0.0, rate)), stale_s=rng.choice((0.0, 0.0, 3.0))
            ),
            kills=rng.random() < 0.6,
            skew_s=rng.choice((0.0, 0.0, 0.5, 1.0)),
            leaps=rng.random() < 0.2,
            calls_lost=rng.choice((0.0, 0.0, 0.02)),
            inline_bytes_max=rng.choice((0, 0, 2_000, 1 << 18)),
            tail_rows_max=rng.choice((30, 1_000)),
        )


class _WatchedVersions(VersionTable):
    """Lets the oracle know under which lease a commit is made."""

    def __init__(
        self, cluster: Cluster, database: SimulatedDatabase, clock: SimulatedClock
    ) -> None:
        super().__init__(database, clock)
        self._cluster = cluster

    def commit(
        self, lease: Lease, build: Callable[[int, int, list[VersionPart]], NewVersion]
    ) -> int:
        task = self._cluster.scheduler.current
        assert task is not None
        self._cluster.leases[task] = lease
        try:
            return super().commit(lease, build)
        finally:
            del self._cluster.leases[task]


class Node:
    """One process: a server (`log`, `query`, `frontend`), or one that compacts or collects."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        scheduler, weather = cluster.scheduler, cluster.weather
        self.process: Process = scheduler.process(name)
        skew_s = cluster.rng.uniform(-weather.skew_s, weather.skew_s)
        # SQLite's processes are on one host.
        self.process.skew_s = skew_s if weather.dialect == "postgresql" else cluster.host_skew_s
        self.clock = SimulatedClock(scheduler, self.process)
        self.ids = IdSource(self.clock, random.Random(cluster.rng.getrandbits(64)))
        database: SimulatedDatabase = cluster.catalog.database(self.process)
        self.database = database
        store_rng = random.Random(cluster.rng.getrandbits(64))
        self.store = SimulatedStore(cluster.objects, cluster.store_faults, store_rng)
        limits = BacklogLimits(tail_rows_max=weather.tail_rows_max)
        self.logs = LogTable(database, self.clock, limits)
        self.versions = _WatchedVersions(cluster, database, self.clock)
        self.namespace = Namespace(database, self.clock, self.ids)
        self.parts = OpenParts(self.store)
        self.query = QueryService(
            self.logs,
            self.versions,
            self.namespace,
            self.store,
            self.parts,
            self.clock,
            QueryConfig(),
        )
        self.log = LogService(
            database,
            self.logs,
            self.store,
            self.ids,
            LogConfig(
                inline_bytes_max=weather.inline_bytes_max,
                flushes_max=cluster.rng.choice((1, 2, 4)),  # Where the catalog is not local.
            ),
            on_append=self.query.follow,
        )
        self.written_to: Log = self.log
        if weather.routed:
            rng = random.Random(f"{name} of {cluster.seed}")
            self.written_to = routed_log(cluster, self, rng)
        self.frontend = Frontend(self.namespace, self.written_to, self.query, clock=self.clock)
        world = World(
            store=self.store,
            logs=self.logs,
            versions=self.versions,
            namespace=self.namespace,
            objects=ObjectTable(database),
            jobs=Jobs(database, self.clock),
            clock=self.clock,
            ids=self.ids,
            parts=self.parts,
            config=CompactorConfig(
                grace_s=GRACE_S,
                lease_ttl_s=3.0,
                replaced_retention_s=1.0,
                fold_rows_max=cluster.rng.choice((4, 1_000)),
                graph_threads=1,
            ),
            before_commit=self.query.prepare,
        )
        self.compactor = CompactorService(world, f"simulated/{name}/{self.ids.uuid7()}")

    def housekeep(self) -> None:
        """What a server does about once a second."""
        while True:
            self.clock.sleep(1.0)
            with contextlib.suppress(OchreError):
                self.query.trim()
                self.logs.recent.age()

    def compact(self, rng: random.Random) -> None:
        """Fold and merge, now this collection and now that."""
        while True:
            self.clock.sleep(rng.expovariate(5.0))
            with contextlib.suppress(OchreError):
                work = self.logs.pending()
                if not work:
                    continue
                collection = rng.choice(work).collection
                if rng.random() < 0.5:
                    self.compactor.fold_now(collection)
                else:
                    self.compactor.compact_now(collection)

    def collect(self, rng: random.Random) -> None:
        while True:
            self.clock.sleep(rng.expovariate(1.0))
            with contextlib.suppress(OchreError):
                self.compactor.collect_now(sweep_orphans=rng.random() < 0.5)


class Cluster:
    """All processes, and what they share. Faults can be switched off with `heal`."""

    def __init__(self, seed: int, weather: Weather, oracle: Oracle) -> None:
        self.seed = seed
        self.scheduler = Scheduler(seed)
        self.rng = random.Random(f"cluster {seed}")
        self.weather, self.oracle = weather, oracle
        self.store_faults = weather.store
        world = self.scheduler.process("the world")
        self.world = world
        clock = SimulatedClock(self.scheduler, world)
        # Its tables, made by the code that makes every catalog in memory.
        database, _ = open_memory(clock, IdSource(clock, random.Random(seed)))
        writer = database._writer
        assert writer is not None
        self._database = database  # Its connection must outlive this method.
        connection: sqlite3.Connection = writer.connection
        self.catalog = SimulatedCatalog(
            self.scheduler,
            connection,
            weather.dialect,
            weather.catalog,
            random.Random(f"catalog {seed}"),
            oracle.committed,
        )
        # Stamps and cutoffs come from clocks that differ by so much.
        grace_s = -math.inf if weather.leaps else GRACE_S - 2 * weather.skew_s
        self.objects = SharedObjects(
            self.scheduler, clock, lambda key: oracle.deleting(key, clock.now_us(), grace_s)
        )
        self.leases: dict[Task, Lease] = {}
        oracle.objects = self.objects.inner
        oracle.referenced, oracle.unreferenced_us = self._is_referenced, self._unreferenced_us
        oracle.lease_of_now = self._lease_of_now
        self.host_skew_s = 0.0
        self.servers: list[Node] = []
        self.workers: list[Node] = []
        self._started = 0

    def _is_referenced(self, key: str) -> bool:
        found = self.catalog.committed("SELECT 1 FROM object_references WHERE key = ?", key)
        return bool(found)

    def _unreferenced_us(self, key: str) -> int | None:
        """Since when the catalog says that nobody refers to it; None for an orphan."""
        found = self.catalog.committed(
            "SELECT unreferenced_us FROM objects WHERE key = ? AND state = 'deleting'", key
        )
        return None if not found else int(found[0][0])

    def _lease_of_now(self) -> Lease | None:
        task = self.scheduler.current
        return None if task is None else self.leases.get(task)

    def node(self, name: str) -> Node:
        """A process without tasks."""
        return Node(self, name)

    def start_server(self) -> Node:
        self._started += 1
        node = self.node(f"server {self._started}")
        self.scheduler.spawn(node.process, node.housekeep)
        self.servers.append(node)
        return node

    def start_worker(self) -> Node:
        """A process that compacts in two threads, and collects in another."""
        self._started += 1
        node = self.node(f"worker {self._started}")
        for work in (node.compact, node.compact, node.collect):
            rng = random.Random(self.rng.getrandbits(64))
            self.scheduler.spawn(node.process, partial(work, rng))
        self.workers.append(node)
        return node

    def heal(self) -> None:
        self.catalog.faults = CatalogFaults()
        self.store_faults = StoreFaults()
        self.scheduler.stall_s_max = 0.0

    def kill(self, node: Node) -> None:
        self.scheduler.kill(node.process)
        for group in (self.servers, self.workers):
            if node in group:
                group.remove(node)

    def misfortune(self, rng: random.Random) -> None:
        """Kill a process now and then, and start another."""
        while True:
            self.scheduler.sleep(rng.expovariate(0.3))
            group, start = rng.choice(
                ((self.servers, self.start_server), (self.workers, self.start_worker))
            )
            self.kill(rng.choice(group))
            if not group:
                start()
            elif rng.random() < 0.8:
                self.scheduler.sleep(rng.expovariate(1.0))
                start()

    def leap(self, rng: random.Random) -> None:
        """Somebody sets a clock now and then: of the one host, or of one of several."""
        while True:
            self.scheduler.sleep(rng.expovariate(0.2))
            nodes = [*self.servers, *self.workers]
            self.host_skew_s = rng.uniform(-LEAP_S_MAX, LEAP_S_MAX)
            for node in nodes if self.weather.dialect == "sqlite" else rng.sample(nodes, 1):
                node.process.skew_s = self.host_skew_s

    @property
    def servers_by_name(self) -> dict[str, Node]:
        return {node.process.name: node for node in self.servers}

    def call(self, node: Node, work: Callable[[], _T], cancel: Cancel | None = None) -> _T:
        """Run `work` in a process. Raises Lost, Unavailable (not there), or what it raises.

        cancel: who does not wait any longer has lost it.
        """
        scheduler, rng = self.scheduler, self.rng
        scheduler.pause("call")
        if not node.process.is_alive:
            raise Unavailable("connection refused", unreachable=True)
        if rng.random() < self.weather.calls_lost:
            raise Lost
        answered = SimulatedEvent(scheduler)
        task = scheduler.spawn(node.process, work)
        task.on_done.append(answered.set)
        node.process.on_kill.append(answered.set)
        remaining_s = None if cancel is None else cancel.remaining_s()
        take_back = None if cancel is None else cancel.when_cancelled(answered.set)
        answered.wait(60.0 if remaining_s is None else remaining_s)
        node.process.on_kill.remove(answered.set)
        if take_back is not None:
            take_back()
        if task.error is not None:
            raise task.error
        if not task.is_done or not node.process.is_alive or rng.random() < self.weather.calls_lost:
            raise Lost
        result: _T = task.result
        return result


@contextlib.contextmanager
def simulated(cluster: Cluster) -> Iterator[None]:
    """Threads are tasks; parts are merged as soon as there are two."""
    eager = {"TIER_PARTS": 2, "TIER_ROWS_MIN": 3}
    # In the worst weather most uploads end as orphans, which looks like the wrong catalog.
    patient = {"_ORPHANS_ALWAYS_ALLOWED": 10_000}
    with (
        simulated_threads(cluster.scheduler, _THREADED),
        replaced([(ochredb_compactor.scheduler, eager), (ochredb_compactor.garbage, patient)]),
    ):
        yield
