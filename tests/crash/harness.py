"""Kill -9 (or power loss) at a random moment of concurrent writes, restart, compare; many times.

Writers send requests of several records each. A record is a function of (batch, index, version), so
whatever the server answers after the restart can be judged without keeping copies:

* an acknowledged request is there, whole;
* an unanswered one is there whole, or not at all;
* there is nothing else.

A batch belongs to one writer and has at most one unanswered request, so two states are possible at
most; it is left alone until it is certain which. Rounds share one directory; what a round leaves is
the next round's past.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import itertools
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ochredb.testing.server_process import free_port

from .powerloss import PowerLoss

DATABASE = "/api/v2/tenants/default_tenant/databases/default_database"
DIMENSION = 8
BIG_DOCUMENT_BYTES = 24_000
ABSENT = 0  # The version of a batch that is not stored.

GONE = (OSError, http.client.HTTPException)  # What a request to a killed server ends with.


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to run.

    command: the server's, with {directory} and {port} to be filled in.
    big_probability: of a request that is too large to be stored inline.
    kill_at_start_probability: of a round that first kills a server while it starts.
    full_every: rounds between complete comparisons.
    loss: if given, the power fails with most kills; the others lose nothing, but leave what the
        dead process had not synced to the next failure.
    """

    command: Sequence[str]
    directory: str
    rounds: int
    seed: int
    writers: int = 4
    collections: int = 2
    write_s_max: float = 0.5
    big_probability: float = 0.04
    kill_at_start_probability: float = 0.08
    full_every: int = 20
    start_s_max: float = 30.0
    stop_exit_code: int = 0
    loss: PowerLoss | None = None
    loss_probability: float = 0.75


@dataclass
class Report:
    """What happened. `problems` must be empty; the counts show that something was tested."""

    rounds: int = 0
    losses: int = 0
    acknowledged: int = 0
    unanswered: int = 0
    landed_unanswered: int = 0
    refused: int = 0
    records_compared: int = 0
    start_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def summary(self) -> str:
        mean = sum(self.start_s) / max(1, len(self.start_s))
        return (
            f"{self.rounds} rounds, {self.losses} power losses; requests: {self.acknowledged} "
            f"acknowledged, {self.unanswered} unanswered ({self.landed_unanswered} landed), "
            f"{self.refused} refused; {self.records_compared} records compared; start {mean:.2f} s "
            f"on average; {len(self.problems)} problems"
        )


@dataclass
class Batch:
    """Records that are always written together. Versions count the requests about it."""

    number: int
    collection: int
    size: int
    big: bool
    settled: int = ABSENT
    seen: int = ABSENT  # What the last comparison found.
    sent: int | None = None  # The version that an unanswered request would have made.
    last_version: int = 0

    def possible(self) -> set[int]:
        return {self.settled} if self.sent is None else {self.settled, self.sent}

    def record(self, index: int, version: int) -> dict[str, Any]:
        filler = "." * (BIG_DOCUMENT_BYTES if self.big else 0)
        metadata = {"batch": self.number, "index": index, "version": version, "size": self.size}
        return {
            "id": f"{self.number}-{index}",
            "embedding": [float(self.number), float(index), float(version)]
            + [0.5] * (DIMENSION - 3),
            "document": f"batch {self.number} record {index} version {version} {filler}",
            "metadata": metadata,
        }

    def ids(self) -> list[str]:
        return [f"{self.number}-{index}" for index in range(self.size)]

    def body(self, version: int) -> dict[str, Any]:
        records = [self.record(index, version) for index in range(self.size)]
        return {
            "ids": [record["id"] for record in records],
            "embeddings": [record["embedding"] for record in records],
            "documents": [record["document"] for record in records],
            "metadatas": [record["metadata"] for record in records],
        }


