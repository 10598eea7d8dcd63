"""A collection in use: mixed writes and reads, read-your-writes, many collections, cold start."""

from __future__ import annotations

import shlex
import statistics
import subprocess
import time

import numpy as np
import orjson

from .bench import Bench
from .data import NEAREST, Data, Floats, encode
from .http_client import Connection, check
from .servers import ROOT, Server
from .slices import Latencies, Slice, Worker, run_threads

Collections = dict[str, str]  # Label of a server -> id of its collection.
MIX_WORKERS = 4
MIX_PLAN = 400  # Operations that a slice cycles over.
MANY_RECORDS, MANY_DIM, MANY_STEP = 100, 128, 25


def mix(bench: Bench, data: Data, collections: Collections) -> None:
    """Four workers: 60 % upserts of ten, 20 % deletes of ten, 20 % queries."""
    kinds = ("upsert", "delete", "query")
    parts = {label: {kind: Slice() for kind in ("all", *kinds)} for label in bench.labels}
    for number in range(bench.options.rounds):
        for server in bench.order(number):
            collection = collections[server.label]
            plan = mix_plan(server, data, collection, 100 + number)
            # At least two seconds: one operation can take 0.2 s.
            end_s = time.perf_counter() + max(2.0, bench.options.slice * 1.5)
            by_kind: dict[str, Latencies] = {kind: [] for kind in kinds}
            worker = mix_worker(plan, end_s, by_kind)
            latencies, wall_s, server_s, client_s = run_threads(server, MIX_WORKERS, worker)
            drain_s, drain_cpu_s = server.drain(collection)
            whole = parts[server.label]["all"]
            whole.add(latencies, wall_s, server_s + drain_cpu_s, client_s)
            whole.drain_s += drain_s
            for kind, some in by_kind.items():
                parts[server.label][kind].latencies_s += some
    every = {label: part["all"] for label, part in parts.items()}
    rate = {label: statistics.median(part.rates) for label, part in every.items()}
    name = f"60% upsert10 / 20% delete10 / 20% query, c={MIX_WORKERS}"
    bench.row("mix", name, "ops/s", "high", rate)
    bench.cpu_row("mix", "server CPU", "ms/op", every, 1e3)
    for kind in kinds:
        for percent in (50, 95):
            values = {label: part[kind].percentile_ms(percent) for label, part in parts.items()}
            bench.row("mix", f"{kind} p{percent}", "ms", "low", values)
    bench.note_cores("mix", every)


def mix_plan(server: Server, data: Data, collection: str, seed: int) -> list[tuple[str, bytes]]:
    """Return kinds and request bytes of a slice, the same for every server but for its encoding."""
    rng = np.random.default_rng(seed)
    path = f"{ROOT}/{collection}"
    plan = []
    for _ in range(MIX_PLAN):
        rows = list(dict.fromkeys(rng.integers(0, data.n, 10).tolist()))
        ids = [data.ids[i] for i in rows]
        chance = rng.random()
        if chance < 0.6:
            kind = "upsert"
            vectors = data.x[rng.integers(0, data.n, len(rows))]
            body = orjson.dumps(
                {
                    "ids": ids,
                    "embeddings": encode(vectors, server.base64),
                    "metadatas": [data.metadata(i) for i in rows],
                    "documents": [data.documents[i] for i in rows],
                }
            )
        elif chance < 0.8:
            kind, body = "delete", orjson.dumps({"ids": ids})
        else:
            kind, body = "query", data.query(int(rng.integers(0, data.query_count)))
        plan.append((kind, server.connection.build("POST", f"{path}/{kind}", body)))
    return plan


