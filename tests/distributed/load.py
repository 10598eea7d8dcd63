"""Clients that use a cluster while something is done to it, and the judgement of what they saw.

    load = Load(cluster, launcher, seed=1).start()
    ...
    load.stop()
    judged = load.judge(storage)
    assert not judged.problems

They record each operation; the history must be possible (see `ochredb.testing.history`): no
acknowledged write lost, no stale read, no batch applied twice. They also note how many attempts
each request took, by which one can say what was available when.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

from ochredb.testing.history import check
from tests.crash.actor import DATABASE, Actor, Call, Connection, Recorder
from tests.crash.recorded import Recorded, bytes_of

from .cluster import Cluster
from .members import Forks
from .storage import Storage, node_call

# Failures that a client must expect while what it speaks to is gone, and may repeat.
EXPECTED = frozenset({404, 429, 503, 504})
SMOOTH_S_MAX = 3.0
_STOP_S_MAX = 120.0


@dataclass(frozen=True)
class Attempted:
    """A request and its repetitions. settled: the attempt that had an answer, from 1; 0: none."""

    kind: str  # read | write
    begin_s: float
    end_s: float
    settled: int

    @property
    def smooth(self) -> bool:
        """Settled at once, and soon, for a machine that may have much else to do."""
        return self.settled == 1 and self.end_s - self.begin_s <= SMOOTH_S_MAX


@dataclass
class Judged:
    """`problems` must be empty; the counts show that something was tested."""

    requests: list[Attempted] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    unknown: int = 0
    landed_unknown: int = 0
    repeated: int = 0
    writes: int = 0
    reads: int = 0
    log_operations: int = 0
    collections: int = 0
    problems: list[str] = field(default_factory=list)

    def attempts(self, kind: str) -> Counter[int]:
        """How many requests were settled by which attempt."""
        return Counter(request.settled for request in self.requests if request.kind == kind)

    def available(self, kind: str = "read") -> float:
        """Share of requests that one retry of the client's was enough for."""
        attempts = self.attempts(kind)
        return (attempts[1] + attempts[2]) / max(1, attempts.total())

    def longest_s(self, kind: str) -> float:
        return max((r.end_s - r.begin_s for r in self.requests if r.kind == kind), default=0.0)

    def back_after_s(self, healed_s: float) -> float:
        """How long after `healed_s` (monotonic) the last request ended that was not smooth."""
        return max(0.0, *(r.end_s - healed_s for r in self.requests if not r.smooth), 0.0)

    def summary(self) -> str:
        shown = [
            f"{kind}s by attempt {dict(sorted(self.attempts(kind).items()))},"
            f" {self.available(kind):.2%} with one retry, the longest {self.longest_s(kind):.1f} s"
            for kind in ("read", "write")
        ]
        return (
            f"{'; '.join(shown)}; statuses {dict(sorted(self.statuses.items()))}\n"
            f"judged {self.writes} writes and {self.reads} reads of {self.collections} collections,"
            f" {self.log_operations} operations in their logs; {self.unknown} attempts at writes"
            f" without an answer, {self.landed_unknown} of them landed, {self.repeated} sent again;"
            f" {len(self.problems)} problems"
        )


class Load:
    """clients: processes of two threads each, which speak to the frontends.

    name: another one for each load of a cluster; its collections are named for it. timeout_s: after
    which a client gives an attempt up.
    """

    def __init__(
        self,
        cluster: Cluster,
        launcher: Forks,
        *,
        seed: int,
        clients: int = 2,
        name: str = "storm",
        timeout_s: float = 60.0,
    ) -> None:
        self._cluster, self._launcher, self._seed = cluster, launcher, seed
        self._names = [f"{name}{number}" for number in range(clients)]
        self._collections = tuple(f"{name}-{number}" for number in range(3))
        self._addresses = [f"{member.host}:{member.port}" for member in cluster.of("frontend")]
        self._timeout_s = timeout_s
        self._stop = cluster.root / f"{name}.stop"
        self._pids: list[int] = []
        self._histories: list[str] = []
        self._rng = random.Random(seed)
        self.problems: list[str] = []

    def start(self) -> Self:
        for number, name in enumerate(self._names):
            history = str(self._cluster.root / f"{name}.jsonl")
            self._histories.append(history)
            order: dict[str, Any] = {
                "client": name,
                "collections": self._collections,
                "history": history,
                "addresses": self._addresses,
                "timeout_s": self._timeout_s,
                "stop": str(self._stop),
                "seed": self._seed,
                "churns": number == 0,
                "log": str(self._cluster.root / f"{name}.log"),
            }
            self._pids.append(self._launcher.run(order))
        return self

    def stop(self) -> None:
        """Let every client finish what it is at."""
        self._stop.touch()
        deadline_s = time.monotonic() + _STOP_S_MAX
        for pid in self._pids:
            while (code := self._launcher.code(pid)) is None and time.monotonic() < deadline_s:
                time.sleep(0.05)
            if code != 0:
                self.problems.append(f"a client ended with {code}")
        self._pids.clear()

    def read_everything(self) -> list[tuple[str, Any, Any, Any]]:
        """By one more client; part of the history."""
        path = str(self._cluster.root / f"{self._names[0]}-after.jsonl")
        connection = Connection(self._addresses, self._rng)
        try:
            return self._read_everything(path, connection.call)
        finally:
            connection.close()

    def read_by_another_engine(self, storage: Storage) -> list[tuple[str, Any, Any, Any]]:
        """By one in this process that knows nothing of the cluster; part of the history."""
        path = str(self._cluster.root / f"{self._names[0]}-judge.jsonl")
        with storage.node() as node:
            return self._read_everything(path, node_call(node))

    def _read_everything(self, path: str, call: Call) -> list[tuple[str, Any, Any, Any]]:
        """The id, the records, the count and the last offset of each shared collection."""
        self._histories.append(path)
        actor = Actor(Recorder(path), self._rng, "everything", call, self._collections)
        actor.open_collections()
        everything = []
        for collection in map(actor.id_of, self._collections):
            where = f"{DATABASE}/collections/{collection}"
            include = {"include": ["documents", "metadatas", "embeddings"]}
            whole = actor.ask(collection, where, "get", include)
            count = actor.ask(collection, where, "count", {})
            offset = actor.ask(collection, where, "last_offset", {})
            everything.append((collection, whole, count, offset))
        return everything

    def judge(self, storage: Storage) -> Judged:
        judged = Judged(problems=self.problems)
        recorded = Recorded(self.problems.append, expected=EXPECTED)
        keys, live = storage.keys(), storage.collections()
        events = [e for path in self._histories for e in recorded.events(path, keys, live)]
        verdict = check(events)
        judged.problems += map(str, verdict.violations)
        judged.writes, judged.reads = verdict.writes, verdict.reads
        judged.collections, judged.log_operations = verdict.collections, verdict.operations
        judged.statuses, judged.unknown = recorded.statuses, recorded.unknown
        judged.landed_unknown, judged.repeated = recorded.landed_unknown, recorded.repeated
        judged.requests = self.requests()
        return judged

    def requests(self) -> list[Attempted]:
        """Those that have ended; also while clients are at work."""
        found = []
        for path in self._histories:
            for text in bytes_of(path).splitlines(keepends=True):
                if b'"settled"' in text and text.endswith(b"\n"):
                    line = json.loads(text)
                    begin_s = line["begun"] / 1e9
                    end_s = begin_s + line["took"] / 1e9
                    found.append(Attempted(line["request"], begin_s, end_s, line["settled"]))
        return found
