"""A server of the roles: pools of their own, ends of calls, health, drain, the token."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ochredb.cancel import Cancel, Cancelled
from ochredb.clock import SystemClock
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.membership import StaticMembership
from ochredb.cluster.nodes import Nodes
from ochredb.cluster.routed_log import RoutedLog
from ochredb.cluster.routed_query import RoutedQuery
from ochredb.errors import (
    DeadlineExceeded,
    Exhausted,
    OutcomeUnknown,
    Unavailable,
)
from ochredb.ids import IdSource
from ochredb.peers import GetRequest, Log, LogReader, Query
from ochredb.rpc.channel import channel
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.log_client import LogClient
from ochredb.rpc.query_client import QueryClient
from ochredb.rpc.server import RpcServer
from ochredb.types import (
    Appended,
    IndexingStatus,
    LogStatus,
    Op,
    Operations,
    Records,
)

from .kernel import operations
from .rpc_kernel import connected, probe, served_role

_WAIT_S = 30.0
_ONE = operations(Op.ADD, ["a"], [[1.0]])


class _Held:
    """Log and query roles whose calls wait until they are let go, or cancelled."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.cancels: list[Cancel] = []

    def count(self, _collection_id: str, *, cancel: Cancel) -> int:
        self._hold(cancel)
        return 7

    def get(self, _collection_id: str, _request: GetRequest, *, cancel: Cancel) -> Records:
        cancel.check()
        raise Unavailable("not held")

    def indexing_status(self, _collection_id: str, *, cancel: Cancel) -> IndexingStatus:
        self._hold(cancel)
        return IndexingStatus(num_indexed_ops=3, num_unindexed_ops=1)

    def status(self, _collection_id: str, *, cancel: Cancel) -> LogStatus:
        self._hold(cancel)
        return LogStatus(floor_offset=0, indexed_offset=1, last_offset=2, tail_bytes=3)

    def repeated(
        self, _collection_id: str, _key: str, _request_hash: bytes, *, cancel: Cancel
    ) -> Appended | None:
        self._hold(cancel)
        return None

    def record_nothing(
        self, _collection_id: str, _key: str, _request_hash: bytes, *, cancel: Cancel
    ) -> Appended:
        self._hold(cancel)
        return Appended(1, 0)

    def append(
        self, _collection_id: str, operations: Operations, *, cancel: Cancel, **_more: Any
    ) -> Appended:
        self._hold(cancel)
        return Appended(1, len(operations))

    def _hold(self, cancel: Cancel) -> None:
        self.cancels.append(cancel)
        self.begun.release()
        while not self.go_on.wait(0.005):
            cancel.check()

    def wait_begun(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.begun.acquire(timeout=_WAIT_S)


@pytest.fixture
def held() -> Iterator[_Held]:
    role = _Held()
    yield role
    role.go_on.set()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


# -- ends of calls


def test_cancelling_ends_the_call_on_both_sides(held: _Held, threads: ThreadPoolExecutor) -> None:
    with served_role(held, RpcConfig()) as (_, log, query):
        for call, expected in (
            (lambda cancel: query.count("c", cancel=cancel), Cancelled),
            (lambda cancel: log.append("c", _ONE, cancel=cancel), OutcomeUnknown),
        ):
            cancel = Cancel()
            waiting: Future[Any] = threads.submit(call, cancel)
            held.wait_begun()
            cancel.cancel()
            assert type(waiting.exception(timeout=_WAIT_S)) is expected
            _assert_cancelled(held.cancels[-1])


def _assert_cancelled(cancel: Cancel) -> None:
    told = threading.Event()
    cancel.when_cancelled(told.set)
    assert told.wait(_WAIT_S)


def test_a_streamed_answer_is_cancelled_where_it_is(threads: ThreadPoolExecutor) -> None:
    class _Endless:
        begun = threading.Event()
        cancel: Cancel

        def get(self, _collection_id: str, _request: GetRequest, *, cancel: Cancel) -> Records:
            self.cancel = cancel
            self.begun.set()
            while True:
                cancel.check()
                threading.Event().wait(0.005)

    role, cancel = _Endless(), Cancel()
    with served_role(role, RpcConfig()) as (_, _, query):
        waiting = threads.submit(query.get, "c", GetRequest(), cancel=cancel)
        assert role.begun.wait(_WAIT_S)
        cancel.cancel()
        assert type(waiting.exception(timeout=_WAIT_S)) is Cancelled
        _assert_cancelled(role.cancel)


def test_the_deadline_travels(held: _Held) -> None:
    with served_role(held, RpcConfig()) as (_, log, query):
        with pytest.raises(DeadlineExceeded):
            query.count("c", cancel=Cancel(0.2))
        with pytest.raises((OutcomeUnknown, DeadlineExceeded)):
            log.append("c", _ONE, cancel=Cancel(0.2))
        for cancel in held.cancels:
            remaining_s = cancel.remaining_s()
            assert remaining_s is not None
            assert remaining_s <= 0.2
            _until(partial(_has_ended, cancel))


def _has_ended(cancel: Cancel) -> bool:
    try:
        cancel.check()
    except (DeadlineExceeded, Cancelled):
        return True
    return False


def test_a_call_without_a_deadline_gets_one(held: _Held) -> None:
    config = RpcConfig(call_timeout_s=0.2)
    with served_role(held, config) as (_, _, query), pytest.raises(DeadlineExceeded):
        query.count("c", cancel=Cancel())


def test_the_request_id_travels(held: _Held) -> None:
    held.go_on.set()
    with served_role(held, RpcConfig()) as (_, _, query):
        query.count("c", cancel=Cancel(request_id="request-1"))
        query.count("c", cancel=Cancel(10, request_id="request-2").child())
        query.count("c", cancel=Cancel())
    assert [cancel.request_id for cancel in held.cancels] == ["request-1", "request-2", None]


# Each of the calls that are asked beside reads and writes, direct and through who routes.
_BESIDE: dict[str, Callable[[Log, LogReader, Query, Cancel], object]] = {
    "indexing_status": lambda _log, _reader, query, cancel: query.indexing_status(
        "c", cancel=cancel
    ),
    "status": lambda _log, reader, _query, cancel: reader.status("c", cancel=cancel),
    "repeated": lambda log, _reader, _query, cancel: log.repeated("c", "k", b"h", cancel=cancel),
    "record_nothing": lambda log, _reader, _query, cancel: log.record_nothing(
        "c", "k", b"h", cancel=cancel
    ),
}


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("name", _BESIDE)
def test_every_call_has_its_deadline_request_id_and_end(
    held: _Held, threads: ThreadPoolExecutor, name: str, routed: bool
) -> None:
    with contextlib.ExitStack() as closing:
        _, log_client, query_client = closing.enter_context(served_role(held, RpcConfig()))
        log: Log = log_client
        query: Query = query_client
        if routed:
            log, query = closing.enter_context(_routed(log_client, query_client))

        def call(cancel: Cancel) -> object:
            return _BESIDE[name](log, log_client, query, cancel)

        late = Cancel(0.2, request_id="late")
        with pytest.raises((DeadlineExceeded, OutcomeUnknown)):
            call(late)
        gone = Cancel(20.0, request_id="gone")
        waiting = threads.submit(call, gone)
        held.wait_begun(2)
        gone.cancel()
        assert type(waiting.exception(timeout=_WAIT_S)) in (Cancelled, OutcomeUnknown)
        _assert_cancelled(held.cancels[1])
        _until(partial(_has_ended, held.cancels[0]))
        assert [cancel.request_id for cancel in held.cancels] == ["late", "gone"]
        remaining_s = held.cancels[1].remaining_s()
        assert remaining_s is not None
        assert remaining_s < 21.0  # On the way it is rounded up.


@contextlib.contextmanager
def _routed(log: LogClient, query: QueryClient) -> Iterator[tuple[RoutedLog, RoutedQuery]]:
    clock, members = SystemClock(), StaticMembership({"only": "its address"})
    rng = random.Random(1)
    with contextlib.ExitStack() as closing:
        logs: Nodes[Log] = Nodes(
            members, lambda _address: log, clock=clock, rng=rng, close=lambda _log: None
        )
        closing.callback(logs.close)
        queries: Nodes[Query] = Nodes(
            members, lambda _address: query, clock=clock, rng=rng, close=lambda _query: None
        )
        closing.callback(queries.close)
        budget = RetryBudget(clock)
        routed_log = RoutedLog(logs, budget=budget, ids=IdSource(), clock=clock)
        closing.callback(routed_log.close)
        routed_query = RoutedQuery(queries, budget=budget, clock=clock)
        closing.callback(routed_query.close)
        yield routed_log, routed_query


def test_slow_calls_are_logged(
    held: _Held, threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    with served_role(held, RpcConfig()) as (_, _, query), caplog.at_level(logging.WARNING):
        slow = threads.submit(query.count, "c", cancel=Cancel(request_id="request-3"))
        held.wait_begun()
        threading.Event().wait(1.1)
        held.go_on.set()
        assert slow.result(_WAIT_S) == 7
        _until(lambda: "slow call" in caplog.text)
    assert "method=Count" in caplog.text
    assert "request_id=request-3" in caplog.text


# -- pools


def test_writes_that_wait_leave_reads_and_health_alone(
    held: _Held, threads: ThreadPoolExecutor
) -> None:
    config = RpcConfig(write_threads=2, waiting_max=3)
    with served_role(held, config) as (server, log, query):
        writes = [threads.submit(log.append, "c", _ONE, cancel=Cancel()) for _ in range(5)]
        held.wait_begun(2)
        _until(lambda: server._pools["write"].is_full)
        with pytest.raises(Exhausted, match="too many write calls") as caught:
            log.append("c", _ONE, cancel=Cancel())
        assert caught.value.retry_after_s > 0
        with pytest.raises(Unavailable, match="not held"):  # A read.
            query.get("c", GetRequest(), cancel=Cancel())
        with channel(server.address, config) as opened:
            assert probe(opened)
            assert probe(opened, "ochredb.proto.v1.Log")
        assert held.begun.acquire(blocking=False) is False, "two at once"
        held.go_on.set()
        assert [each.result(_WAIT_S) for each in writes] == [Appended(1, 1)] * 5
        assert log.append("c", _ONE, cancel=Cancel()) == Appended(1, 1)


def _until(is_so: Callable[[], bool]) -> None:
    for _ in range(int(_WAIT_S / 0.005)):
        if is_so():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not come about")


def test_a_caller_that_left_makes_room(held: _Held, threads: ThreadPoolExecutor) -> None:
    config = RpcConfig(read_threads=1, waiting_max=1)
    with served_role(held, config) as (server, _, query):
        cancels = [Cancel(), Cancel()]
        calls = [threads.submit(query.count, "c", cancel=cancel) for cancel in cancels]
        held.wait_begun()
        _until(lambda: server._pools["read"].is_full)
        for cancel in cancels:
            cancel.cancel()
        assert all(type(call.exception(_WAIT_S)) is Cancelled for call in calls)
        _until(lambda: not server._pools["read"].is_full)
        held.go_on.set()
        assert query.count("c", cancel=Cancel()) == 7


# -- drain


def test_a_drain_under_load_loses_nothing(held: _Held, threads: ThreadPoolExecutor) -> None:
    with served_role(held, RpcConfig()) as (server, log, query):
        writes = [threads.submit(log.append, "c", _ONE, cancel=Cancel()) for _ in range(20)]
        reads = [threads.submit(query.count, "c", cancel=Cancel()) for _ in range(10)]
        held.wait_begun(30)
        watch = _watch(server)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        drained = threads.submit(server.drain, _WAIT_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for refused in (
            lambda: query.count("c", cancel=Cancel()),
            lambda: log.append("c", _ONE, cancel=Cancel()),
        ):
            with pytest.raises(Unavailable, match="shutting down; nothing was done") as caught:
                refused()
            assert type(caught.value) is Unavailable
        assert not drained.done()
        held.go_on.set()
        assert [each.result(_WAIT_S) for each in writes] == [Appended(1, 1)] * 20
        assert [each.result(_WAIT_S) for each in reads] == [7] * 10
        assert drained.result(_WAIT_S) is True
        assert server.drain(0.0) is True, "again"
        with pytest.raises(Unavailable) as caught:
            log.append("c", _ONE, cancel=Cancel())
        assert caught.value.detail == {"unreachable": True}


def _watch(server: RpcServer) -> Iterator[Any]:
    stub: Any = health_pb2_grpc.HealthStub(grpc.insecure_channel(server.address))
    responses: Iterator[Any] = stub.Watch(health_pb2.HealthCheckRequest(service=""))
    return responses


def test_what_does_not_finish_in_time_is_cancelled(
    held: _Held, threads: ThreadPoolExecutor
) -> None:
    with served_role(held, RpcConfig()) as (server, log, query):
        read = threads.submit(query.count, "c", cancel=Cancel())
        write = threads.submit(log.append, "c", _ONE, cancel=Cancel())
        held.wait_begun(2)
        assert server.drain(0.1) is False
        assert type(read.exception(_WAIT_S)) is Unavailable
        assert type(write.exception(_WAIT_S)) is OutcomeUnknown
        for cancel in held.cancels:
            _assert_cancelled(cancel)


def test_another_server_has_the_port(held: _Held) -> None:
    with served_role(held, RpcConfig()) as (server, _, _):
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(
            Unavailable,
            match=f"rpc_host, rpc_port: cannot listen on 127.0.0.1:{port}: Address already in use$",
        ):
            RpcServer(RpcConfig(port=port), clock=SystemClock()).start()
        with pytest.raises(
            Unavailable, match=r"on 192\.0\.2\.1:0: Cannot assign requested address$"
        ):
            RpcServer(RpcConfig(host="192.0.2.1", port=0), clock=SystemClock()).start()


def test_a_client_finds_a_server_that_was_started_again(held: _Held) -> None:
    held.go_on.set()
    with served_role(held, RpcConfig()) as (first, _, query):
        assert query.count("c", cancel=Cancel()) == 7
        first.stop()
        with pytest.raises(Unavailable):
            query.count("c", cancel=Cancel())
        config = RpcConfig(port=int(first.address.rpartition(":")[2]))
        with served_role(held, config):

            def answers() -> bool:
                with contextlib.suppress(Unavailable):
                    return query.count("c", cancel=Cancel()) == 7
                return False

            _until(answers)


# -- who may call, and what tools see


def test_calls_without_the_token_are_refused(held: _Held) -> None:
    held.go_on.set()
    config = RpcConfig(token="secret-token")
    assert "secret-token" not in repr(config)
    with served_role(held, config) as (server, log, query):
        assert query.count("c", cancel=Cancel()) == 7
        assert log.append("c", _ONE, cancel=Cancel()) == Appended(1, 1)
        for other in (RpcConfig(), RpcConfig(token="other")):
            with connected(server.address, other) as (log_, query_):
                with pytest.raises(Unavailable, match="no valid token"):
                    query_.count("c", cancel=Cancel())
                with pytest.raises(Unavailable, match="no valid token"):
                    log_.append("c", _ONE, cancel=Cancel())
                with pytest.raises(Unavailable, match="no valid token"):
                    log_.append_evaluated("c", lambda: _ONE, cancel=Cancel())
        with channel(server.address, RpcConfig()) as opened:
            assert probe(opened)
    assert len(held.cancels) == 2


@contextlib.contextmanager
def _connected(role: Any) -> Iterator[tuple[RpcServer, grpc.Channel]]:
    with served_role(role, RpcConfig()) as (server, _, _):
        opened = channel(server.address, RpcConfig())
        yield server, opened
        opened.close()


def test_health_is_told_per_service(held: _Held) -> None:
    with _connected(held) as (server, opened):
        for service in ("", "ochredb.proto.v1.Log", "ochredb.proto.v1.Query"):
            assert probe(opened, service)
        assert not probe(opened, "ochredb.proto.v1.Compactor")
        server.set_serving(False)
        assert not probe(opened)
        server.set_serving(True)
        assert probe(opened)
    with channel("127.0.0.1:1", RpcConfig()) as opened:
        assert not probe(opened)


def test_tools_can_list_the_services(held: _Held) -> None:
    with _connected(held) as (_, opened):
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(opened)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(stub.ServerReflectionInfo(iter([ask])))
    assert {service.name for service in answer.list_services_response.service} == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "ochredb.proto.v1.Log",
        "ochredb.proto.v1.Query",
    }


def test_a_server_that_gets_no_thread_goes_on_when_it_does(
    held: _Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.go_on.set()
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("rpc-read"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with served_role(held, RpcConfig()) as (_, log, query):
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(DeadlineExceeded):
            query.count("c", cancel=Cancel(0.2))
        assert log.append("c", _ONE, cancel=Cancel()) == Appended(1, 1)
        monkeypatch.undo()
        assert query.count("c", cancel=Cancel()) == 7
