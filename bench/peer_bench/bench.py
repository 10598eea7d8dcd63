"""What the phases share: the servers, the rows they fill, and the interleaved timed loop."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from .data import NEAREST, Data, Floats
from .http_client import Connection, check
from .report import Row, shown
from .servers import ROOT, Server
from .slices import Slice, repeat, run_threads, send_all

Wanted = Callable[[int], set[int]]  # Request number -> rows that the exact answer holds.
RECALL_QUERIES_MIN = 50
RECALL_LIMIT_S, ALL_QUERIES_S = 25.0, 2.0


class Bench:
    """One run at one dimension."""

    def __init__(self, options: argparse.Namespace, servers: list[Server]) -> None:
        self.options, self.servers = options, servers
        self.labels = [server.label for server in servers]
        self.rows: list[Row] = []
        # Phase, label, CPU cores the server used (None: unknown), cores this client used.
        self.cores: list[tuple[str, str, float | None, float]] = []
        self.start_s = time.perf_counter()

    def log(self, *words: object) -> None:
        print(f"[{time.perf_counter() - self.start_s:6.1f}s]", *words, file=sys.stderr, flush=True)

    def order(self, round_number: int) -> list[Server]:
        """Return A B, B A, A B, ...: neither is always the one that runs second."""
        return self.servers if round_number % 2 == 0 else self.servers[::-1]

    def row(
        self,
        group: str,
        metric: str,
        unit: str,
        better: str,
        values: dict[str, float],
        n: int | None = None,
    ) -> None:
        """Note one metric. n: least number of samples behind it, where that matters."""
        self.rows.append(Row(group, metric, unit, better, values, n))
        said = "  ".join(f"{label}={shown(value)}" for label, value in values.items())
        self.log(f"{group} | {metric}: {said} {unit}")

    def note_cores(self, phase: str, parts: dict[str, Slice]) -> None:
        """Note how many cores servers and client used in a phase."""
        for label, part in parts.items():
            if part.wall_s:
                spent_s = part.wall_s + part.drain_s
                server = round(part.server_cpu_s / spent_s, 2) if part.server_cpu_s else None
                self.cores.append((phase, label, server, round(part.client_cpu_s / part.wall_s, 2)))

    def cpu_row(
        self, group: str, metric: str, unit: str, parts: dict[str, Slice], scale: float
    ) -> None:
        """Note server CPU per operation: it hardly moves when others load the machine."""
        known = {label: part for label, part in parts.items() if part.server_cpu_s}
        if known:
            per_operation = {
                label: scale * part.server_cpu_s / max(1, part.count)
                for label, part in known.items()
            }
            self.row(group, metric, unit, "low", per_operation)

    def timed(
        self,
        group: str,
        name: str,
        requests: dict[str, list[bytes]],
        threads: int,
        wanted: Wanted | None = None,
        recall_name: str | None = None,
    ) -> None:
        """Send each server its requests for a while, in alternating slices; note the figures."""
        parts = {label: Slice() for label in self.labels}
        offset = dict.fromkeys(self.labels, 0)
        # Warm up; servers may need seconds to spread a crowd over threads or processes.
        warm_s = self.options.warm if threads == 1 else self.options.warm_many
        for server in self.servers:
            run_threads(server, threads, repeat(requests[server.label], warm_s, None))
        for number in range(self.options.rounds):
            for server in self.order(number):
                part = parts[server.label]
                keep = part.bodies if wanted else None
                worker = repeat(
                    requests[server.label], self.options.slice, keep, offset[server.label]
                )
                part.add(*run_threads(server, threads, worker))
                done = part.rates[-1] * self.options.slice / threads
                offset[server.label] += max(1, int(done))
        self.note_cores(f"{group} {name} c{threads}", parts)
        head = f"{name} c={threads}"
        self.cpu_row(group, f"{head} server CPU", "ms/op", parts, 1e3)
        qps = {label: statistics.median(part.rates) for label, part in parts.items()}
        self.row(group, f"{head} QPS", "/s", "high", qps)
        fast = group in ("query", "spaces", "target")
        for percent in (50, 95, 99) if fast or threads == 1 else (50, 95):
            latency = {label: part.percentile_ms(percent) for label, part in parts.items()}
            self.row(group, f"{head} p{percent}", "ms", "low", latency)
        if wanted:
            # Compared over the queries that both answered: two recalls over different queries
            # differ by chance.
            self._top_up(parts, requests)
            answers = {label: part.bodies for label, part in parts.items()}
            both = in_common(answers)
            found = {label: recall(bodies, wanted) for label, bodies in both.items()}
            samples = len(next(iter(both.values())))
            name = recall_name or f"{name} recall@{NEAREST}"
            self.row(group, name, "", "eq", found, samples)
            if any(len(bodies) > samples for bodies in answers.values()):
                found = {label: recall(bodies, wanted) for label, bodies in answers.items()}
                samples = min(len(bodies) for bodies in answers.values())
                self.row(group, f"{name}, all asked", "", "eq", found, samples)

    def _top_up(self, parts: dict[str, Slice], requests: dict[str, list[bytes]]) -> None:
        """Untimed: recall must not rest on the handful of queries that a slow phase managed.

        A server that needs long is asked until there are RECALL_QUERIES_MIN answers; one that
        can, answers every query within ALL_QUERIES_S.
        """
        for server in self.servers:
            bodies, connection = parts[server.label].bodies, Connection(server.url)
            start_s = time.perf_counter()
            for i, request in enumerate(requests[server.label]):
                enough = len(bodies) >= RECALL_QUERIES_MIN
                if time.perf_counter() - start_s > (ALL_QUERIES_S if enough else RECALL_LIMIT_S):
                    break
                if i not in bodies:
                    status, body = connection.send(request)
                    check(status, body, "query")
                    bodies[i] = body
            connection.close()

    def query_requests(
        self,
        data: Data,
        collections: dict[str, str],
        numbers: Sequence[int],
        where: Any = None,
        where_document: Any = None,
        with_extra: bool = False,
    ) -> dict[str, list[bytes]]:
        """Return, per server, the bytes of the queries of so many vectors.

        with_extra: with the fields that only one of the servers is to get.
        """
        out: dict[str, list[bytes]] = {}
        for server in self.servers:
            extra = server.query_extra if with_extra else None
            bodies = [data.query(i, where, where_document, extra) for i in numbers]
            out |= self.requests(collections, "query", bodies, [server])
        return out

    def requests(
        self,
        collections: dict[str, str],
        verb: str,
        bodies: Sequence[bytes],
        servers: Sequence[Server] | None = None,
    ) -> dict[str, list[bytes]]:
        """Return, per server, the bytes of POST requests with these bodies."""
        return {
            server.label: [
                server.connection.build("POST", f"{ROOT}/{collections[server.label]}/{verb}", body)
                for body in bodies
            ]
            for server in servers or self.servers
        }

    def load(
        self,
        data: Data,
        name: str,
        n: int,
        configuration: Callable[[Server], dict[str, Any] | None] = lambda _: None,
        x: Floats | None = None,
    ) -> dict[str, str]:
        """Untimed: put the first n records (vectors x instead of the data's) into new collections.

        Returns the collections' ids by label, indexed on every server.
        """
        collections, bodies = {}, {}
        for server in self.servers:
            if server.base64 not in bodies:
                bodies[server.base64] = data.batches(n, server.base64, x)
            collection = server.fresh(name, configuration(server))
            path = f"{ROOT}/{collection}/add"
            writes = [server.connection.build("POST", path, body) for body in bodies[server.base64]]
            run_threads(server, 2, send_all(writes))
            server.drain(collection)
            collections[server.label] = collection
        return collections

    def drop(self, *names: str) -> None:
        for server in self.servers:
            for name in names:
                server.drop(name)


def in_common(answers: dict[str, dict[int, bytes]]) -> dict[str, dict[int, bytes]]:
    """Return, per server, its answers to the queries that all of them answered."""
    numbers = set.intersection(*(set(bodies) for bodies in answers.values()))
    return {label: {i: bodies[i] for i in numbers} for label, bodies in answers.items()}


def recall(bodies: dict[int, bytes], wanted: Wanted) -> float:
    """Return the share of the exact answers' rows that the answers hold."""
    hits = total = 0
    for number, body in bodies.items():
        rows = wanted(number)
        got = {int(one[3:]) for one in orjson.loads(body)["ids"][0] if one.startswith("id-")}
        hits += len(got & rows)
        total += len(rows)
    return hits / total if total else float("nan")
