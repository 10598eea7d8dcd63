"""What docs/scaling.md computes with: the constants of one machine, measured where growth shows.

    .venv/bin/python bench/scaling.py --collections 1000000      # 10 minutes, 6 GB of disk

A real PostgreSQL gets as many collections as wanted: one is made by a node, in all tables; the
others are copies of its rows under other names. Then what the roles ask of the catalog is timed,
and the processor time that PostgreSQL takes for it. A real Ceph RGW is asked for objects. Prints,
and keeps in bench/results/scaling.json. Times are medians, of a machine that others may use too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.components.ceph import CephServer  # noqa: E402
from tests.components.postgres import PostgresServer  # noqa: E402
from tests.unit.kernel import add_rows, append, make_collection, operations  # noqa: E402

from ochredb.clock import SystemClock  # noqa: E402
from ochredb.ids import IdSource  # noqa: E402
from ochredb.storage.s3 import S3Config, S3Store  # noqa: E402
from ochredb.types import Op  # noqa: E402
from ochredb_compactor import garbage  # noqa: E402
from ochredb_node.config import NodeConfig  # noqa: E402
from ochredb_node.node import Node  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "scaling.json"
TABLES = (
    "collections", "collection_keys", "logs", "versions", "version_parts", "parts", "objects",
    "object_references",
)  # fmt: skip
_COPIES_AT_ONCE = 50_000
# How a column's text is made of its template's, for copy number i. Names keep their length.
_NAME = "'{letter}' || lpad(i::text, 35, '0')"
_COLLECTION = _NAME.format(letter="c")
_PART = _NAME.format(letter="p")
_KEY = f"'parts/' || {_PART} || '/packed'"
_CHANGED = {
    ("collections", "id"): _COLLECTION,
    ("collections", "name"): "'copy-' || i",
    ("collections", "created_us"): "t.created_us + i",
    ("collection_keys", "collection"): _COLLECTION,
    ("logs", "collection"): _COLLECTION,
    ("versions", "collection"): _COLLECTION,
    ("versions", "created_us"): "t.created_us - 86400000000",  # Of yesterday.
    ("version_parts", "collection"): _COLLECTION,
    ("version_parts", "part"): _PART,
    ("parts", "id"): _PART,
    ("parts", "collection"): _COLLECTION,
    ("objects", "key"): _KEY,
    ("object_references", "key"): _KEY,
    ("object_references", "collection"): _COLLECTION,
}


def median_ms(call: Callable[[int], object], times: int) -> float:
    taken = []
    for number in range(times):
        begun_s = time.perf_counter()
        call(number)
        taken.append((time.perf_counter() - begun_s) * 1e3)
    return round(statistics.median(taken), 4)


def name_of(number: int) -> str:
    return f"c{number:035}"


class Catalog:
    """A PostgreSQL and a node on it. The node's objects lie in a directory."""

    def __init__(self, folder: Path) -> None:
        self.server = PostgresServer.start(folder / "postgres", shared_buffers="1GB")
        self.database = "scaling"
        url = self.server.create_database(self.database)
        self.node = Node(NodeConfig(path=str(folder / "node"), catalog_url=url))
        self.node.start(background=False)
        self.collection = make_collection(self.node, "template")
        add_rows(self.node, self.collection, 0, 50, 128)
        self.node.compactor.compact_now(self.collection)

    def execute(self, text: str) -> list[tuple[Any, ...]]:
        return self.server.execute(text, self.database)

    def sizes(self) -> dict[str, int]:
        """Bytes of each table, indexes included."""
        return {
            table: self.execute(f"SELECT pg_total_relation_size('{table}')")[0][0]
            for table in TABLES
        }

    def multiply(self, count: int) -> None:
        templates = {
            table: [
                row[0]
                for row in self.execute(
                    "SELECT column_name FROM information_schema.columns WHERE table_schema ="
                    f" 'public' AND table_name = '{table}' ORDER BY ordinal_position"
                )
            ]
            for table in TABLES
        }
        for first in range(1, count + 1, _COPIES_AT_ONCE):
            last = min(count, first + _COPIES_AT_ONCE - 1)
            for table, columns in templates.items():
                values = ", ".join(
                    _CHANGED.get((table, column), f't."{column}"') for column in columns
                )
                self.execute(
                    f"INSERT INTO {table} SELECT {values} FROM {table} t,"
                    f" generate_series({first}, {last}) i WHERE {self._is_template(table)}"
                )
            print(f"  {last} collections", file=sys.stderr, flush=True)
        for table in TABLES:
            self.execute(f"ANALYZE {table}")

    def _is_template(self, table: str) -> str:
        if table in ("objects", "object_references"):
            part = f"SELECT id FROM parts WHERE collection = '{self.collection}'"
            return f"t.key IN (SELECT 'parts/' || id || '/packed' FROM ({part}) q)"
        return f"t.{'id' if table == 'collections' else 'collection'} = '{self.collection}'"

    def cpu_s(self) -> float:
        """Of all processes of this server, those that have ended included."""
        process = self.server._process
        assert process is not None
        total = 0.0
        for found in [psutil.Process(process.pid), *psutil.Process(process.pid).children()]:
            times = found.cpu_times()
            total += times.user + times.system
        return total

    def close(self) -> None:
        self.node.close()
        self.server.stop()


