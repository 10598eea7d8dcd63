"""Errors between processes: the same class on both sides, and what a lost call means (I8, I12)."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc
import pytest

from ochredb import errors
from ochredb.cancel import Cancel, Cancelled
from ochredb.clock import SystemClock
from ochredb.errors import (
    Corrupt,
    DeadlineExceeded,
    Exhausted,
    Internal,
    InvalidArgument,
    Kind,
    OchreError,
    OutcomeUnknown,
    OutOfMemory,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from ochredb.fragment import Unfoldable
from ochredb.peers import QueryNode
from ochredb.rpc import failures
from ochredb.rpc.channel import channel
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.query_client import QueryClient
from ochredb.rpc.server import RpcServer
from ochredb.types import Op
from ochredb_query.grpc import QueryServicer

from .kernel import operations
from .rpc_kernel import connected

CLASSES = sorted(
    {
        found
        for found in [*vars(errors).values(), Cancelled]
        if isinstance(found, type) and issubclass(found, OchreError) and found is not OchreError
    },
    key=lambda found: found.__name__,
)
_MESSAGE = "it is so: «größe» 🦀\nsecond line"


class _Failing:
    """A query role that fails as it is told."""

    failure: BaseException = Internal("not told")

    def count(self, _collection_id: str, *, cancel: Cancel) -> int:
        raise self.failure


@pytest.fixture(scope="module")
def failing() -> Iterator[tuple[_Failing, QueryClient]]:
    config, role = RpcConfig(), _Failing()
    server = RpcServer(config, clock=SystemClock())
    server.add(QueryServicer(cast("QueryNode", role), config))
    server.start()
    with connected(server.address, config) as (_, query):
        yield role, query
    server.stop()


def _raised(failing: tuple[_Failing, QueryClient], failure: BaseException) -> OchreError:
    role, query = failing
    role.failure = failure
    with pytest.raises(OchreError) as caught:
        query.count("c", cancel=Cancel())
    return caught.value


def test_the_table_has_every_class() -> None:
    assert len(CLASSES) >= 20
    assert {found.__name__: found for found in CLASSES} == {
        name: found for name, found in failures.CLASSES.items() if found is not OchreError
    }


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_caller_raises_the_same(
    failing: tuple[_Failing, QueryClient], kind: type[OchreError]
) -> None:
    if kind is Unauthenticated:  # The process is unwelcome, which is no matter of its client.
        assert type(_raised(failing, kind("token"))) is Unavailable
        return
    detail: dict[str, Any] = {"retry_after_s": 2.5, "field": "ids", "numbers": [1, -(2**63), 0.1]}
    raised = _raised(failing, kind(_MESSAGE, **detail))
    assert type(raised) is kind
    assert str(raised) == _MESSAGE
    assert raised.detail == detail
    if isinstance(raised, Exhausted):
        assert raised.retry_after_s == 2.5


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_tools_see_a_status(failing: tuple[_Failing, QueryClient], kind: type[OchreError]) -> None:
    role, query = failing
    role.failure = kind("short")
    call = query._stub.Count.future(_count_request(), timeout=10)
    assert call.exception() is not None
    assert call.code() is grpc.StatusCode[kind("short").kind.grpc]
    assert call.details() == f"{kind.__name__}: short"


def test_every_kind_has_a_status_of_grpc() -> None:
    for kind in Kind:
        assert grpc.StatusCode[kind.grpc] is not grpc.StatusCode.OK


def test_a_class_that_is_not_known_becomes_the_one_above(
    failing: tuple[_Failing, QueryClient],
) -> None:
    raised = _raised(failing, Unfoldable("bytes that no release could fold"))
    assert type(raised) is Corrupt

    class _FromTheFuture(OchreError):
        kind = Kind.CONFLICT

    assert type(_raised(failing, _FromTheFuture("?"))) is Internal


def test_bugs_are_internal_and_logged(
    failing: tuple[_Failing, QueryClient], caplog: pytest.LogCaptureFixture
) -> None:
    role, query = failing
    role.failure = KeyError("x")
    with caplog.at_level(logging.ERROR, "ochredb.rpc"), pytest.raises(Internal, match="KeyError"):
        query.count("c", cancel=Cancel(request_id="request-7"))
    assert "request_id=request-7" in caplog.text
    assert "Traceback" in caplog.text
    assert type(_raised(failing, MemoryError())) is OutOfMemory


def test_a_long_message_and_a_large_detail_fit_into_a_trailer(
    failing: tuple[_Failing, QueryClient],
) -> None:
    failure = Exhausted("🦀" * 100_000, retry_after_s=7.0, everything="x" * 100_000)
    raised = _raised(failing, failure)
    assert isinstance(raised, Exhausted)
    assert str(raised) == "🦀" * 500
    assert raised.detail == {"retry_after_s": 7.0}
    failure = Exhausted("🦀" * 100_000, retry_after_s=7.0, more="x" * 1_900)
    assert _raised(failing, failure).detail == failure.detail


def test_whom_the_other_side_could_not_reach_is_not_unreachable_here(
    failing: tuple[_Failing, QueryClient],
) -> None:
    raised = _raised(failing, Unavailable("the catalog is down", unreachable=True, host="db"))
    assert raised.detail == {"host": "db"}


# -- calls that fail on the way


def _count_request() -> Any:
    from ochredb.proto.v1 import query_pb2

    return query_pb2.CountRequest(collection_id="c")


@contextlib.contextmanager
def _listening(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """Something that listens and is no server of ours: `serve` has each connection."""
    sock = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = sock.accept()
                serve(connection)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"127.0.0.1:{sock.getsockname()[1]}"
    finally:
        sock.shutdown(socket.SHUT_RDWR)
        sock.close()
        thread.join()


def _assert_never_sent(address: str) -> None:
    with connected(address) as (log, query):
        request = operations(Op.ADD, ["a"], [[1.0]])
        for call in (
            lambda: query.count("c", cancel=Cancel(20)),
            lambda: log.append("c", request, request_id="r", cancel=Cancel(20)),
        ):
            with pytest.raises(Unavailable) as caught:
                call()
            assert type(caught.value) is Unavailable
            assert caught.value.detail == {"unreachable": True}


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    _assert_never_sent(f"127.0.0.1:{port}")


def test_the_name_is_unknown() -> None:
    _assert_never_sent("no-such-host.invalid:1")


def test_what_listens_hangs_up() -> None:
    with _listening(lambda connection: connection.close()) as address:
        _assert_never_sent(address)


def test_what_listens_says_nothing() -> None:
    held: list[socket.socket] = []
    with _listening(held.append) as address, connected(address) as (log, query):
        with pytest.raises(DeadlineExceeded):
            query.count("c", cancel=Cancel(0.2))
        request = operations(Op.ADD, ["a"], [[1.0]])
        with pytest.raises(OutcomeUnknown) as caught:
            log.append("c", request, request_id="r", cancel=Cancel(0.2))
        assert caught.value.detail == {}
    for each in held:
        each.close()


def test_a_server_without_the_role() -> None:
    server = RpcServer(RpcConfig(), clock=SystemClock())
    server.start()
    with connected(server.address) as (log, query):
        with pytest.raises(Unimplemented):
            query.count("c", cancel=Cancel())
        with pytest.raises(Unimplemented):
            log.append("c", operations(Op.ADD, ["a"], [[1.0]]), cancel=Cancel())
    server.stop()


def test_a_request_that_is_too_large() -> None:
    config = RpcConfig(message_bytes_max=100_000, chunk_bytes=10_000)
    role = _Failing()
    server = RpcServer(config, clock=SystemClock())
    server.add(QueryServicer(cast("QueryNode", role), config))
    server.start()
    large = _count_request()
    large.collection_id = "x" * 200_000
    for client in (RpcConfig(), config):  # Refused there, and here.
        opened = channel(server.address, client)
        calls = QueryClient(opened, client)
        with pytest.raises(errors.TooLarge, match="larger than max"):
            calls._calls.unary(calls._stub.Count, large, Cancel())
        calls.close()
    server.stop()


def test_a_closed_client() -> None:
    server = RpcServer(RpcConfig(), clock=SystemClock())
    server.start()
    with connected(server.address) as (log, query):
        log.close()
        query.close()
        with pytest.raises(Unavailable):
            query.count("c", cancel=Cancel())
        with pytest.raises(Unavailable):
            log.append("c", operations(Op.ADD, ["a"], [[1.0]]), cancel=Cancel())
    server.stop()


def test_what_could_never_be_written_is_refused_before_the_call() -> None:
    with connected("127.0.0.1:1") as (log, _), pytest.raises(InvalidArgument):
        log.append("c", operations(Op.ADD, ["a"]), cancel=Cancel())


@pytest.mark.parametrize("package", ["grpc", "grpc_health", "google.protobuf"])
def test_what_is_not_installed_is_named(package: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; import ochredb.rpc.config"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "InvalidArgument: calls between processes need gRPC" in done.stderr
    assert "ochredb[cluster]" in done.stderr
