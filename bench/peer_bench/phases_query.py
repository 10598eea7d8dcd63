"""Reading a collection that stands still: nearest neighbours, filters, documents, get, spaces."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import orjson

from .bench import Bench
from .data import BATCH, NEAREST, Data, exact
from .servers import ROOT, Server

Collections = dict[str, str]  # Label of a server -> id of its collection.
QUERIES_MAX = 200  # Of the slower phases.


def queries(bench: Bench, data: Data, collections: Collections) -> None:
    """Ten nearest of the whole collection, one client and eight, and recall."""
    neighbours(bench, data, collections, "query", with_extra=True)


def target(bench: Bench, data: Data, collections: Collections) -> None:
    """The same without further fields: what a user gets who asks for nothing special."""
    neighbours(bench, data, collections, "target", with_extra=False)


def neighbours(
    bench: Bench, data: Data, collections: Collections, group: str, with_extra: bool
) -> None:
    wanted = exact(data.x, data.q)
    numbers = range(data.query_count)
    requests = bench.query_requests(data, collections, numbers, with_extra=with_extra)
    for threads in (1, 8):
        name = f"knn recall@{NEAREST} (c={threads})"
        bench.timed(group, "knn", requests, threads, wanted.__getitem__, name)


def filters(bench: Bench, data: Data, collections: Collections) -> None:
    """Filters of 50 to 0.1 %, random ones and one that follows the clusters: hard on graphs."""
    count = min(data.query_count, QUERIES_MAX)
    both = {"$and": [{"cat": "c3"}, {"num": {"$lt": 500}}]}
    cases = [
        ("50% num<500", {"num": {"$lt": 500}}, data.num < 500),
        ("10% num<100", {"num": {"$lt": 100}}, data.num < 100),
        ("10% cat=c3 (clustered)", {"cat": {"$eq": "c3"}}, data.cat == 3),
        ("5% cat=c3 and num<500", both, (data.cat == 3) & (data.num < 500)),
        ("1% num<10", {"num": {"$lt": 10}}, data.num < 10),
        ("0.1% num=7", {"num": {"$eq": 7}}, data.num == 7),
    ]
    for name, where, mask in cases:
        wanted = exact(data.x, data.q[:count], mask)
        requests = bench.query_requests(data, collections, range(count), where)
        bench.timed("filter", name, requests, 1, wanted.__getitem__)
        bench.timed("filter", name, requests, 8)


def documents(bench: Bench, data: Data, collections: Collections) -> None:
    """Nearest among the documents that contain a word."""
    count = min(data.query_count, QUERIES_MAX)
    for name, word, mask in (
        ("$contains 1%", "quixoticmarker", data.rare1),
        ("$contains 0.1%", "zanzibarmarker", data.rare01),
    ):
        wanted = exact(data.x, data.q[:count], mask)
        where_document = {"$contains": word}
        requests = bench.query_requests(data, collections, range(count), None, where_document)
        bench.timed("doc", name, requests, 1, wanted.__getitem__)


def gets(bench: Bench, data: Data, collections: Collections) -> None:
    """Ten records by id, a page by filter, and count."""
    rng = np.random.default_rng(3)
    include = ["metadatas", "documents"]
    by_id = [
        {"ids": [data.ids[i] for i in rng.integers(0, data.n, 10)], "include": include}
        for _ in range(QUERIES_MAX)
    ]
    by_filter = [
        {"where": {"num": {"$gte": int(v)}}, "limit": 100, "offset": 0, "include": include}
        for v in rng.integers(0, 900, QUERIES_MAX)
    ]
    requests = bench.requests(collections, "get", [orjson.dumps(one) for one in by_id])
    for threads in (1, 8):
        bench.timed("get", "10 ids", requests, threads)
    requests = bench.requests(collections, "get", [orjson.dumps(one) for one in by_filter])
    bench.timed("get", "where limit 100", requests, 1)
    counts = {
        server.label: [server.connection.build("GET", f"{ROOT}/{collections[server.label]}/count")]
        for server in bench.servers
    }
    bench.timed("get", "count", counts, 1)


def spaces(bench: Bench, data: Data) -> None:
    """Cosine and ip, with norms of 0.7 to 1.3: for unit vectors every space has the same order."""
    n = min(data.n, bench.options.spaces_n or max(BATCH, data.n // 2))
    norm = np.random.default_rng(23).uniform(0.7, 1.3, n).astype(np.float32)
    x = data.x[:n] * norm[:, None]
    for space, truth in (("cosine", data.x[:n]), ("ip", x)):
        name = f"bench{data.dim}_{space}"
        configuration = functools.partial(configured, space)
        collections = bench.load(data, name, n, configuration, x)
        numbers = range(data.query_count)
        requests = bench.query_requests(data, collections, numbers, with_extra=True)
        bench.timed("spaces", f"{space} knn", requests, 8, exact(truth, data.q).__getitem__)
        bench.drop(name)


def configured(space: str, _: Server) -> dict[str, Any]:
    return {"hnsw": {"space": space}}
