"""A storm: many processes on one directory, one killed every now and then, and a judgement.

Embedded engines (writers, readers, compactors, one that creates and drops) and servers with their
clients use one store. The history that they recorded must be possible (`ochredb.testing.history`),
the store must open, fold and collect, and no lease may stay behind.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ochredb.catalog.database import SqliteSession
from ochredb.catalog.jobs import Jobs
from ochredb.processes import is_gone
from ochredb.testing.history import Event, check
from ochredb.testing.history_events import Named, Outcome, Read, Write
from ochredb_node.node import Node, NodeConfig

from . import storm_worker
from .harness import _free_port
from .storm_worker import DATABASE, GRACE_S, LEASE_TTL_S, Actor, Call, Recorder

ROLES = ("writer", "writer", "reader", "compactor", "churner", "reader", "server", "server")
_START_S_MAX = 60.0
_KEYS = "SELECT collection, key, first_offset, last_offset FROM idempotency"
_COLLECTIONS = "SELECT id FROM collections"
_JOBS = "SELECT collection, kind, owner, fence FROM jobs"
_OBJECTS = "SELECT key FROM objects WHERE state = 'live'"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """duration_s: of the killing. clients: processes that speak to the servers, never killed."""

    directory: str
    duration_s: float
    seed: int
    kill_every_s: float = 0.2
    clients: int = 2


@dataclass
class Report:
    """`problems` must be empty; the counts show that something was tested."""

    kills: int = 0
    killed_at_start: int = 0
    starts: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
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
            f"{self.kills} kills ({self.killed_at_start} during a start), {self.starts} starts; "
            f"{self.writes} writes and {self.reads} reads of {self.collections} collections judged "
            f"in {self.check_s:.1f} s, {self.log_operations} operations in their logs; "
            f"{self.unknown} writes cut off, {self.landed_unknown} of them landed, "
            f"{self.repeated} sent again; {self.leases_taken} leases taken, all to be had in "
            f"{self.recovery_s:.2f} s; "
            f"{len(self.problems)} problems; {dict(sorted(self.operations.items()))}"
        )


class Nursery:
    """The process that forks the others."""

    def __init__(self, log: str) -> None:
        with open(log, "wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.crash.storm_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=Path(__file__).resolve().parents[2],
            )

    def ask(self, **order: Any) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        if self._process.stdout is not None:
            self._process.stdout.close()


@dataclass
class Slot:
    """One place among the processes, and who has it now."""

    name: str
    role: str
    port: int = 0
    life: int = 0
    pid: int = 0
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
            Slot(f"{role}{number}", role, port=_free_port() if role == "server" else 0)
            for number, role in enumerate(ROLES)
        ]
        self._clients = [Slot(f"client{number}", "client") for number in range(plan.clients)]
        self._died: dict[str, int] = {}  # When, by history file.
        self._sent: set[str] = set()  # Keys of writes.

    def run(self) -> Report:
        nursery = Nursery(str(self._beside / "nursery.log"))
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
            ports=[server.port for server in self._slots if server.role == "server"],
        )
        slot.pid = answer["pid"]
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
        self._died[history] = time.monotonic_ns()
        self.report.kills += 1
        if slot.role != "server" and b"started" not in _bytes(history):
            self.report.killed_at_start += 1
        self._spawn(nursery, slot)

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
                nursery.ask(do="kill", pid=slot.pid, signal="SIGTERM")
        self._await_ends(nursery, self._slots)

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
        return _bytes(str(self._beside / f"{slot.name}.log"))[-6000:].decode()

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
        events = [event for path in (*histories, last) for event in self._events(path, keys, live)]
        started_s = time.monotonic()
        verdict = check(events)
        report = self.report
        report.check_s = time.monotonic() - started_s
        report.writes, report.reads = verdict.writes, verdict.reads
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

    # -- from the files to events

    def _events(
        self, path: str, keys: dict[tuple[str, str], tuple[int, int]], live: set[str]
    ) -> Iterator[Event]:
        """A process's events. What became of a write that was cut off its key tells."""
        process, died = Path(path).stem, self._died.get(path)
        for first, second in _pairs(path, self._problem):
            kind = first.pop("kind")
            status = second.get("status")
            self.report.operations[f"{kind} {first['verb']}"] += 1
            if status is not None:
                self.report.statuses[status] += 1
            if status is not None and status >= 400 and status != 404:
                self._problem(f"{process}: status {status} for {first}: {second.get('error')}")
            outcome = _outcome(status)
            ends = {"begin": first["begin"], "end": second.get("end", died)}
            fields: dict[str, Any] = {"process": process, **ends}
            if kind == "read":
                if outcome == "done" or outcome == "not_found":
                    yield Read(
                        **fields, verb=first["verb"], collection=first["collection"],
                        body=first["body"], outcome=outcome, answer=second.get("answer"),
                    )  # fmt: skip
            elif kind == "name":
                found = second.get("collection", first.get("collection"))
                yield Named(
                    **fields, verb=first["verb"], name=first["name"], outcome=outcome,
                    collection=found,
                )  # fmt: skip
            else:
                yield self._write(fields, first, second, outcome, keys, live)

    def _write(
        self,
        fields: dict[str, Any],
        first: dict[str, Any],
        second: dict[str, Any],
        outcome: Outcome,
        keys: dict[tuple[str, str], tuple[int, int]],
        live: set[str],
    ) -> Write:
        collection, report = first["collection"], self.report
        report.repeated += first["key"] in self._sent
        self._sent.add(first["key"])
        stored = keys.get((collection, first["key"]))
        offsets = (second["first"], second["last"]) if "first" in second else stored
        if outcome == "unknown":
            report.unknown += 1
            report.landed_unknown += stored is not None
            if collection in live:
                outcome = "refused" if stored is None else "done"
                # Perhaps only another attempt has landed, after this one's process had died.
                fields["end"] = time.monotonic_ns()
        elif outcome == "done" and collection in live and stored != offsets:
            self._problem(f"acknowledged at {offsets}, kept as {stored}: {first}")
        if outcome == "done" and offsets is None:
            outcome = "unknown"  # Of a collection that is gone, and its keys with it.
        first_offset, last_offset = offsets if outcome == "done" and offsets else (None, None)
        return Write(
            **fields, verb=first["verb"], collection=collection, body=first["body"],
            key=first["key"], outcome=outcome, deleted=second.get("deleted"),
            first_offset=first_offset, last_offset=last_offset,
        )  # fmt: skip


def _pairs(
    path: str, problem: Callable[[str], None]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Both lines of each operation; the second is empty if the process did not get to it."""
    begun: dict[int, dict[str, Any]] = {}
    for text in _bytes(path).splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # The last line of a killed process.
            continue
        if "failed" in line:
            problem(f"{Path(path).stem} failed:\n{line['failed']}")
        elif "begin" in line:
            begun[line["n"]] = line
        elif "end" in line:
            yield begun.pop(line["n"]), line
    for line in begun.values():
        yield line, {}


def _outcome(status: int | None) -> Outcome:
    if status is None or status >= 500:
        return "unknown"
    if status == 404:
        return "not_found"
    return "done" if status < 300 else "refused"


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:  # Killed before its first step.
        return b""


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