class Client:
    """One keep-alive connection; not for use by several threads at once."""

    def __init__(self, port: int, timeout_s: float = 30.0) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)

    def call(
        self, method: str, path: str, body: object = None, key: str | None = None
    ) -> tuple[int, Any]:
        """Status and parsed body; raises one of `GONE` if there is no (whole) answer.

        key: for idempotency.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Idempotency-Key"] = key
        self._connection.request(method, path, body=data, headers=headers)
        answer = self._connection.getresponse()
        text = answer.read()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text.decode(errors="replace")

    def close(self) -> None:
        self._connection.close()


class Server:
    """One life of the server: from its start to its death."""

    def __init__(self, plan: Plan, log_path: str) -> None:
        self.port = free_port()
        self.log_path = log_path
        command = [part.format(directory=plan.directory, port=self.port) for part in plan.command]
        observed = plan.loss.environ() if plan.loss else {}
        with open(log_path, "wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **observed},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_ready(self, timeout_s: float) -> str | None:
        """Poll the heartbeat; returns what went wrong, or None."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                return f"exited with {self.process.returncode} at its start:\n{self.log_tail()}"
            client = Client(self.port, timeout_s=5.0)
            try:
                if client.call("GET", "/api/v2/heartbeat")[0] == 200:
                    return None
            except GONE:
                time.sleep(0.01)
            finally:
                client.close()
        return f"not ready after {timeout_s} s:\n{self.log_tail()}"

    def kill(self, *, helpers: bool = False) -> None:
        """Kill -9 the server, if it still runs. helpers: and whatever it has started.

        Else those notice that it is gone, and end by themselves.
        """
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        while helpers and (left := _of_session(self.process.pid)):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)

    def stop(self) -> int:
        """Ask it to end; returns the exit code."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def log_tail(self) -> str:
        return Path(self.log_path).read_bytes()[-3000:].decode(errors="replace")


def _of_session(leader: int) -> list[int]:
    """The processes of a session that are not dead; by /proc."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _parent, _group, session = status.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.append(int(status.parent.name))
    return found


