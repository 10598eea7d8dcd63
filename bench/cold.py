"""The first read of a cold collection whose objects lie in S3 (Ceph's RGW, on this machine).

    .venv/bin/python bench/cold.py --rows 100000 --words 98

Builds the collection once, then starts a process with an empty cache for each kind of read, and
prints how long the first one took there, and how many bytes it fetched; `again` is the second one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peer_bench.data import NEAREST, Data

from ochredb.cancel import Cancel
from ochredb.configuration import resolve
from ochredb.peers import GetRequest, QueryRequest
from ochredb.storage.cached import CachedStore
from ochredb.storage.s3_config import S3Config
from ochredb.types import Field, Op, Operations
from ochredb.where import Compare
from ochredb_node.config import NodeConfig
from ochredb_node.node import Node

sys.path.insert(0, str(Path(__file__).parent.parent))

_TENANT = ("default_tenant", "default_database")
_DIM, _SEED = 128, 7
_QUERY = np.full((1, _DIM), 0.05, np.float32)
_READS: dict[str, GetRequest | QueryRequest | None] = {
    "nearest 10": QueryRequest(embeddings=_QUERY, n_results=NEAREST),
    "nearest 10, no documents": QueryRequest(
        embeddings=_QUERY, n_results=NEAREST, fields=Field.NONE
    ),
    "nearest 10, filtered": QueryRequest(embeddings=_QUERY, where=Compare("num", "$lt", 10)),
    "get 10": GetRequest(limit=10),
    "get 10, filtered": GetRequest(limit=10, where=Compare("num", "$lt", 10)),
    "get 10 by id": GetRequest(ids=[f"id-{row:08d}" for row in range(10)]),
    "count": None,
}


def opened(root: Path, s3: dict[str, Any], cache: Path) -> Node:
    config = NodeConfig(path=str(root / "store"), s3=S3Config(**s3), cache_path=str(cache))
    node = Node(config)
    node.start(background=False)
    return node


def build(root: Path, s3: dict[str, Any], rows: int, words: int) -> None:
    node = opened(root, s3, root / "building")
    data = Data(rows, _DIM, 1, _SEED)
    configuration, schema = resolve(None, {"hnsw": {"space": "l2"}}, None, num_threads=2)
    collection = node.namespace.create_collection(
        *_TENANT, "cold", configuration=configuration, schema=schema, metadata=None,
        get_or_create=False,
    ).id  # fmt: skip
    rng = np.random.default_rng(_SEED)
    vocabulary = [f"word{number}" for number in range(5_000)]
    for start in range(0, rows, 4_000):
        stop = min(start + 4_000, rows)
        picked = rng.integers(0, len(vocabulary), (stop - start, words))
        operations = Operations(
            op=Op.ADD,
            ids=data.ids[start:stop],
            embeddings=data.x[start:stop],
            documents=[" ".join(vocabulary[word] for word in row) for row in picked.tolist()],
            metadatas=[
                json.dumps({"num": int(number)}).encode() for number in data.num[start:stop]
            ],
        )
        node.log.append(collection, operations, cancel=Cancel())
        if stop % 16_000 == 0:
            node.compactor.fold_now(collection)
    node.compactor.compact_now(collection)
    for part in node.versions.parts(collection, node.logs.snapshot(collection).version):
        sizes = {item.key.rsplit("/", 1)[-1]: item.size >> 10 for item in part.manifest.objects}
        print(f"part of {part.manifest.rows} rows, KiB: {sizes}")
    node.close()
    shutil.rmtree(root / "building")


def read(root: Path, s3: dict[str, Any], name: str) -> None:
    """In a process of its own."""
    with tempfile.TemporaryDirectory(dir=root) as cache:
        node = opened(root, s3, Path(cache))
        collection = node.namespace.get_collection(*_TENANT, "cold").id
        request = _READS[name]
        times_s = []
        for _ in range(2):
            started_s, cpu_s = time.monotonic(), time.process_time()
            if isinstance(request, QueryRequest):
                node.query.query(collection, request, cancel=Cancel())
            elif isinstance(request, GetRequest):
                node.query.get(collection, request, cancel=Cancel())
            else:
                node.query.count(collection, cancel=Cancel())
            times_s.append((time.monotonic() - started_s, time.process_time() - cpu_s))
        assert isinstance(node.store, CachedStore)
        fetched = node.store.counters.fetched_bytes
        (first_s, cpu_s), (again_s, _) = times_s
        print(
            f"{name:26} first {1e3 * first_s:8.1f} ms ({1e3 * cpu_s:7.1f} ms processor), "
            f"again {1e3 * again_s:7.2f} ms, fetched {fetched / (1 << 20):7.1f} MiB",
            flush=True,
        )
        node.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=98)
    parser.add_argument("--read", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read is not None:
        root, s3, name = given.read
        read(Path(root), json.loads(s3), name)
        return
    from tests.components.ceph import CephServer

    with tempfile.TemporaryDirectory(prefix="ochredb-cold-") as folder:
        root = Path(folder)
        ceph = CephServer.start(root / "ceph")
        try:
            place: dict[str, Any] = {
                "bucket": ceph.create_bucket("cold"),
                "endpoint_url": ceph.url,
                "region": "us-east-1",
                "access_key_id": ceph.access_key,
                "secret_access_key": ceph.secret_key,
            }
            build(root, place, given.rows, given.words)
            for name in _READS:
                command = [sys.executable, __file__, "--read", str(root), json.dumps(place), name]
                subprocess.run(command, check=True)
        finally:
            ceph.kill()


if __name__ == "__main__":
    main()