def mix_worker(
    plan: list[tuple[str, bytes]], end_s: float, by_kind: dict[str, Latencies]
) -> Worker:
    def worker(connection: Connection, number: int, latencies_s: Latencies) -> None:
        i = number * (MIX_PLAN // MIX_WORKERS)
        while (start_s := time.perf_counter()) < end_s:
            kind, request = plan[i % MIX_PLAN]
            answer = connection.send(request)
            seconds = time.perf_counter() - start_s
            check(*answer, kind)
            latencies_s.append(seconds)
            by_kind[kind].append(seconds)
            i += 1

    return worker


def read_your_writes(bench: Bench, data: Data, collections: Collections) -> None:
    """Add one record, query until it is the nearest: how long, and how many answers lacked it."""
    run = time.perf_counter_ns()  # New ids and vectors on each run.
    rng = np.random.default_rng(run)
    acks: dict[str, Latencies] = {label: [] for label in bench.labels}
    visible: dict[str, Latencies] = {label: [] for label in bench.labels}
    stale = dict.fromkeys(bench.labels, 0)
    for number in range(10 if bench.options.quick else 25):
        vector = rng.standard_normal((1, data.dim)).astype(np.float32)
        vector /= np.linalg.norm(vector)
        record = f"ryw-{run}-{number}"
        for server in bench.order(number):
            path = f"{ROOT}/{collections[server.label]}"
            record_body = {
                "ids": [record],
                "embeddings": encode(vector, server.base64),
                "metadatas": [{"num": -1}],
                "documents": ["ryw"],
            }
            query_body = {"query_embeddings": vector.tolist(), "n_results": 1, "include": []}
            build = server.connection.build
            write = build("POST", f"{path}/add", orjson.dumps(record_body))
            query = build("POST", f"{path}/query", orjson.dumps(query_body))
            start_s = time.perf_counter()
            answer = server.connection.send(write)
            ack_s = time.perf_counter()
            check(*answer, "add")
            acks[server.label].append(ack_s - start_s)
            while True:
                body = server.connection.send(query)[1]
                if orjson.loads(body)["ids"][0][:1] == [record]:
                    break
                stale[server.label] += 1
                if time.perf_counter() - ack_s > 10:
                    break
            visible[server.label].append(time.perf_counter() - ack_s)
    ack = {label: 1e3 * statistics.median(some) for label, some in acks.items()}
    middle = {label: 1e3 * statistics.median(some) for label, some in visible.items()}
    longest = {label: 1e3 * max(some) for label, some in visible.items()}
    bench.row("ryw", "single add ack p50", "ms", "low", ack)
    bench.row("ryw", "ack -> visible p50", "ms", "low", middle)
    bench.row("ryw", "ack -> visible max", "ms", "low", longest)
    bench.row("ryw", "stale answers", "", "low", {k: float(v) for k, v in stale.items()})


def many(bench: Bench, data: Data) -> None:
    """Many small collections: create and fill them, then query some for the first time."""
    m = bench.options.many
    rng = np.random.default_rng(31)
    x = rng.standard_normal((m, MANY_RECORDS, MANY_DIM)).astype(np.float32)
    x /= np.linalg.norm(x, axis=2, keepdims=True)
    parts = {label: Slice() for label in bench.labels}
    ids: dict[str, dict[int, str]] = {label: {} for label in bench.labels}
    rss_before = {server.label: server.rss() / 1e6 for server in bench.servers}
    for number, start in enumerate(range(0, m, MANY_STEP)):
        for server in bench.order(number):
            some = range(start, min(m, start + MANY_STEP))
            for j in some:
                server.drop(f"bench_many_{j}")
            bodies = {j: data.batch(0, MANY_RECORDS, server.base64, x[j], f"m{j}-") for j in some}
            worker = many_worker(bodies, ids[server.label])
            parts[server.label].add(*run_threads(server, 1, worker))
    for server in bench.servers:  # Of the last one only: asking each could load it.
        server.drain(ids[server.label][m - 1])
    time.sleep(1)
    pick = rng.permutation(m)[:100].tolist()
    first_s, right = first_queries(bench, ids, x, pick)
    rate = {label: part.count / part.wall_s for label, part in parts.items()}
    bench.row("many", f"create + add {MANY_RECORDS}", "collections/s", "high", rate, m)
    name = f"create + add {MANY_RECORDS}: server CPU"
    bench.cpu_row("many", name, "ms/collection", parts, 1e3)
    for percent in (50, 99):
        values = {label: 1e3 * float(np.percentile(v, percent)) for label, v in first_s.items()}
        bench.row("many", f"first query p{percent}", "ms", "low", values, len(pick))
    found = {label: count / len(pick) for label, count in right.items()}
    bench.row("many", "first query finds its record", "", "eq", found, len(pick))
    if any(server.pid for server in bench.servers):
        rss_after = {server.label: server.rss() / 1e6 for server in bench.servers}
        bench.row("many", "RSS before", "MB", "low", rss_before)
        bench.row("many", "RSS after", "MB", "low", rss_after)
    bench.note_cores("many", parts)
    bench.drop(*(f"bench_many_{j}" for j in range(m)))


def many_worker(bodies: dict[int, bytes], ids: dict[int, str]) -> Worker:
    def worker(connection: Connection, _: int, latencies_s: Latencies) -> None:
        for j, body in bodies.items():
            start_s = time.perf_counter()
            ids[j] = connection.call("POST", ROOT, {"name": f"bench_many_{j}"})["id"]
            check(*connection.send(connection.build("POST", f"{ROOT}/{ids[j]}/add", body)), "add")
            latencies_s.append(time.perf_counter() - start_s)

    return worker


def first_queries(
    bench: Bench, ids: dict[str, dict[int, str]], x: Floats, pick: list[int]
) -> tuple[dict[str, Latencies], dict[str, int]]:
    """Return, per server, the seconds of each first query and how many found their record."""
    seconds: dict[str, Latencies] = {label: [] for label in bench.labels}
    right = dict.fromkeys(bench.labels, 0)
    for start in range(0, len(pick), 10):
        for server in bench.order(start // 10):
            for j in pick[start : start + 10]:
                query = {
                    "query_embeddings": [x[j][7].tolist()],
                    "n_results": NEAREST,
                    "include": ["metadatas", "distances"],
                }
                path = f"{ROOT}/{ids[server.label][j]}/query"
                request = server.connection.build("POST", path, orjson.dumps(query))
                start_s = time.perf_counter()
                status, body = server.connection.send(request)
                seconds[server.label].append(time.perf_counter() - start_s)
                check(status, body, "query")
                right[server.label] += orjson.loads(body)["ids"][0][:1] == [f"m{j}-{7:08d}"]
    return seconds, right


def cold(bench: Bench, data: Data, collection_name: str) -> None:
    """From the start of the process to its first answered query; three starts, page cache warm."""
    commands = dict(
        zip(bench.labels, (bench.options.cold_cmd_a, bench.options.cold_cmd_b), strict=False)
    )
    listening: dict[str, list[float]] = {label: [] for label in bench.labels}
    answered: dict[str, list[float]] = {label: [] for label in bench.labels}
    for _ in range(3):
        for server in bench.servers:
            if commands[server.label]:
                up_s, first_s = one_start(server, commands[server.label], collection_name, data)
                listening[server.label].append(up_s)
                answered[server.label].append(first_s)
    for metric, times in (("start -> listening", listening), ("start -> first query", answered)):
        values = {label: 1e3 * statistics.median(some) for label, some in times.items() if some}
        bench.row("cold", metric, "ms", "low", values)


def one_start(server: Server, command: str, name: str, data: Data) -> tuple[float, float]:
    """Start, query once, stop; return seconds until the server listens and until it answers."""
    try:
        Connection(server.url).open().close()
    except OSError:
        pass  # As it should be.
    else:
        raise SystemExit(f"cold: {server.url} is being served already; stop that server first")
    start_s = time.perf_counter()
    process = subprocess.Popen(
        shlex.split(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            connection = Connection(server.url)
            try:
                collection = connection.call("GET", f"{ROOT}/{name}")["id"]
                break
            except (OSError, RuntimeError):
                if time.perf_counter() - start_s > 120 or process.poll() is not None:
                    raise
                time.sleep(0.005)
            finally:
                connection.close()
        up_s = time.perf_counter() - start_s
        path = f"{ROOT}/{collection}/query"
        check(*server.connection.send(server.connection.build("POST", path, data.query(0))), path)
        first_s = time.perf_counter() - start_s
        server.connection.close()
        return up_s, first_s
    finally:
        process.terminate()
        process.wait(30)
