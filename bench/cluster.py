"""What the distributed form costs: latencies of a cluster of real processes on this machine.

    make bench-cluster                       (a few minutes; wants a quiet machine)
    .venv/bin/python bench/cluster.py --quick

PostgreSQL, Ceph RGW, Redis and two processes of each role, as tests/distributed starts them. One
client, one request at a time, over a kept connection to one frontend. Prints a table, and keeps it
in bench/results/cluster.json; a bar that is missed is no error.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.distributed.cluster import Cluster, Components, Shape  # noqa: E402
from tests.distributed.members import Commands  # noqa: E402

from ochredb_node.config import NodeConfig  # noqa: E402
from ochredb_node.node import Node  # noqa: E402

COLLECTIONS = "/api/v2/tenants/default_tenant/databases/default_database/collections"
RESULTS = ROOT / "bench" / "results" / "cluster.json"
DIMENSION = 128
_BATCH = 1_000
_INDEXED_S_MAX = 300.0
Request = Callable[[str, str, Any], Any]


@dataclass(frozen=True)
class Figure:
    """Milliseconds. bar: the most that `value` may be; None: only shown."""

    name: str
    value: float
    bar: float | None = None
    p99: float | None = None
    count: int = 0

    def row(self) -> str:
        said = "" if self.bar is None else "holds" if self.value <= self.bar else "**missed**"
        bar = "" if self.bar is None else f"{self.bar:g}"
        p99 = "" if self.p99 is None else f"{self.p99:.2f}"
        return f"| {self.name} | {self.value:.2f} | {p99} | {self.count} | {bar} | {said} |"


class Client:
    """One kept connection. Raises AssertionError for an answer that is no success."""

    def __init__(self, host: str, port: int) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=120)

    def __call__(self, method: str, path: str, body: Any = None) -> Any:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        self._connection.request(method, path, data, headers)
        response = self._connection.getresponse()
        answer = response.read()
        assert response.status < 300, (response.status, answer[:300])
        return json.loads(answer) if answer else None

    def close(self) -> None:
        self._connection.close()


def embedded(node: Node) -> Request:
    def call(method: str, path: str, body: Any = None) -> Any:
        data = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        status, _, answer = node.handle(
            method, path, "", {"content-type": "application/json"}, data
        )
        assert status < 300, (status, answer[:300])
        return json.loads(answer) if answer else None

    return call


def vectors(rng: np.random.Generator, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """On a manifold of 24 dimensions, as embeddings are."""
    inner = rng.standard_normal((count, 24)).astype(np.float32)
    lift = np.random.default_rng(24).standard_normal((24, DIMENSION)).astype(np.float32)
    return inner @ lift


def records(rng: np.random.Generator, first: int, count: int) -> dict[str, Any]:
    rows = vectors(rng, count)
    return {
        "ids": [f"r{number}" for number in range(first, first + count)],
        "embeddings": [base64.b64encode(row.tobytes()).decode() for row in rows],
        "documents": [f"record {number} of this collection" for number in range(count)],
        "metadatas": [{"number": number % 100} for number in range(count)],
    }


def fill(call: Request, name: str, count: int) -> str:
    """A collection of so many records, all of them in parts. Returns its path."""
    created = call("POST", COLLECTIONS, {"name": name, "configuration": {"hnsw": {}}})
    path = f"{COLLECTIONS}/{created['id']}"
    rng = np.random.default_rng(1)
    for first in range(0, count, _BATCH):
        call("POST", f"{path}/add", records(rng, first, min(_BATCH, count - first)))
    return path


def await_indexed(call: Request, path: str) -> None:
    deadline_s = time.monotonic() + _INDEXED_S_MAX
    while call("GET", f"{path}/indexing_status", None)["num_unindexed_ops"]:
        assert time.monotonic() < deadline_s, "not folded in time"
        time.sleep(0.2)


def queries(count: int) -> Iterator[bytes]:
    for row in vectors(np.random.default_rng(2), count):
        body = {"query_embeddings": [row.tolist()], "n_results": 10, "include": ["distances"]}
        yield json.dumps(body).encode()


def timed(call: Request, path: str, bodies: Iterator[bytes]) -> list[float]:
    """Milliseconds of each request."""
    taken = []
    for body in bodies:
        begun = time.perf_counter()
        call("POST", path, body)
        taken.append((time.perf_counter() - begun) * 1e3)
    return taken


def p50(taken: list[float]) -> float:
    return statistics.median(taken)


def p99(taken: list[float]) -> float:
    return float(np.percentile(taken, 99))


def warm_queries(cluster: Request, alone: Request, rows: int, count: int) -> list[Figure]:
    """The same collection in both; slices alternate, so that a busy neighbour hurts both alike."""
    paths = [fill(call, "warm", rows) for call in (cluster, alone)]
    for call, path in zip((cluster, alone), paths, strict=True):
        await_indexed(call, path)
        timed(call, f"{path}/query", queries(100))
    there: list[float] = []
    here: list[float] = []
    for _ in range(5):
        here += timed(alone, f"{paths[1]}/query", queries(count // 5))
        there += timed(cluster, f"{paths[0]}/query", queries(count // 5))
    name = f"{rows // 1000}k × {DIMENSION}"
    return [
        Figure(f"knn of {name}, embedded, p50", p50(here), p99=p99(here), count=len(here)),
        Figure(f"knn of {name}, cluster, p50", p50(there), p99=p99(there), count=len(there)),
        Figure("what the cluster adds to a warm knn, p50", p50(there) - p50(here), 2.5),
    ]


def writes(call: Request, count: int) -> list[Figure]:
    created = call("POST", COLLECTIONS, {"name": "writes"})
    path = f"{COLLECTIONS}/{created['id']}/upsert"
    rng = np.random.default_rng(3)
    small = (json.dumps(records(rng, number, 1)).encode() for number in range(count))
    taken = timed(call, path, small)
    large = (json.dumps(records(rng, 0, 1_500)).encode() for _ in range(max(10, count // 10)))
    batches = list(large)
    taken_large = timed(call, path, iter(batches))
    megabytes = len(batches[0]) / 1e6
    return [
        Figure("one record, inline in PostgreSQL, p50", p50(taken), 15.0, p99(taken), len(taken)),
        Figure(
            f"a batch of {megabytes:.2f} MB through S3, p50",
            p50(taken_large), 60.0, p99(taken_large), len(taken_large),
        ),
    ]  # fmt: skip


def cold(cluster: Cluster, client: Callable[[], Client], rows: int, rounds: int) -> list[Figure]:
    """Query nodes that have nothing of the collection, on disk or in memory."""
    call = client()
    other, path = fill(call, "other", 100), fill(call, "cold", rows)
    await_indexed(call, path)
    call.close()
    taken = []
    bodies = queries(rounds)
    for body in bodies:
        for member in cluster.of("query"):
            member.stop()
            shutil.rmtree(member.environment["OCHREDB_CACHE_PATH"], ignore_errors=True)
            member.start()
        cluster.wait_ready()
        call = client()
        timed(call, f"{other}/query", queries(20))  # The processes themselves are warm.
        taken += timed(call, f"{path}/query", iter([body]))
        call.close()
    name = f"first query of a cold {rows // 1000}k × {DIMENSION} from S3, median"
    return [Figure(name, p50(taken), 1000.0, max(taken), len(taken))]


def measure(quick: bool) -> list[Figure]:
    def say(text: str) -> None:
        print(f"bench: {text}", file=sys.stderr, flush=True)

    components = Components.start(say)
    launcher = Commands()
    cluster = Cluster(components, launcher, components.root / "cluster", "bench", Shape())
    scratch = tempfile.mkdtemp(prefix="ochredb-bench-")
    try:
        cluster.start()
        frontend = cluster.of("frontend")[0]

        def client() -> Client:
            return Client(frontend.host, frontend.port)

        figures = []
        say("warm queries")
        node = Node(NodeConfig(path=scratch, foreground=True))
        node.start()
        try:
            rows, count = (2_000, 200) if quick else (20_000, 2_000)
            figures += warm_queries(client(), embedded(node), rows, count)
        finally:
            node.close()
        say("writes")
        figures += writes(client(), 50 if quick else 500)
        say("cold queries")
        figures += cold(cluster, client, 5_000 if quick else 100_000, 1 if quick else 5)
        cluster.stop()
        return figures
    finally:
        cluster.stop(check=False)
        launcher.close()
        components.stop()
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little data; nothing is kept")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    figures = measure(options.quick)
    print("| figure | ms | p99 | of | bar | |\n|---|---:|---:|---:|---:|---|")
    for figure in figures:
        print(figure.row())
    print(f"\n{os.cpu_count()} CPUs; load {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    if not options.quick:
        kept = {
            "cpus": os.cpu_count(),
            "load_before": load,
            "figures": [asdict(figure) for figure in figures],
        }
        RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
