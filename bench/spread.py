"""One large collection over query nodes: recall of their merged answers, and processor time.

    .venv/bin/python bench/spread.py build DIRECTORY      # 1M x 128 in 4 parts, some minutes
    .venv/bin/python bench/spread.py measure DIRECTORY    # one node alone, then two that share

The nodes are processes that share a store in a directory and call each other by gRPC. Nothing here
is timed: the figure is processor time (user and system) of the nodes for each query, so it holds on
a busy machine too. Two nodes answer `2 * alone / together` times the queries of one, if `alone` is
the time that a node without others takes for a query and `together` that of both of two.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from peer_bench.data import NEAREST, clustered

from ochredb.cancel import Cancel
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.membership import StaticMembership
from ochredb.cluster.nodes import Nodes
from ochredb.configuration import resolve
from ochredb.parts.open_parts import OpenParts
from ochredb.peers import DistantQueryNode, QueryRequest
from ochredb.rpc.channel import channel
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.query_client import QueryClient
from ochredb.rpc.server import RpcServer
from ochredb.types import Field, Op, Operations
from ochredb_compactor import scheduler
from ochredb_node.config import NodeConfig
from ochredb_node.node import Node
from ochredb_query.config import QueryConfig
from ochredb_query.grpc import QueryServicer
from ochredb_query.scatter import Scatter
from ochredb_query.service import QueryService

_NAME = "large"
_APPENDED, _FOLDED = 5_000, 15_000
_SEED, _QUERIES = 7, 200
_TENANT = ("default_tenant", "default_database")


def build(directory: str, rows: int, dimension: int, parts: int) -> None:
    scheduler.GRAPH_PART_ROWS_MAX = rows // parts
    vectors, _, queries = clustered(rows, dimension, _QUERIES, _SEED)
    node = Node(NodeConfig(path=directory))
    node.start(background=False)
    configuration, schema = resolve(None, None, None, num_threads=2)
    collection = node.namespace.create_collection(
        *_TENANT, _NAME, configuration=configuration, schema=schema, metadata=None,
        get_or_create=False,
    ).id  # fmt: skip
    for start in range(0, rows, _APPENDED):
        stop = min(start + _APPENDED, rows)
        operations = Operations(
            op=Op.ADD,
            ids=[f"id-{row:08d}" for row in range(start, stop)],
            embeddings=vectors[start:stop],
        )
        node.log.append(collection, operations, cancel=Cancel())
        if stop % _FOLDED == 0 or stop % (rows // parts) == 0:
            node.compactor.fold_now(collection)
        if stop % (rows // parts) == 0:
            node.compactor.compact_now(collection)
            print(f"{stop} of {rows} rows", flush=True)
    np.save(f"{directory}.queries.npy", queries)
    version = node.logs.snapshot(collection).version
    for part in node.versions.parts(collection, version):
        manifest = part.manifest
        print(
            f"{manifest.id}: {manifest.rows} rows, {manifest.graph_labels} in a graph of "
            f"{manifest.graph_neighbors} neighbours, recall by ef {manifest.graph_recall}"
        )
    node.close()


def serve(directory: str, name: str, spread_bytes: int) -> None:
    """One query node, until standard input ends. Reads its peers' addresses from there."""
    node = Node(NodeConfig(path=directory))
    node.start(background=False)
    clock, config = node.clock, RpcConfig()
    server = RpcServer(config, clock=clock)

    def connect(address: str) -> QueryClient:
        return QueryClient(channel(address, config), config)

    class Late:
        """The service is known when all addresses are."""

        def __getattr__(self, method: str) -> Any:
            return getattr(service, method)

    server.add(QueryServicer(Late(), config))
    print(f"127.0.0.1:{server.start()}", flush=True)
    members = dict(item.split("=") for item in sys.stdin.readline().split())
    nodes: Nodes[DistantQueryNode] = Nodes(
        StaticMembership(members), connect, clock=clock, rng=random.Random(name)
    )
    scatter = Scatter(nodes, name, RetryBudget(clock), clock)
    service = QueryService(
        node.logs,
        node.versions,
        node.namespace,
        node.store,
        OpenParts(node.store),
        clock,
        QueryConfig(spread_bytes=spread_bytes, memory_bytes=8 << 30),
        scatter=scatter,
    )
    sys.stdin.read()
    server.stop()
    node.close()


class Server:
    """A node in a process of its own."""

    def __init__(self, directory: str, name: str, spread_bytes: int) -> None:
        command = [sys.executable, __file__, "serve", directory, name, str(spread_bytes)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.name, self.address = name, self.process.stdout.readline().strip()
        config = RpcConfig()
        self.client = QueryClient(channel(self.address, config), config)

    def introduce(self, servers: Sequence[Server]) -> None:
        assert self.process.stdin is not None
        line = " ".join(f"{server.name}={server.address}" for server in servers)
        print(line, file=self.process.stdin, flush=True)

    @property
    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def ask(
    servers: Sequence[Server], collection: str, queries: Any, times: int, **more: Any
) -> list[list[str]]:
    """Each query alone, of the servers in turn, by two clients; the ids that were found."""
    found: list[list[str]] = [[] for _ in queries]

    def one(number: int) -> None:
        row = number % len(queries)
        request = QueryRequest(
            embeddings=queries[row : row + 1], n_results=NEAREST, fields=Field.NONE, **more
        )
        client = servers[number % len(servers)].client
        answer = client.query(collection, request, cancel=Cancel(600.0))
        found[row] = answer.records[0].ids

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(times * len(queries))))
    return found


def measure(directory: str, times: int) -> None:
    queries = np.load(f"{directory}.queries.npy")
    count = len(queries)
    node = Node(NodeConfig(path=directory))
    node.start(background=False)
    collection = node.namespace.get_collection(*_TENANT, _NAME).id
    node.close()
    figures = {}
    expected: list[list[str]] = []
    for names, spread_bytes in ((["query-0"], 1 << 60), (["query-0", "query-1"], 0)):
        servers = [Server(directory, name, spread_bytes) for name in names]
        for server in servers:
            server.introduce(servers)
        if not expected:
            expected = ask(servers, collection, queries, 1, exact=True)
        found = ask(servers, collection, queries, 1)  # Loads graphs, too.
        ask(servers, collection, queries, 1)
        hits = sum(len(set(a) & set(b)) for a, b in zip(found, expected, strict=True))
        before = [server.cpu_s for server in servers]
        ask(servers, collection, queries, times)
        each = [server.cpu_s - start for server, start in zip(servers, before, strict=True)]
        asked = times * count
        figures[len(names)] = 1e3 * sum(each) / asked
        print(
            f"{len(names)} nodes: recall@{NEAREST} {hits / (NEAREST * count):.4f}, "
            f"{figures[len(names)]:.3f} ms of processor time per query, of all nodes "
            f"({', '.join(f'{1e3 * one / asked:.3f}' for one in each)})",
            flush=True,
        )
        for server in servers:
            server.close()
    print(f"two nodes answer {2 * figures[1] / figures[2]:.2f} times the queries of one")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["build", "measure", "serve"])
    parser.add_argument("directory")
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--times", type=int, default=10)
    given = parser.parse_args()
    if given.what == "build":
        build(given.directory, given.rows, given.dimension, given.parts)
    elif given.what == "measure":
        measure(given.directory, given.times)
    else:
        name, spread_bytes = given.rest
        serve(given.directory, name, int(spread_bytes))


if __name__ == "__main__":
    main()
