"""The store that is mutilated: every kind of file, and answers that are known.

Run as a program it makes one and is killed, so that the write-ahead log stays:

    python -m tests.damage.stores DIRECTORY closed|killed
"""

from __future__ import annotations

import os
import random
import sys
from typing import Any

import orjson

from ochredb.cancel import Cancel
from ochredb.ids import IdSource
from ochredb.parts import deleted, writer
from ochredb_compactor import scheduler
from ochredb_compactor.config import CompactorConfig
from ochredb_frontend.messages import Request
from ochredb_log.config import LogConfig
from ochredb_node.node import Node, NodeConfig
from tests.unit.poisoned import append_bytes

DIMENSION = 32
LARGE, SMALL, TAIL, EMPTY = "large", "small", "tail", "empty"
_WORDS = [
    "tower", "bridge", "river", "harbour", "library", "museum", "garden", "station", "market",
    "castle",
]  # fmt: skip
_PREFIX = "/api/v2/tenants/default_tenant/databases/default_database"
_QUARANTINE = "/api/v2/quarantine"
_INLINE_BYTES_MAX = 3_000
_QUARANTINED_BYTES = 100_000  # In an object.


def configure() -> None:
    """Small parts have everything, and several blocks."""
    scheduler.GRAPH_ROWS_MIN = 500
    scheduler.GRAPH_COMPONENTS_MIN = 500
    writer.PACKED_BYTES_MAX = 400_000
    writer.TEXT_INDEX_ROWS_MIN = 50
    deleted.INLINE_BYTES_MAX = 40


def open_node(path: str) -> Node:
    """A node without background threads, which leaves no garbage."""
    config = NodeConfig(
        path=path,
        log=LogConfig(inline_bytes_max=_INLINE_BYTES_MAX),
        compactor=CompactorConfig(grace_s=0.0, replaced_retention_s=0.0, graph_threads=1),
    )
    node = Node(config, ids=IdSource())
    node.start(background=False)
    return node


def fill(node: Node) -> None:
    """Parts packed and not, graphs, bitmaps, fragments and quarantine inline and not."""
    rng = random.Random(7)
    large, small, tail, _ = (_create(node, name) for name in (LARGE, SMALL, TAIL, EMPTY))
    for start in range(0, 3_000, 1_000):
        _add(node, large, rng, start, 1_000)
    node.compactor.compact_now(large)
    gone = [f"id-{number}" for number in rng.sample(range(3_000), 150)]
    _write(node, large, "delete", {"ids": gone})
    _add(node, large, rng, 3_000, 200)
    node.compactor.fold_now(large)
    _add(node, small, rng, 0, 120)
    node.compactor.compact_now(small)
    _write(node, small, "delete", {"ids": ["id-3", "id-4"]})
    append_bytes(node, small, random.Random(5).randbytes(_QUARANTINED_BYTES), 2)
    append_bytes(node, small, b"no fragment at all", 1)
    node.compactor.fold_now(small)
    for collection in (large, tail):
        _add(node, collection, rng, 4_000, 60)  # In an object.
        for number in range(6):  # In the catalog.
            _add(node, collection, rng, 5_000 + 5 * number, 5)
        new = {"ids": ["id-7", "id-8"], "documents": ["new", "newer"]}
        _write(node, collection, "update", new)
        _write(node, collection, "delete", {"ids": ["id-9", "id-4001"]})
    node.versions.release_replaced(node.clock.now_us() + 1, 100)
    node.compactor.collect_now(sweep_orphans=False)


def _create(node: Node, name: str) -> str:
    status, body = _ask(node, "POST", "/collections", {"name": name})
    assert status == 200, body
    found: str = orjson.loads(body)["id"]
    return found


def _write(node: Node, collection: str, verb: str, body: dict[str, Any]) -> None:
    status, answer = _ask(node, "POST", f"/collections/{collection}/{verb}", body)
    assert status in (200, 201), answer


