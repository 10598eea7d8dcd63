"""A collection in use: mixed writes and reads, read-your-writes, single adds, cold start."""

from __future__ import annotations

import shlex
import statistics
import subprocess
import time

import numpy as np
import orjson

from .bench import Bench
from .data import BATCH, Data, encode
from .http_client import Connection, check
from .servers import ROOT, Server
from .slices import Latencies, Slice, Worker, run_threads

Collections = dict[str, str]  # Label of a server -> id of its collection.
MIX_WORKERS = 4
MIX_PLAN = 400  # Operations that a slice cycles over.
# Adds on an idle machine: of a turn; seconds before its first, and before each.
IDLE_ADDS, IDLE_FIRST_S, IDLE_REST_S = 15, 4.0, 0.2


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


def idle_adds(bench: Bench, data: Data) -> None:
    """Add records to a new collection, a request at a time, each after a rest: nothing else runs.

    Each server has its turns as a whole, which begin some seconds after the other's. With too few
    records for two adds nothing is measured.
    """
    if data.n < 2 * BATCH:
        return
    name = f"bench{data.dim}_idle"
    acks: dict[str, Latencies] = {label: [] for label in bench.labels}
    collections = {server.label: server.fresh(name) for server in bench.servers}
    adds = min(IDLE_ADDS, data.n // BATCH // 2)
    for turn in range(2):
        for server in bench.order(turn):
            path = f"{ROOT}/{collections[server.label]}/add"
            time.sleep(IDLE_FIRST_S)
            for number in range(turn * adds, (turn + 1) * adds):
                body = data.batch(number * BATCH, (number + 1) * BATCH, server.base64)
                request = server.connection.build("POST", path, body)
                time.sleep(IDLE_REST_S)
                start_s = time.perf_counter()
                answer = server.connection.send(request)
                acks[server.label].append(time.perf_counter() - start_s)
                check(*answer, "add")
    bench.drop(name)
    ack = {label: 1e3 * statistics.median(some) for label, some in acks.items()}
    bench.row("ryw", f"add of {BATCH} ack p50", "ms", "low", ack)


def cold(bench: Bench, data: Data, collection_name: str) -> None:
    """From the start of the process to its first answered query; page cache warm."""
    commands = dict(
        zip(bench.labels, (bench.options.cold_cmd_a, bench.options.cold_cmd_b), strict=False)
    )
    listening: dict[str, list[float]] = {label: [] for label in bench.labels}
    answered: dict[str, list[float]] = {label: [] for label in bench.labels}
    for number in range(bench.options.cold_rounds):
        for server in bench.order(number):
            if commands[server.label]:
                up_s, first_s = one_start(server, commands[server.label], collection_name, data)
                listening[server.label].append(up_s)
                answered[server.label].append(first_s)
    for metric, times in (("start -> listening", listening), ("start -> first query", answered)):
        values = {label: 1e3 * statistics.median(some) for label, some in times.items() if some}
        starts = min(len(some) for some in times.values() if some)
        bench.row("cold", metric, "ms", "low", values, starts)


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
