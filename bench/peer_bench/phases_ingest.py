"""Writing in slices: acknowledged, queryable; memory and disk; queries while others write."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time

import numpy as np

from .bench import Bench
from .data import BATCH, Data
from .http_client import Connection, check
from .servers import ROOT, Server
from .slices import Latencies, Slice, Worker, paced, repeat, run_threads, send_all

Collections = dict[str, str]  # Label of a server -> id of its collection.
WRITERS_UNDER_LOAD = 4
RETRY_PAUSE_S = 0.1


def ingest(
    bench: Bench, data: Data, n: int, writers: int, name: str, base64_encoded: bool | None = None
) -> Collections:
    """Write the first n records into fresh collections, in alternating pieces; return their ids.

    base64_encoded: None leaves the encoding to what each server takes. "until queryable" adds the
    first query, because a server may build its index only then.
    """
    collections, first_query_s = {}, {}
    parts = {label: Slice() for label in bench.labels}
    refused_s: dict[str, Latencies] = {label: [] for label in bench.labels}
    bodies: dict[bool, list[bytes]] = {}
    encoding = {
        server.label: server.base64 if base64_encoded is None else base64_encoded
        for server in bench.servers
    }
    for server in bench.servers:
        if encoding[server.label] not in bodies:
            bodies[encoding[server.label]] = data.batches(n, encoding[server.label])
        collections[server.label] = server.fresh(name)
    batches = -(-n // BATCH)
    piece = max(writers, -(-batches // bench.options.ingest_rounds))
    for number, start in enumerate(range(0, batches, piece)):
        for server in bench.order(number):
            label = server.label
            path = f"{ROOT}/{collections[label]}"
            work = bodies[encoding[label]][start : start + piece]
            requests = [server.connection.build("POST", path + "/add", body) for body in work]
            count = min(n, (start + len(work)) * BATCH) - start * BATCH
            worker = send_all(requests, refused_s[label])
            latencies, wall_s, server_s, client_s = run_threads(server, writers, worker)
            if start + piece >= batches:  # At once: a later query would find the work done.
                first_query_s[label] = one_query(server, path, data)
            drain_s, drain_cpu_s = server.drain(collections[label])
            parts[label].add(latencies, wall_s, server_s + drain_cpu_s, client_s, count)
            parts[label].drain_s += drain_s
    said = "auto" if base64_encoded is None else "b64" if base64_encoded else "json"
    head = f"{writers} writer{'s' if writers > 1 else ''} ({said})"
    acknowledged = {label: part.count / part.wall_s for label, part in parts.items()}
    queryable = {
        label: part.count / (part.wall_s + first_query_s[label]) for label, part in parts.items()
    }
    first = {label: 1e3 * seconds for label, seconds in first_query_s.items()}
    bench.row("ingest", f"{head}: acked", "rec/s", "high", acknowledged)
    bench.row("ingest", f"{head}: until queryable", "rec/s", "high", queryable)
    bench.row("ingest", f"{head}: first query after", "ms", "low", first)
    bench.cpu_row("ingest", f"{head}: server CPU", "us/rec", parts, 1e6)
    for percent in (50, 95):
        latency = {label: part.percentile_ms(percent) for label, part in parts.items()}
        bench.row("ingest", f"{head}: batch p{percent}", "ms", "low", latency)
    refused = {label: float(len(some)) for label, some in refused_s.items()}
    bench.row("ingest", f"{head}: 429 answers", "", "low", refused)
    bench.note_cores(f"ingest {head}", parts)
    return collections


def one_query(server: Server, path: str, data: Data) -> float:
    """Return the seconds that one query takes on a connection of its own."""
    connection = Connection(server.url).open()
    request = connection.build("POST", path + "/query", data.query(0))
    start_s = time.perf_counter()
    answer = connection.send(request)
    seconds = time.perf_counter() - start_s
    connection.close()
    check(*answer, "query")
    return seconds


def footprint(bench: Bench, when: str) -> None:
    """Memory by process id and disk by directory; compare fresh servers only."""
    if any(server.pid for server in bench.servers):
        rss = {server.label: server.rss() / 1e6 for server in bench.servers}
        bench.row("footprint", f"RSS {when}", "MB", "low", rss)
    if any(server.directory for server in bench.servers):
        disk = {server.label: server.disk() / 1e6 for server in bench.servers}
        bench.row("footprint", f"disk {when}", "MB", "low", disk)


@dataclasses.dataclass
class Load:
    """What one server did under a fixed offer of writes and queries."""

    idle: Slice = dataclasses.field(default_factory=Slice)
    queries: Slice = dataclasses.field(default_factory=Slice)  # Latency from the due time.
    answers: Slice = dataclasses.field(default_factory=Slice)  # Latency from the send.
    writes: Slice = dataclasses.field(default_factory=Slice)
    answered: int = 0
    refused: int = 0  # 429
    errors: int = 0


def under_ingest(bench: Bench, data: Data) -> None:
    """One client's queries, open loop, first alone and then while four writers offer records.

    A writer that is late sends at once, and repeats a batch a little after a 429. One connection
    carries the queries: a server that needs longer than their period falls behind, and its
    latencies then grow with the length of the slice; look at "answered queries".
    """
    options = bench.options
    name = f"bench{data.dim}_under"
    collections = bench.load(data, name, data.n)
    requests = bench.query_requests(data, collections, range(data.query_count))
    loads = {label: Load() for label in bench.labels}
    batches = int(options.offered * options.under_s) // BATCH + 1
    rng = np.random.default_rng(17)
    for number in range(2):
        x = data.x[rng.integers(0, data.n, batches * BATCH)]
        x += rng.standard_normal(x.shape).astype(np.float32) * (0.3 / data.dim**0.5)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        bodies = {
            encoded: [
                data.batch(j * BATCH, (j + 1) * BATCH, encoded, x, f"under{number}-")
                for j in range(batches)
            ]
            for encoded in {server.base64 for server in bench.servers}
        }
        for server in bench.order(number):
            path = f"{ROOT}/{collections[server.label]}/add"
            writes = [server.connection.build("POST", path, body) for body in bodies[server.base64]]
            one_load(bench, server, loads[server.label], requests[server.label], writes)
            server.drain(collections[server.label], 300)
    report_load(bench, loads)
    bench.drop(name)


def one_load(
    bench: Bench, server: Server, load: Load, queries: list[bytes], writes: list[bytes]
) -> None:
    """One slice: queries alone for a third of the time, then queries and writes together."""
    options, seconds = bench.options, bench.options.under_s
    run_threads(server, 1, repeat(queries, options.warm, None))
    connection = Connection(server.url).open()
    begin_s = time.perf_counter() + 0.05
    errors = paced(
        connection, queries, options.qrate, begin_s, seconds / 3, load.idle.latencies_s, []
    )[1]
    load.errors += errors
    start_s = time.perf_counter() + 0.1
    done_s: list[float] = []
    answers_s: Latencies = []
    write = offered_writes(load, writes, options.offered, start_s, start_s + seconds, done_s)

    def worker(own: Connection, number: int, latencies_s: Latencies) -> None:
        if number < WRITERS_UNDER_LOAD:
            write(own, number, latencies_s)
            return
        waited = load.queries.latencies_s
        answered, bad = paced(
            connection, queries, options.qrate, start_s, seconds, waited, answers_s
        )
        load.answered += answered
        load.errors += bad

    latencies, _, server_s, client_s = run_threads(server, WRITERS_UNDER_LOAD + 1, worker)
    connection.close()
    load.answers.latencies_s += answers_s
    wall_s = max([seconds, *(end - start_s for end in done_s)])
    load.writes.add(latencies, wall_s, server_s, client_s, len(done_s) * BATCH)


def offered_writes(
    load: Load,
    writes: list[bytes],
    offered: float,
    start_s: float,
    end_s: float,
    done_s: list[float],
) -> Worker:
    """Return a worker whose threads together offer so many records a second until the end."""
    numbers, lock = itertools.count(), threading.Lock()

    def worker(connection: Connection, _: int, latencies_s: Latencies) -> None:
        while True:
            with lock:
                j = next(numbers)
            due_s = start_s + j * BATCH / offered
            if j >= len(writes) or due_s >= end_s:
                return
            time.sleep(max(0.0, due_s - time.perf_counter()))
            while (sent_s := time.perf_counter()) < end_s:
                status = connection.send(writes[j])[0]
                now_s = time.perf_counter()
                if status < 300:
                    latencies_s.append(now_s - sent_s)
                    done_s.append(now_s)
                    break
                with lock:
                    if status == 429:
                        load.refused += 1
                    else:
                        load.errors += 1
                time.sleep(RETRY_PAUSE_S)

    return worker


def report_load(bench: Bench, loads: dict[str, Load]) -> None:
    group, seconds = "under_ingest", 2 * bench.options.under_s
    idle_n = min(len(load.idle.latencies_s) for load in loads.values())
    busy_n = min(len(load.queries.latencies_s) for load in loads.values())
    for metric, part, n in (
        ("idle knn p{}", "idle", idle_n),
        ("knn p{} under ingest", "queries", busy_n),
        ("knn answer time p{} under ingest", "answers", None),
    ):
        for percent in (50, 99):
            values = {
                label: getattr(load, part).percentile_ms(percent) for label, load in loads.items()
            }
            bench.row(group, metric.format(percent), "ms", "low", values, n)
    answered = {label: load.answered / seconds for label, load in loads.items()}
    written = {label: load.writes.count / load.writes.wall_s for label, load in loads.items()}
    batch = {label: load.writes.percentile_ms(50) for label, load in loads.items()}
    refused = {label: float(load.refused) for label, load in loads.items()}
    errors = {label: float(load.errors) for label, load in loads.items()}
    bench.row(group, "answered queries", "/s", "high", answered)
    bench.row(group, "achieved ingest", "rec/s", "high", written)
    bench.row(group, "write batch p50", "ms", "low", batch)
    bench.row(group, "429 answers", "", "low", refused)
    bench.row(group, "other errors", "", "low", errors)
    bench.note_cores(group, {label: load.writes for label, load in loads.items()})