def _add(node: Node, collection: str, rng: random.Random, first: int, count: int) -> None:
    numbers = range(first, first + count)
    body = {
        "ids": [f"id-{number}" for number in numbers],
        "embeddings": [[rng.gauss(0, 1) for _ in range(DIMENSION)] for _ in numbers],
        "documents": [" ".join(rng.choices(_WORDS, k=12)) + f" {number}" for number in numbers],
        "uris": [None if number % 3 else f"file://{number}" for number in numbers],
        "metadatas": [
            {"number": number, "word": rng.choice(_WORDS), "share": number / 7,
             "odd": number % 2 > 0, "words": rng.sample(_WORDS, 2)}
            for number in numbers
        ],
    }  # fmt: skip
    _write(node, collection, "add", body)


def _requests() -> list[tuple[str, str, Any]]:
    """Method, path below a collection ("" = of the database), body."""
    rng = random.Random(3)
    vectors = [[rng.gauss(0, 1) for _ in range(DIMENSION)] for _ in range(3)]
    everything = ["documents", "metadatas", "embeddings", "uris"]
    reads: list[tuple[str, str, Any]] = [("GET", "count", None)]
    for body in (
        {"include": everything},
        {
            "ids": ["id-1", "id-3", "id-2999", "id-4000", "id-5001", "id-9", "no"],
            "include": everything,
        },
        {"where": {"number": {"$gt": 2_900}}},
        {"where": {"word": "castle"}, "limit": 40},
        {"where": {"words": {"$contains": "river"}}, "offset": 20, "limit": 40},
        {"where": {"$or": [{"share": {"$lt": 3.0}}, {"odd": True}]}, "limit": 60},
        {"where_document": {"$contains": "castle tower"}},
        {"where_document": {"$regex": "market.*garden.*7$"}},
    ):
        reads.append(("POST", "get", body))
    for vector in vectors:
        reads += [
            ("POST", "query", {"query_embeddings": [vector], "n_results": 10, "exact": True,
                               "include": ["distances", "documents"]}),
            ("POST", "query", {"query_embeddings": [vector], "n_results": 10,
                               "include": ["distances"]}),
            ("POST", "query", {"query_embeddings": [vector], "n_results": 5,
                               "where": {"word": "river"}, "include": ["distances"]}),
        ]  # fmt: skip
    return reads


def _ask(node: Node, method: str, path: str, body: Any) -> tuple[int, bytes]:
    request = Request(
        method=method, path=path if path.startswith("/api/") else _PREFIX + path,
        body=b"" if body is None else orjson.dumps(body),
        headers={"content-type": "application/json"}, cancel=Cancel(),
    )  # fmt: skip
    response = node.frontend.handle(request)
    return response.status, response.body


def answers(node: Node, *, exact: bool = False) -> dict[str, tuple[int, str]]:
    """What every read says: its status and its body. exact: searches do without graphs."""
    found: dict[str, tuple[int, bytes]] = {"list": _ask(node, "GET", "/collections", None)}
    status, body = found["quarantine"] = _ask(node, "GET", _QUARANTINE, None)
    for item in orjson.loads(body)["operations"] if status == 200 else ():
        place = f"{item['collection_id']}/{item['first_offset']}"
        found[f"quarantine {place}"] = _ask(node, "GET", f"{_QUARANTINE}/{place}", None)
    for name in (LARGE, SMALL, TAIL, EMPTY):
        status, body = found[name] = _ask(node, "GET", f"/collections/{name}", None)
        if status != 200:
            continue
        collection = orjson.loads(body)["id"]
        for number, (method, verb, sent) in enumerate(_requests()):
            path = f"/collections/{collection}/{verb}"
            if exact and verb == "query":
                sent = sent | {"exact": True}
            found[f"{name} {number} {verb}"] = _ask(node, method, path, sent)
    return {name: (status, body.decode("latin-1")) for name, (status, body) in found.items()}


def main() -> None:
    directory, how = sys.argv[1:]
    configure()
    if how == "closed":
        node = open_node(directory)
        fill(node)
        node.close()
        return
    node = open_node(directory)
    fill(node)
    node.sqlite.checkpoint()
    # What follows is in the write-ahead log only.
    tail = next(
        item.id for item in node.namespace.list_collections(
            "default_tenant", "default_database", None, 0) if item.name == TAIL
    )  # fmt: skip
    for number in range(8):
        _add(node, tail, random.Random(number), 6_000 + 3 * number, 3)
    os._exit(0)


if __name__ == "__main__":
    main()