class Campaign:
    """All rounds on one directory."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.report = Report()
        self._rng = random.Random(plan.seed)
        self._batches: dict[int, Batch] = {}
        self._collection_ids: list[str | None] = [None] * plan.collections
        self._touched: set[int] = set()
        self._all_durable = True  # Nothing of before the last start can be lost any more.
        self._lock = threading.Lock()
        self._answered = threading.Event()
        self._log_path = plan.directory.rstrip("/") + ".log"

    def run(self) -> Report:
        """Play all rounds, then one last comparison and an orderly end."""
        plan, report = self.plan, self.report
        for round_number in range(plan.rounds):
            report.rounds += 1
            if self._rng.random() < plan.kill_at_start_probability:
                server = Server(plan, self._log_path)
                time.sleep(self._rng.uniform(0.0, 1.0))
                server.kill(helpers=plan.loss is not None)
                self._lose_power()
            server = Server(plan, self._log_path)
            try:
                if not self._judge(server, complete=round_number % plan.full_every == 0):
                    return report
                self._write_until_killed(server, round_number)
            finally:
                server.kill(helpers=plan.loss is not None)
            self._lose_power()
        server = Server(dataclasses.replace(plan, loss=None), self._log_path)
        try:
            if self._judge(server, complete=True):
                code = server.stop()
                if code != plan.stop_exit_code:
                    self._problem(f"an orderly stop ended with {code}:\n{server.log_tail()}")
        finally:
            server.kill()
        return report

    def _lose_power(self) -> None:
        plan = self.plan
        self._all_durable = plan.loss is None
        if plan.loss is not None and self._rng.random() < plan.loss_probability:
            plan.loss.strike()
            self._all_durable = True
            self.report.losses += 1

    def _problem(self, text: str) -> None:
        with self._lock:
            self.report.problems.append(f"round {self.report.rounds}: {text}")

    # ---- writing ----

    def _write_until_killed(self, server: Server, round_number: int) -> None:
        killing = threading.Event()
        self._answered.clear()
        writers = [
            threading.Thread(target=self._write, args=(server.port, round_number, writer, killing))
            for writer in range(self.plan.writers)
        ]
        for thread in writers:
            thread.start()
        # Mostly count from the first answer, however slow the machine is just now.
        if self._rng.random() < 0.9:
            self._answered.wait(timeout=20)
        time.sleep(self._rng.uniform(0.0, self.plan.write_s_max))
        killing.set()
        server.kill(helpers=self.plan.loss is not None)
        for thread in writers:
            thread.join()

    def _write(self, port: int, round_number: int, writer: int, killing: threading.Event) -> None:
        """Send requests about this writer's batches until the server is gone."""
        plan = self.plan
        rng = random.Random(f"{plan.seed}/{round_number}/{writer}")
        with self._lock:
            mine = [b for b in self._batches.values() if b.number % plan.writers == writer]
        numbers = itertools.count(len(mine) * plan.writers + writer, plan.writers)
        client = Client(port)
        try:
            while True:
                if not mine or rng.random() < 0.6:
                    mine.append(self._new_batch(next(numbers), rng))
                    batch = mine[-1]
                else:
                    batch = rng.choice(mine)
                if batch.sent is None:
                    self._request(client, batch, rng)
        except GONE as error:
            if not killing.is_set():
                self._problem(f"the server broke off a write before the kill: {error!r}")
        except BaseException as error:
            self._problem(f"writer {writer} failed: {error!r}")
            raise
        finally:
            client.close()

    def _new_batch(self, number: int, rng: random.Random) -> Batch:
        big = rng.random() < self.plan.big_probability
        size = rng.randint(12, 16) if big else rng.randint(2, 9)
        batch = Batch(number, rng.randrange(self.plan.collections), size, big)
        with self._lock:
            self._batches[number] = batch
        return batch

    def _request(self, client: Client, batch: Batch, rng: random.Random) -> None:
        """One write about a whole batch; raises one of `GONE` if there is no answer."""
        version = batch.last_version + 1
        body: dict[str, Any]
        if batch.settled == ABSENT:
            verb, body = rng.choice(("add", "upsert")), batch.body(version)
        elif rng.random() < 0.5:
            verb, body = rng.choice(("update", "upsert")), batch.body(version)
        else:
            verb, version = "delete", ABSENT
            by_ids = rng.random() < 0.5
            body = {"ids": batch.ids()} if by_ids else {"where": {"batch": batch.number}}
        with self._lock:
            self._touched.add(batch.number)
            batch.last_version += 1
            batch.sent = version
            self.report.unanswered += 1
        path = f"{DATABASE}/collections/{self._collection_ids[batch.collection]}/{verb}"
        status, answer = client.call("POST", path, body)
        with self._lock:
            if status in (200, 201):
                batch.settled, batch.seen, batch.sent = version, version, None
                self.report.acknowledged += 1
                self.report.unanswered -= 1
            elif status == 429:
                batch.sent = None
                self.report.refused += 1
                self.report.unanswered -= 1
        self._answered.set()
        if status not in (200, 201, 429):
            self._problem(f"{verb} of batch {batch.number}: status {status}: {answer}")
        elif verb == "delete" and status == 200 and answer.get("deleted") != batch.size:
            self._problem(f"delete of batch {batch.number} ({batch.size} records): {answer}")

    # ---- comparing ----

    def _judge(self, server: Server, *, complete: bool) -> bool:
        """Compare a restarted server with the history; False if it cannot go on."""
        started_s = time.monotonic()
        failure = server.wait_until_ready(self.plan.start_s_max)
        if failure is not None:
            self._problem(f"the server {failure}")
            return False
        self.report.start_s.append(time.monotonic() - started_s)
        client = Client(server.port)
        try:
            for index in range(self.plan.collections):
                self._open_collection(client, index)
                self._compare(client, index, complete=complete)
        except GONE as error:
            self._problem(f"the server broke off during the comparison: {error!r}")
            return False
        finally:
            client.close()
        self._touched = {n for n in self._touched if self._batches[n].sent is not None}
        return not self.report.problems

    def _open_collection(self, client: Client, index: int) -> None:
        """Create it in the first round; afterwards it must be there, under the same id."""
        name = f"crash-{index}"
        known = self._collection_ids[index]
        if known is None:
            body = {"name": name, "get_or_create": True}
            status, answer = client.call("POST", f"{DATABASE}/collections", body)
        else:
            status, answer = client.call("GET", f"{DATABASE}/collections/{name}")
        if status != 200 or (known is not None and answer["id"] != known):
            self._problem(f"collection {name} (id {known}): status {status}: {answer}")
        else:
            self._collection_ids[index] = answer["id"]

    def _compare(self, client: Client, index: int, *, complete: bool) -> None:
        """Read what the last round touched (or everything), and judge it."""
        path = f"{DATABASE}/collections/{self._collection_ids[index]}"
        ours = [batch for batch in self._batches.values() if batch.collection == index]
        judged = ours if complete else [batch for batch in ours if batch.number in self._touched]
        found: dict[int, list[dict[str, Any]]] = {batch.number: [] for batch in judged}
        for record in self._read(client, path, None if complete else sorted(found)):
            number = (record["metadata"] or {}).get("batch")
            if number in found:
                found[number].append(record)
            else:
                self._problem(f"a record that nobody wrote: {str(record)[:300]}")
        for batch in judged:
            self._judge_batch(batch, found[batch.number])
        expected = sum(batch.size for batch in ours if batch.seen != ABSENT)
        status, count = client.call("GET", f"{path}/count")
        if (status, count) != (200, expected):
            self._problem(f"count is {count} (status {status}), not {expected}")
        if expected:
            self._query(client, path, min(5, expected))

    def _judge_batch(self, batch: Batch, records: list[dict[str, Any]]) -> None:
        self.report.records_compared += len(records)
        versions = {record["metadata"].get("version") for record in records} or {ABSENT}
        version = versions.pop()
        what = f"batch {batch.number}, settled at {batch.settled}, unanswered {batch.sent}"
        if versions:
            self._problem(f"half a request: {what}: versions {version} and {versions}")
        elif version not in batch.possible():
            lost = batch.sent is None or version == ABSENT
            self._problem(f"{'lost' if lost else 'wrong'}: {what}: found version {version}")
        elif version != ABSENT and len(records) != batch.size:
            self._problem(f"half a request: {what}: {len(records)} of {batch.size} records")
        else:
            expected = [batch.record(i, version) for i in range(len(records))]
            records = sorted(records, key=lambda record: int(record["metadata"]["index"]))
            if records != expected:
                self._problem(f"other content: {what}: {str(records)[:300]}")
        batch.seen = version
        if batch.sent is not None and self._all_durable:
            self.report.landed_unanswered += version == batch.sent
            batch.settled, batch.sent = version, None

    def _read(self, client: Client, path: str, numbers: list[int] | None) -> list[dict[str, Any]]:
        """All records, or those of some batches."""
        records: list[dict[str, Any]] = []
        page = 2000
        wheres: list[dict[str, Any]] = [{}]
        if numbers is not None:
            wheres = [
                {"where": {"batch": {"$in": numbers[start : start + 100]}}}
                for start in range(0, len(numbers), 100)
            ]
        for where in wheres:
            for offset in itertools.count(0, page):
                include = ["documents", "metadatas", "embeddings"]
                body = {"include": include, "limit": page, "offset": offset, **where}
                status, answer = client.call("POST", f"{path}/get", body)
                if status != 200:
                    self._problem(f"get: status {status}: {answer}")
                    return records
                columns = (answer[c] for c in ("ids", "embeddings", "documents", "metadatas"))
                rows = list(zip(*columns, strict=True))
                keys = ("id", "embedding", "document", "metadata")
                records += [dict(zip(keys, row, strict=True)) for row in rows]
                if len(rows) < page:
                    break
        return records

    def _query(self, client: Client, path: str, results: int) -> None:
        body = {"query_embeddings": [[1.0] * DIMENSION], "n_results": results}
        status, answer = client.call("POST", f"{path}/query", body)
        if status != 200 or len(answer["ids"][0]) != results:
            self._problem(f"query for {results} results: status {status}: {str(answer)[:300]}")