def questions(catalog: Catalog, count: int) -> dict[str, float]:
    """Milliseconds of what the roles ask, with so many collections."""
    node, rng = catalog.node, random.Random(1)
    anyone = [name_of(rng.randrange(1, count + 1)) for _ in range(2_000)]
    world = node.world
    now_us = world.clock.now_us()
    where = ("default_tenant", "default_database")
    named, listed = node.namespace.get_collection, node.namespace.list_collections
    tails = (8_000, 16 << 20, now_us - 5_000_000)
    keys = [f"parts/p{rng.randrange(1, count + 1):035}/packed" for _ in range(500)]
    found: dict[str, float] = {}
    for name, times, call in (
        ("snapshot", 2_000, lambda i: node.logs.snapshot(anyone[i])),
        ("parts of a version", 300, lambda i: node.versions.parts(anyone[i], 1)),
        ("collection by name", 300, lambda i: named(*where, f"copy-{i + 1}")),
        ("first 100 collections", 5, lambda _: listed(*where, 100, 0)),
        ("100 collections in the middle", 3,
         lambda _: listed(*where, 100, count // 2)),
        ("count of collections", 3, lambda _: node.namespace.count_collections(*where)),
        ("tails that are due", 20, lambda _: list(node.logs.tails(*tails))),
        ("merges that are due", 20, lambda _: node.logs.unsettled()),
        ("versions to let go", 5, lambda _: node.versions.any_replaced(now_us, now_us + 10**9)),
        ("objects to delete", 20, lambda _: world.objects.any_due(now_us, now_us + 10**9)),
        ("garbage, all questions", 5, lambda _: garbage.garbage_due(world)),
        ("500 keys of a sweep", 5, lambda _: world.objects.known(keys)),
    ):  # fmt: skip
        found[name] = median_ms(call, times)
        print(f"  {name}: {found[name]} ms", file=sys.stderr, flush=True)
    return found


def appends(catalog: Catalog, count: int) -> dict[str, float]:
    """Small writes, one after the other and from many threads: rates and PostgreSQL's time."""
    node, rng = catalog.node, random.Random(2)
    vector = [[0.5] * 128]

    def one(number: int) -> None:
        append(
            node,
            name_of(rng.randrange(1, count + 1)),
            operations(Op.UPSERT, [f"x{number}"], vector),
        )

    alone_ms = median_ms(one, 300)
    found: dict[str, float] = {"append alone, ms": alone_ms}
    for threads in (8, 32):
        cpu_s, begun_s = catalog.cpu_s(), time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(3_000)))
        wall_s = time.perf_counter() - begun_s
        found[f"appends/s, {threads} threads"] = round(3_000 / wall_s, 1)
        found[f"postgres ms per append, {threads} threads"] = round(
            (catalog.cpu_s() - cpu_s) / 3_000 * 1e3, 4
        )
    return found


def snapshots(catalog: Catalog, count: int) -> dict[str, float]:
    node, rng = catalog.node, random.Random(3)
    names = [name_of(rng.randrange(1, count + 1)) for _ in range(8_000)]
    cpu_s, begun_s = catalog.cpu_s(), time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(node.logs.snapshot, names))
    return {
        "snapshots/s, 4 threads": round(len(names) / (time.perf_counter() - begun_s), 1),
        "postgres ms per snapshot": round((catalog.cpu_s() - cpu_s) / len(names) * 1e3, 4),
    }


def objects(folder: Path) -> dict[str, float]:
    """Requests of an object store, from one process."""
    ceph = CephServer.start(folder)
    try:
        config = S3Config(
            bucket=ceph.create_bucket("scaling"),
            endpoint_url=ceph.url,
            access_key_id=ceph.access_key,
            secret_access_key=ceph.secret_key,
        )
        store = S3Store(config, SystemClock(), IdSource())
        store.check()
        small, large = os.urandom(1_000), os.urandom(1 << 20)
        found = {
            "create 1 KB, ms": median_ms(lambda i: store.create(f"a/{i:05}", small), 200),
            "create 1 MB, ms": median_ms(lambda i: store.create(f"b/{i:05}", large), 100),
            "get 1 MB, ms": median_ms(lambda i: store.get(f"b/{i:05}"), 100),
        }
        keys = [f"c/{number:06}" for number in range(5_000)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: store.create(key, b""), keys))
        begun_s = time.perf_counter()
        assert sum(1 for _ in store.list("c/")) == len(keys)
        found["listed/s"] = round(len(keys) / (time.perf_counter() - begun_s), 1)
        begun_s = time.perf_counter()
        store.delete_many(keys)
        found["deleted/s"] = round(len(keys) / (time.perf_counter() - begun_s), 1)
        store.close()
        return found
    finally:
        ceph.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--collections", type=int, default=1_000_000)
    parser.add_argument("--no-objects", action="store_true")
    arguments = parser.parse_args()
    count: int = arguments.collections
    result: dict[str, Any] = {"collections": count, "load_before": os.getloadavg()}
    with tempfile.TemporaryDirectory(prefix="ochredb-scaling-") as name:
        os.chmod(name, 0o755)  # PostgreSQL runs as another user.
        catalog = Catalog(Path(name))
        try:
            before = catalog.sizes()
            begun_s = time.perf_counter()
            catalog.multiply(count)
            result["made in s"] = round(time.perf_counter() - begun_s, 1)
            sizes = catalog.sizes()
            result["bytes per collection"] = {
                table: round((sizes[table] - before[table]) / count, 1) for table in TABLES
            }
            result["bytes per collection"]["all"] = round(
                (sum(sizes.values()) - sum(before.values())) / count, 1
            )
            result["questions, ms"] = questions(catalog, count)
            result["appends"] = appends(catalog, count)
            result["snapshots"] = snapshots(catalog, count)
        finally:
            catalog.close()
        if not arguments.no_objects:
            result["objects"] = objects(Path(name) / "ceph")
    result["load_after"] = os.getloadavg()
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
