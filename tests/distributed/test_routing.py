"""Routing over gRPC: servers that stop, drain, vanish behind silence, connections that are cut."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ochredb.cancel import Cancel
from ochredb.clock import SystemClock
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.membership import StaticMembership
from ochredb.cluster.nodes import Nodes
from ochredb.cluster.rendezvous import order
from ochredb.cluster.routed_log import RoutedLog
from ochredb.cluster.routed_query import RoutedQuery
from ochredb.errors import NotFound, OutcomeUnknown
from ochredb.ids import IdSource
from ochredb.peers import GetRequest, Log, Query
from ochredb.rpc.channel import channel
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.log_client import LogClient
from ochredb.rpc.query_client import QueryClient
from ochredb.rpc.server import RpcServer
from ochredb.types import Op
from ochredb_log.grpc import LogServicer
from ochredb_log.reader import LogReader
from ochredb_node.node import Node
from ochredb_query.admission import Admission, AdmissionConfig
from ochredb_query.admitted import AdmittedQuery
from ochredb_query.grpc import QueryServicer
from tests.components.tcp_proxy import TcpProxy
from tests.unit.kernel import ids_of, make_collection, operations, running_node

NAMES = ("a", "b")


@dataclass
class Cluster:
    """Two servers of one store, each behind a proxy, and who routes to them.

    first: the name of the collection's own server.
    """

    node: Node
    collection: str
    servers: dict[str, RpcServer]
    proxies: dict[str, TcpProxy]
    log: RoutedLog
    query: RoutedQuery

    @property
    def first(self) -> str:
        return order(self.collection, NAMES)[0]

    def append(self, name: str, timeout_s: float = 30.0) -> None:
        one = operations(Op.ADD, [name], [[1.0, 2.0]])
        self.log.append(self.collection, one, cancel=Cancel(timeout_s))

    def count(self, timeout_s: float = 30.0) -> int:
        return self.query.count(self.collection, cancel=Cancel(timeout_s))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    clock, rng, config = SystemClock(), random.Random(1), RpcConfig()
    with contextlib.ExitStack() as closing:
        node = closing.enter_context(running_node(str(tmp_path)))
        servers: dict[str, RpcServer] = {}
        proxies: dict[str, TcpProxy] = {}
        for name in NAMES:
            server = RpcServer(config, clock=clock)
            admitted = AdmittedQuery(
                node.query,
                lambda collection: node.namespace.get_collection_by_id(collection).tenant,
                Admission(AdmissionConfig(), clock, rng),
            )
            server.add(QueryServicer(admitted, config))
            server.add(LogServicer(node.log, LogReader(node.logs, node.store), config))
            port = server.start()
            closing.callback(server.stop)
            servers[name] = server
            proxies[name] = TcpProxy.start([("127.0.0.1", port)])
            closing.callback(proxies[name].stop)
        members = StaticMembership({name: proxy.address for name, proxy in proxies.items()})
        budget = RetryBudget(clock)

        def log_client(address: str) -> Log:
            return LogClient(channel(address, config), config)

        def query_client(address: str) -> Query:
            return QueryClient(channel(address, config), config)

        def close(client: Log | Query) -> None:
            assert isinstance(client, LogClient | QueryClient)
            client.close()

        logs = Nodes(members, log_client, clock=clock, rng=rng, close=close)
        closing.callback(logs.close)
        queries = Nodes(members, query_client, clock=clock, rng=rng, close=close)
        closing.callback(queries.close)
        log = RoutedLog(logs, budget=budget, ids=IdSource(), clock=clock)
        closing.callback(log.close)
        query = RoutedQuery(queries, budget=budget, clock=clock)
        closing.callback(query.close)
        yield Cluster(node, make_collection(node), servers, proxies, log, query)


def test_a_server_that_stops_fails_no_request(cluster: Cluster) -> None:
    for number in range(30):
        if number == 10:
            cluster.servers[cluster.first].stop()
        cluster.append(f"id-{number}")
        assert cluster.count() == number + 1


def test_a_server_that_drains_fails_no_request(cluster: Cluster) -> None:
    drained = threading.Thread(target=lambda: cluster.servers[cluster.first].drain(10.0))
    for number in range(30):
        if number == 10:
            drained.start()
        cluster.append(f"id-{number}")
        assert cluster.count() == number + 1
    drained.join()


def test_a_read_swallowed_by_a_partition_is_answered_by_the_other(cluster: Cluster) -> None:
    cluster.append("id")
    for _ in range(100):
        assert cluster.count() == 1
    cluster.proxies[cluster.first].silent = True
    clock = SystemClock()
    for _ in range(10):
        began_s = clock.monotonic_s()
        assert cluster.count() == 1
        # Patience ends after 2 s at the latest; keepalive would take 25.
        assert clock.monotonic_s() - began_s < 10.0
    cluster.proxies[cluster.first].heal()


def test_a_write_swallowed_by_a_partition_is_applied_once(cluster: Cluster) -> None:
    """What was sent arrives when the partition heals, after its repeat has been applied."""
    cluster.append("before")
    proxy = cluster.proxies[cluster.first]
    proxy.silent = True
    cluster.append("swallowed")
    proxy.heal()
    cluster.append("after")
    assert ids_of(cluster.node, cluster.collection) == ["before", "swallowed", "after"]
    assert cluster.node.logs.snapshot(cluster.collection).last_offset == 3


def test_answers_and_refusals_of_a_server_are_not_repeated(cluster: Cluster) -> None:
    with pytest.raises(NotFound):
        cluster.query.get("no-such-collection", GetRequest(), cancel=Cancel(5.0))
    connections = [proxy.counts["connections"] for proxy in cluster.proxies.values()]
    assert sorted(connections) == [0, 1], "the other was not even connected to"


def test_exactly_once_while_connections_are_cut(cluster: Cluster) -> None:
    """Writers, submitters and a folding compactor; connections reset all the time."""
    rng = random.Random(7)
    stop = threading.Event()

    def cut() -> None:
        while not stop.wait(rng.uniform(0.0, 0.05)):
            cluster.proxies[rng.choice(NAMES)].cut()
            cluster.node.compactor.fold_now(cluster.collection)

    acknowledged: set[str] = set()
    unknown: set[str] = set()
    told = threading.Semaphore(0)

    def write(writer: int) -> None:
        for number in range(40):
            name = f"{writer}-{number}"
            try:
                cluster.append(name)
                acknowledged.add(name)
            except OutcomeUnknown:
                unknown.add(name)

    def submit(number: int) -> None:
        name = f"submitted-{number}"

        def deliver(outcome: object) -> None:
            if isinstance(outcome, OutcomeUnknown):
                unknown.add(name)
            elif not isinstance(outcome, BaseException):
                acknowledged.add(name)
            told.release()

        cluster.log.submit(
            cluster.collection,
            operations(Op.ADD, [name], [[1.0, 2.0]]),
            cancel=Cancel(30.0),
            deliver=deliver,
        )

    cutter = threading.Thread(target=cut)
    cutter.start()
    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in writers:
        thread.start()
    submissions = 40
    for number in range(submissions):
        submit(number)
        stop.wait(0.02)
    for thread in writers:
        thread.join()
    for _ in range(submissions):
        assert told.acquire(timeout=60.0)
    stop.set()
    cutter.join()
    applied = ids_of(cluster.node, cluster.collection)
    assert acknowledged <= set(applied) <= acknowledged | unknown
    last = cluster.node.logs.snapshot(cluster.collection).last_offset
    assert last == len(applied), "nothing was applied twice"
    assert len(acknowledged) > 50
    assert sum(proxy.counts["connections"] for proxy in cluster.proxies.values()) > 2
