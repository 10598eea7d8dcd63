"""Writes one small file of every on-disk format; `test_can_read_old.py` reads them for ever after.

    python -m tests.golden.make tests/golden/v1

Run once for each format version: a folder that exists is refused, because rewriting golden files
would only prove that today's writer and today's reader agree. Time and chance are fixed.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ochredb.cancel import Cancel
from ochredb.catalog.sqlite import SqliteSession
from ochredb.configuration import resolve
from ochredb.fragment import encode
from ochredb.ids import IdSource
from ochredb.parts import deleted, writer
from ochredb.types import Op, Operations
from ochredb_compactor import scheduler
from ochredb_compactor.config import CompactorConfig
from ochredb_log.config import LogConfig
from ochredb_node.node import Node, NodeConfig

DELETED_ROWS = [0, 3, 4, 5, 6, 7, 300, 70_000]


class FixedClock:
    """A day in 2026; each look is a millisecond later."""

    def __init__(self) -> None:
        self._now_us = 1_780_000_000_000_000

    def now_us(self) -> int:
        self._now_us += 1_000
        return self._now_us

    def monotonic_s(self) -> float:
        return self.now_us() / 1e6

    def sleep(self, seconds: float) -> None:
        self._now_us += int(seconds * 1e6)


def example() -> Operations:
    """A request with every column, and with every kind of absence."""
    return Operations(
        op=Op.UPDATE,
        ids=["a", "ü", "名"],
        embeddings=np.array([[1.5, -2.0], [0.0, 0.0], [3.0e-38, 3.0e38]], np.float32),
        embedded=np.array([True, False, True]),
        documents=["text", None, ""],
        uris=[None, "https://example.com/", None],
        metadatas=[b'{"n":1,"gone":null}', b'{"list":[1,2]}', None],
    )


def rows(first: int, count: int, op: Op = Op.ADD) -> Operations:
    """Records that depend on their numbers only, with metadata of every type."""
    numbers = range(first, first + count)
    metadatas: list[bytes | None] = []
    for n in numbers:
        values: dict[str, Any] = {
            "n": n,
            "half": n / 2,
            "even": n % 2 == 0,
            "name": f"näme {n % 5}",
        }
        values |= {"tags": [f"t{n % 3}", "all"], "primes": [2, n], "near": [0.5], "flags": [True]}
        metadatas.append(None if n % 7 == 6 else orjson.dumps(values))
    return Operations(
        op=op,
        ids=[f"id-{n}" for n in numbers],
        embeddings=np.array([[n, n * n % 17, 1.0, -n / 4] for n in numbers], np.float32),
        documents=[
            None if n % 5 == 4 else f"document number {n} of the golden store" for n in numbers
        ],
        uris=[f"file:///{n}" if n % 2 else None for n in numbers],
        metadatas=metadatas,
        key_types=frozenset(
            {("n", "int"), ("half", "float"), ("even", "bool"), ("name", "string")}
        ),
    )


def fill(node: Node) -> str:
    """A part with a grown graph and dead rows, a flat part, an inline and an object fragment."""
    configuration, schema = resolve(None, {"hnsw": {"space": "cosine"}}, None, num_threads=2)
    info = node.namespace.create_collection(
        "default_tenant",
        "default_database",
        "golden",
        configuration=configuration,
        schema=schema,
        metadata={"purpose": "golden", "number": 7},
        get_or_create=False,
    )

    def append(operations: Operations, key: str | None = None) -> None:
        node.log.append(info.id, operations, idempotency_key=key, cancel=Cancel())

    append(rows(0, 40))
    node.compactor.compact_now(info.id)
    append(rows(40, 40))
    append(Operations(op=Op.DELETE, ids=["id-1", "id-41"]))
    node.compactor.compact_now(info.id)  # Grows the graph; id-1 stays behind as a dead label.
    append(rows(80, 5))
    append(Operations(op=Op.DELETE, ids=["id-2", "id-3"]))
    deleted.INLINE_BYTES_MAX = 0
    node.compactor.fold_now(info.id)
    append(rows(85, 20))
    append(Operations(op=Op.UPDATE, ids=["id-7"], documents=["changed"]), "a client's key")
    append(Operations(op=Op.DELETE, ids=["id-90", "id-9"]))
    return info.id


def main(target: Path) -> None:
    if target.exists():
        sys.exit(f"{target} exists: golden files are never rewritten")
    scheduler.GRAPH_ROWS_MIN, scheduler.GRAPH_COMPONENTS_MIN = 20, 80
    writer.TEXT_INDEX_ROWS_MIN = 20
    with tempfile.TemporaryDirectory() as folder:
        clock = FixedClock()
        config = NodeConfig(
            path=folder,
            log=LogConfig(inline_bytes_max=3_000),
            compactor=CompactorConfig(graph_threads=1),
        )
        node = Node(config, clock=clock, ids=IdSource(clock, random.Random(1)))
        node.start(background=False)
        collection = fill(node)
        clock.sleep(3_600)
        node.compactor.collect_now(sweep_orphans=True)
        target.mkdir(parents=True)
        with node.database.write() as session:
            assert isinstance(session, SqliteSession)
            session.connection.execute("DELETE FROM jobs")  # They name the machine.
            dump = "\n".join(session.connection.iterdump())
        (target / "catalog-dump.txt").write_text(dump + "\n", encoding="utf-8")
        shutil.copytree(Path(folder, "objects"), target / "objects")
        shutil.rmtree(target / "objects" / "tmp", ignore_errors=True)
        version = node.logs.snapshot(collection).version
        part = node.versions.parts(collection, version)[0]
        (target / "manifest.json").write_text(part.manifest.to_json() + "\n", encoding="utf-8")
        node.close()
    (target / "fragment.arrows").write_bytes(encode(example()).to_pybytes())
    (target / "deleted-rows.bin").write_bytes(deleted.encode(np.array(DELETED_ROWS)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
