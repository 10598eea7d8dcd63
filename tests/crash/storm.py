"""A storm: many processes on one directory, one killed every now and then, and a judgement.

Embedded engines (writers, readers, compactors, one that creates and drops) and servers with their
clients use one store. The history that they recorded must be possible (`ochredb.testing.history`),
the store must open, fold and collect, and no lease may stay behind.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ochredb.catalog.jobs import Jobs
from ochredb.catalog.sqlite import SqliteSession
from ochredb.processes import is_gone
from ochredb.testing.history import check
from ochredb.testing.server_process import free_port
from ochredb_node.node import Node, NodeConfig

from . import storm_worker
from .actor import DATABASE, Actor, Call, Recorder
from .nursery import Nursery
from .recorded import Recorded, bytes_of
from .storm_worker import GRACE_S, LEASE_TTL_S

ROLES = ("writer", "writer", "reader", "compactor", "churner", "reader", "server", "server")
_START_S_MAX = 60.0
_LEAP_PROBABILITY = 0.1
# Files are stamped by the kernel, whose clock does not leap: no further ahead of it than a dead
# writer's files are kept.
_CLOCK_OFF_S = (0.0, 300.0, 500.0, -2.0, -600.0, -3_600.0, -3 * 3_600.0, -9 * 3_600.0)
_KEYS = "SELECT collection, key, first_offset, last_offset FROM idempotency"
_COLLECTIONS = "SELECT id FROM collections"
_JOBS = "SELECT collection, kind, owner, fence FROM jobs"
_OBJECTS = "SELECT key FROM objects WHERE state = 'live'"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """duration_s: of the killing. clients: processes that speak to the servers, never killed.

    set_clock: if given, by how many seconds the wall clock of all processes is off from now on; it
        leaps every now and then. environ: what that needs.
    """

    directory: str
    duration_s: float
    seed: int
    kill_every_s: float = 0.2
    clients: int = 2
    set_clock: Callable[[float], None] | None = None
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """`problems` must be empty; the counts show that something was tested."""

    kills: int = 0
    leaps: int = 0
    killed_at_start: int = 0
    starts: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    unknown: int = 0
    landed_unknown: int = 0
    repeated: int = 0
    reads: int = 0
    writes: int = 0
    log_operations: int = 0
    collections: int = 0
    leases_taken: int = 0
    recovery_s: float = 0.0
    check_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    def summary(self) -> str:
        return (
            f"{self.kills} kills ({self.killed_at_start} during a start), {self.starts} starts, "
            f"{self.leaps} leaps of the clock; "
            f"{self.writes} writes and {self.reads} reads of {self.collections} collections judged "
            f"in {self.check_s:.1f} s, {self.log_operations} operations in their logs; "
            f"{self.unknown} writes cut off, {self.landed_unknown} of them landed, "
            f"{self.repeated} sent again; {self.leases_taken} leases taken, all to be had in "
            f"{self.recovery_s:.2f} s; "
            f"{len(self.problems)} problems; {dict(sorted(self.operations.items()))}"
        )


@dataclass
class Slot:
    """One place among the processes, and who has it now."""

    name: str
    role: str
    port: int = 0
    life: int = 0
    pid: int = 0
    said_bytes: int = 0  # What its log had before this life.
    histories: list[str] = field(default_factory=list)


class Storm:
    """One run. Files of its own lie beside the directory."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.report = plan, Report()
        self._rng = random.Random(plan.seed)
        self._beside = Path(plan.directory + ".storm")
        self._beside.mkdir()
        self._stop = str(self._beside / "stop")
        self._slots = [
            Slot(f"{role}{number}", role, port=free_port() if role == "server" else 0)
            for number, role in enumerate(ROLES)
        ]
        self._clients = [Slot(f"client{number}", "client") for number in range(plan.clients)]
        self._recorded = Recorded(self._problem)

    def run(self) -> Report:
        log = str(self._beside / "nursery.log")
        nursery = Nursery("tests.crash.storm_worker", log, self.plan.environ)
        try:
            for slot in (*self._slots, *self._clients):
                self._spawn(nursery, slot)
            self._await_first_steps()
            due_s = time.monotonic()
            deadline_s = due_s + self.plan.duration_s
            while due_s < deadline_s:
                due_s += self.plan.kill_every_s
                time.sleep(max(0.0, due_s - time.monotonic()))
                self._kill_one(nursery)
                self._look(nursery)
                self._leap()
            self._end(nursery)
        finally:
            nursery.close()
        self._judge()
        return self.report

    def _problem(self, text: str) -> None:
        self.report.problems.append(text)

    # -- the storm

    def _spawn(self, nursery: Nursery, slot: Slot) -> None:
        predecessor = slot.histories[-1] if slot.histories else ""
        said_bytes = len(bytes_of(str(self._beside / f"{slot.name}.log")))
        slot.life += 1
        slot.histories.append(str(self._beside / f"{slot.name}-{slot.life}.jsonl"))
        answer = nursery.ask(
            do="spawn",
            role=slot.role,
            name=f"{slot.name}-{slot.life}",
            history=slot.histories[-1],
            predecessor=predecessor,
            log=str(self._beside / f"{slot.name}.log"),
            directory=self.plan.directory,
            stop=self._stop,
            seed=self.plan.seed,
            port=slot.port,
            addresses=[f"127.0.0.1:{slot.port}" for slot in self._slots if slot.role == "server"],
        )
        slot.pid, slot.said_bytes = answer["pid"], said_bytes
        self.report.starts += 1

    def _await_first_steps(self) -> None:
        """All have created or opened the store, at the same time."""
        deadline_s = time.monotonic() + _START_S_MAX
        waiting = [*self._slots, *self._clients]
        while waiting and time.monotonic() < deadline_s:
            waiting = [slot for slot in waiting if not os.path.exists(slot.histories[-1])]
            time.sleep(0.05)

    def _kill_one(self, nursery: Nursery) -> None:
        slot = self._rng.choice(self._slots)
        history = slot.histories[-1]
        nursery.ask(do="kill", pid=slot.pid, signal="SIGKILL")
        self._recorded.died[history] = time.monotonic_ns()
        self.report.kills += 1
        if slot.role != "server" and b"started" not in bytes_of(history):
            self.report.killed_at_start += 1
        self._spawn(nursery, slot)

    def _leap(self) -> None:
        if self.plan.set_clock is not None and self._rng.random() < _LEAP_PROBABILITY:
            self.plan.set_clock(self._rng.choice(_CLOCK_OFF_S))
            self.report.leaps += 1

    def _look(self, nursery: Nursery) -> None:
        """Nobody ends by itself."""
        for pid, status in nursery.ask(do="look")["ended"]:
            for slot in (*self._slots, *self._clients):
                if slot.pid == pid:
                    self._problem(f"{slot.name} ended by itself: {status}:\n{self._log(slot)}")
                    self._spawn(nursery, slot)

    def _end(self, nursery: Nursery) -> None:
        """Stop all in good order: clients first, then whom they speak to."""
        Path(self._stop).touch()
        self._await_ends(nursery, self._clients)
        for slot in self._slots:
            if slot.role == "server" and slot.pid:
                self._await_ready(slot)  # Before, the signal ends it as it ends any process.
                nursery.ask(do="kill", pid=slot.pid, signal="SIGTERM")
        self._await_ends(nursery, self._slots)

    def _await_ready(self, slot: Slot) -> None:
        log, deadline_s = str(self._beside / f"{slot.name}.log"), time.monotonic() + _START_S_MAX
        while b"is ready" not in bytes_of(log)[slot.said_bytes :]:
            if time.monotonic() > deadline_s:
                self._problem(f"{slot.name} did not start:\n{self._log(slot)}")
                return
            time.sleep(0.05)

    def _await_ends(self, nursery: Nursery, slots: Sequence[Slot]) -> None:
        deadline_s = time.monotonic() + 120
        while any(slot.pid for slot in slots) and time.monotonic() < deadline_s:
            for pid, status in nursery.ask(do="look")["ended"]:
                slot = next(s for s in (*self._slots, *self._clients) if s.pid == pid)
                slot.pid = 0
                if status != 0:
                    text = f"{slot.name}, told to stop, ended with {status}:\n{self._log(slot)}"
                    self._problem(text)
            time.sleep(0.05)
        for slot in slots:
            if slot.pid:
                nursery.ask(do="kill", pid=slot.pid, signal="SIGUSR1")  # Shows its threads.
                time.sleep(0.5)
                self._problem(f"{slot.name} did not stop:\n{self._log(slot)}")

    def _log(self, slot: Slot) -> str:
        return bytes_of(str(self._beside / f"{slot.name}.log"))[-6000:].decode()

    # -- the judgement

    def _judge(self) -> None:
        node = Node(storm_worker.eager(NodeConfig(path=self.plan.directory)))
        node.start(background=False)
        try:
            last = str(self._beside / "judge.jsonl")
            actor = Actor(Recorder(last), self._rng, "judge", _call(node))
            before = self._read_everything(actor, node)
            keys = {(row[0], row[1]): (row[2], row[3]) for row in _all(node, _KEYS)}
            self._recover_leases(node)
            if self._read_everything(actor, node) != before:
                self._problem("compaction has changed the answers")
            self._collect(node)
            live = {row[0] for row in before}
        finally:
            node.close()
        histories = [path for slot in (*self._slots, *self._clients) for path in slot.histories]
        recorded = self._recorded
        events = [e for path in (*histories, last) for e in recorded.events(path, keys, live)]
        started_s = time.monotonic()
        verdict = check(events)
        report = self.report
        report.check_s = time.monotonic() - started_s
        report.writes, report.reads = verdict.writes, verdict.reads
        report.operations, report.unknown = recorded.operations, recorded.unknown
        report.landed_unknown, report.repeated = recorded.landed_unknown, recorded.repeated
        report.collections, report.log_operations = verdict.collections, verdict.operations
        for violation in verdict.violations:
            self._problem(str(violation))

    def _read_everything(self, actor: Actor, node: Node) -> list[tuple[str, Any, Any, Any]]:
        actor.open_collections()
        everything = []
        for collection in sorted(work[0] for work in _all(node, _COLLECTIONS)):
            path = f"{DATABASE}/collections/{collection}"
            whole = actor.ask(
                collection, path, "get", {"include": ["documents", "metadatas", "embeddings"]}
            )
            count = actor.ask(collection, path, "count", {})
            offset = actor.ask(collection, path, "last_offset", {})
            everything.append((collection, whole, count, offset))
        return everything

    def _recover_leases(self, node: Node) -> None:
        """Every lease can be had, and every collection folded, within the ttl of a dead holder."""
        report, table = self.report, Jobs(node.database, node.clock)
        started_s = time.monotonic()
        for collection, kind, _, fence in _all(node, _JOBS):
            report.leases_taken += fence
            lease = table.acquire(collection, kind, "judge", LEASE_TTL_S, is_gone)
            while lease is None and time.monotonic() < started_s + LEASE_TTL_S + 0.5:
                time.sleep(0.02)
                lease = table.acquire(collection, kind, "judge", LEASE_TTL_S, is_gone)
            if lease is None:
                self._problem(f"the {kind} lease of {collection} was not given up")
            else:
                table.end(lease)
        report.recovery_s = time.monotonic() - started_s
        for (collection,) in _all(node, _COLLECTIONS):
            node.compactor.compact_now(collection)

    def _collect(self, node: Node) -> None:
        """After the grace period nothing is on disk but what the catalog names."""
        for _ in range(2):
            time.sleep(2 * GRACE_S)
            node.compactor.collect_now(sweep_orphans=True)
        named = {row[0] for row in _all(node, _OBJECTS)}
        stored = {item.key for item in node.store.list("")} - {"store_id"}
        if named - stored:
            self._problem(f"missing objects: {sorted(named - stored)[:5]}")
        if stored - named:
            self._problem(f"objects that nobody names: {sorted(stored - named)[:5]}")


def _all(node: Node, sql: str) -> list[Any]:
    with node.database.read() as session:
        assert isinstance(session, SqliteSession)
        return session.connection.execute(sql).fetchall()


def _call(node: Node) -> Call:
    def call(method: str, path: str, body: Any, _key: str | None) -> tuple[int, Any]:
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        status, _, answer = node.handle(method, path, "", headers, data)
        return status, json.loads(answer)

    return call
