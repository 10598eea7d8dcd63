"""A flood of one tenant, through frontends to a query node: what becomes of the others' reads.

Two frontends over HTTP, one query node over gRPC with its admission control. The node's reads end
one by one, when the test says so, so turns are counted and nothing depends on time.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import cast

import httpx
import pytest

from ochredb.cancel import Cancel
from ochredb.catalog.namespace import Namespace
from ochredb.clock import SystemClock
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.membership import StaticMembership
from ochredb.cluster.nodes import Nodes
from ochredb.cluster.routed_query import RoutedQuery
from ochredb.peers import Query
from ochredb.rpc.channel import channel
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.query_client import QueryClient
from ochredb.rpc.server import RpcServer
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.service import Frontend
from ochredb_query.admission import Admission, AdmissionConfig
from ochredb_query.admitted import AdmittedQuery
from ochredb_query.grpc import QueryServicer

from .fake_roles import FakeLog, FakeNamespace, FakeQuery, World
from .live_server import Live

_WAIT_S = 30.0
_FRONTENDS, _THREADS, _QUEUE_MAX = 2, 4, 16
_NODE = AdmissionConfig(
    running_max=2, queue_max=32
)  # It could hold what the frontends' threads do.


class _Turns(FakeQuery):
    """Counts that end one at a time. order: whose have ended."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._owners = world.collections
        self._turns = threading.Semaphore(0)
        self._lock = threading.Lock()
        self.order: list[str] = []

    def count(self, collection_id: str, *, cancel: Cancel) -> int:
        assert self._turns.acquire(timeout=_WAIT_S)
        with self._lock:
            self.order.append(self._owners[collection_id].tenant)
        return super().count(collection_id, cancel=cancel)

    def have_ended(self, count: int) -> bool:
        return len(self.order) >= count

    def let_one_end(self) -> None:
        self._turns.release()


class _Place:
    """Frontends and the node behind them. paths: that count a collection, by its tenant."""

    def __init__(
        self, world: World, node: _Turns, admission: Admission, frontends: list[Live]
    ) -> None:
        self.node, self.admission, self.frontends = node, admission, frontends
        self.paths: dict[str, str] = {}
        for tenant in ("loud", "quiet"):
            world.add_database(tenant, "d")
            path = f"/api/v2/tenants/{tenant}/databases/d/collections"
            created = frontends[0].http.post(path, json={"name": "records"})
            self.paths[tenant] = f"{path}/{created.json()['id']}/count"

    def count(self, frontend: int, tenant: str) -> httpx.Response:
        return self.frontends[frontend].http.get(self.paths[tenant], timeout=_WAIT_S)

    def at_node(self) -> int:
        return self.admission.running + self.admission.queued

    def pending(self) -> list[int]:
        return [live.app._pools["read"].pending for live in self.frontends]


@pytest.fixture
def place() -> Iterator[_Place]:
    clock, world, rpc = SystemClock(), World(), RpcConfig(read_threads=_NODE.threads)
    namespace = cast("Namespace", FakeNamespace(world))
    with contextlib.ExitStack() as closing:
        node = _Turns(world)
        admission = Admission(_NODE, clock, random.Random(1))
        server = RpcServer(rpc, clock=clock)
        admitted = AdmittedQuery(
            cast("QueryClient", node),
            lambda collection: namespace.get_collection_by_id(collection).tenant,
            admission,
        )
        server.add(QueryServicer(admitted, rpc))
        server.start()
        closing.callback(server.stop)

        def client(address: str) -> Query:
            return QueryClient(channel(address, rpc), rpc)

        config = FrontendConfig(read_threads=_THREADS, queue_max=_QUEUE_MAX, deadline_s=_WAIT_S)
        frontends = []
        for _ in range(_FRONTENDS):
            nodes = Nodes(
                StaticMembership({"query-0": server.address}),
                client,
                clock=clock,
                rng=random.Random(1),
                close=lambda one: cast("QueryClient", one).close(),
            )
            closing.callback(nodes.close)
            routed = RoutedQuery(nodes, budget=RetryBudget(clock), clock=clock)
            closing.callback(routed.close)
            live = Live(Frontend(namespace, FakeLog(world), routed, config, clock=clock))
            closing.callback(live.close)
            frontends.append(live)
        yield _Place(world, node, admission, frontends)


def _until(is_so: Callable[[], bool]) -> None:
    for _ in range(int(_WAIT_S / 0.005)):
        if is_so():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not come about")


def test_a_flood_through_frontends_leaves_the_others_their_turns(place: _Place) -> None:
    node, room, threads = place.node, _THREADS + _QUEUE_MAX, _FRONTENDS * _THREADS
    with ThreadPoolExecutor(64) as clients:

        def ask(tenant: str) -> list[Future[httpx.Response]]:
            return [clients.submit(place.count, one, tenant) for one in range(_FRONTENDS)]

        flood = [each for _ in range(room) for each in ask("loud")]
        _until(lambda: place.pending() == [room] * _FRONTENDS)
        for each in ask("loud"):  # More than there is room for: the flood's own.
            answer = each.result(_WAIT_S)
            assert (answer.status_code, answer.json()["error"]) == (429, "RateLimitError")
            assert int(answer.headers["retry-after"]) >= 1
        quiet = [each for _ in range(2) for each in ask("quiet")]
        # Room is made for them: as many of the flood are told to come back.
        _until(lambda: sum(each.done() for each in (*flood, *quiet)) == len(quiet))
        while node.order.count("quiet") < len(quiet) and len(node.order) < len(flood) // 2:
            _until(lambda: place.at_node() == threads)
            ended = len(node.order)
            node.let_one_end()
            _until(partial(node.have_ended, ended + 1))
        turns = list(node.order)
        for _ in range(len(flood)):
            node.let_one_end()
        statuses = [each.result(_WAIT_S).status_code for each in flood]
    assert [each.result().status_code for each in quiet] == [200] * 4
    assert sorted(statuses) == [200] * (len(flood) - 4) + [429] * 4
    # First come those of the flood that had a thread already, then it has every second turn at
    # most; in one line all of it would come first.
    assert turns.count("quiet") == len(quiet), turns
    assert turns.count("loud") <= threads + _NODE.running_max + len(quiet), turns
