"""Many small collections in one server: created and filled, each queried for the first time."""

from __future__ import annotations

import itertools
import time

import numpy as np
import orjson

from .bench import Bench
from .data import NEAREST, Data, Floats
from .http_client import Connection, check
from .servers import ROOT, Server
from .slices import Latencies, Slice, Worker, run_threads

MANY_RECORDS, MANY_DIM = 100, 128
STEPS = 20  # The servers take turns so many times, whatever their numbers of collections.
SEED = 31
ASKED_ROW = 7  # The record of each collection that its query is for.


def vectors(number: int) -> Floats:
    """Return the unit vectors of a collection, float32[MANY_RECORDS, MANY_DIM]."""
    rng = np.random.default_rng([SEED, number])
    x: Floats = rng.standard_normal((MANY_RECORDS, MANY_DIM)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def turns(numbers: range, count: int) -> list[range]:
    """Return `count` adjoining pieces of almost equal length; empty ones if there are too few."""
    edges = [len(numbers) * i // count for i in range(count + 1)]
    return [numbers[start:stop] for start, stop in itertools.pairwise(edges)]


def many(bench: Bench, data: Data) -> None:
    """Create and fill the collections in turns, then ask each of them once."""
    m = bench.options.many
    counts = dict(zip(bench.labels, (m, bench.options.many_b or m), strict=False))
    creating = {label: turns(range(count), STEPS) for label, count in counts.items()}
    parts = {label: Slice() for label in bench.labels}
    ids: dict[str, dict[int, str]] = {label: {} for label in bench.labels}
    has_processes = any(server.pid for server in bench.servers)
    memory = {server.label: [server.rss() / 1e6] for server in bench.servers}
    for turn in range(STEPS):
        for server in bench.order(turn):
            label = server.label
            if not (some := creating[label][turn]):
                continue
            for j in some if bench.options.keep is False else ():
                server.drop(f"bench_many_{j}")
            bodies = {
                j: data.batch(0, MANY_RECORDS, server.base64, vectors(j), f"m{j}-") for j in some
            }
            parts[label].add(*run_threads(server, 1, many_worker(bodies, ids[label])))
            memory[label].append(server.rss() / 1e6)
    for server in bench.servers:  # Of the last one only: asking each could load it.
        server.drain(ids[server.label][counts[server.label] - 1])
    time.sleep(1)
    first_s, right = first_queries(bench, counts, ids, memory)
    least = min(counts.values())
    rate = {label: part.count / part.wall_s for label, part in parts.items()}
    bench.row("many", f"create + add {MANY_RECORDS}", "collections/s", "high", rate, least)
    name = f"create + add {MANY_RECORDS}: server CPU"
    bench.cpu_row("many", name, "ms/collection", parts, 1e3)
    for percent, word in ((50, "p50"), (99, "p99"), (100, "max")):
        values = {label: 1e3 * float(np.percentile(v, percent)) for label, v in first_s.items()}
        bench.row("many", f"first query {word}", "ms", "low", values, least)
    found = {label: count / counts[label] for label, count in right.items()}
    bench.row("many", "first query finds its record", "", "eq", found, least)
    number = {label: float(count) for label, count in counts.items()}
    bench.row("many", "collections", "", "eq", number)
    if has_processes:
        for when, pick in (("before", 0), ("after", -1)):
            values = {label: some[pick] for label, some in memory.items()}
            bench.row("many", f"RSS {when}", "MB", "low", values)
        bench.row("many", "RSS highest", "MB", "low", {k: max(v) for k, v in memory.items()})
        per_collection = {k: (v[-1] - v[0]) * 1e3 / counts[k] for k, v in memory.items()}
        bench.row("many", "RSS per collection", "kB", "low", per_collection)
    bench.note_cores("many", parts)
    if not bench.options.keep:
        for server in bench.servers:
            for j in range(counts[server.label]):
                server.drop(f"bench_many_{j}")


def many_worker(bodies: dict[int, bytes], ids: dict[int, str]) -> Worker:
    """Return a worker that creates and fills these collections and notes their ids."""

    def worker(connection: Connection, _: int, latencies_s: Latencies) -> None:
        for j, body in bodies.items():
            start_s = time.perf_counter()
            ids[j] = connection.call("POST", ROOT, {"name": f"bench_many_{j}"})["id"]
            check(*connection.send(connection.build("POST", f"{ROOT}/{ids[j]}/add", body)), "add")
            latencies_s.append(time.perf_counter() - start_s)

    return worker


def first_queries(
    bench: Bench,
    counts: dict[str, int],
    ids: dict[str, dict[int, str]],
    memory: dict[str, list[float]],
) -> tuple[dict[str, Latencies], dict[str, int]]:
    """Return, per server, the seconds of each first query and how many found their record.

    Every collection is asked, in an order that has nothing to do with that of creation; `memory`
    gets the resident megabytes after each turn.
    """
    rng = np.random.default_rng(SEED)
    orders = {label: rng.permutation(count).tolist() for label, count in counts.items()}
    asking = {label: turns(range(count), STEPS) for label, count in counts.items()}
    seconds: dict[str, Latencies] = {label: [] for label in bench.labels}
    right = dict.fromkeys(bench.labels, 0)
    for turn in range(STEPS):
        for server in bench.order(turn):
            label = server.label
            for j in (orders[label][i] for i in asking[label][turn]):
                taken_s, hit = first_query(server, ids[label][j], j)
                seconds[label].append(taken_s)
                right[label] += hit
            memory[label].append(server.rss() / 1e6)
    return seconds, right


def first_query(server: Server, collection: str, number: int) -> tuple[float, bool]:
    """Return the seconds of one query, and whether it found the record whose vector it holds."""
    query = {
        "query_embeddings": [vectors(number)[ASKED_ROW].tolist()],
        "n_results": NEAREST,
        "include": ["metadatas", "distances"],
    }
    path = f"{ROOT}/{collection}/query"
    request = server.connection.build("POST", path, orjson.dumps(query))
    start_s = time.perf_counter()
    status, body = server.connection.send(request)
    taken_s = time.perf_counter() - start_s
    check(status, body, "query")
    return taken_s, orjson.loads(body)["ids"][0][:1] == [f"m{number}-{ASKED_ROW:08d}"]
