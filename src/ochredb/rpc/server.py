"""A gRPC server for the roles of a process: pools, errors, health, reflection, TLS, drain.

A servicer is an object with `service`, the name of its service in `ochredb.proto.v1`, `pools`, the
kind of pool for each of its methods, and the methods, in snake case, given a request (or the
iterator of requests) and a `Cancel`; they return the reply, or an iterator of replies, and raise
OchreErrors. What is wanted of every call is here, once.
"""

from __future__ import annotations

import hmac
import logging
import math
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ochredb.cancel import Cancel, Cancelled
from ochredb.clock import Clock
from ochredb.errors import (
    Exhausted,
    Internal,
    OchreError,
    Unauthenticated,
    Unavailable,
)
from ochredb.rpc import failures
from ochredb.rpc.calls import REQUEST_ID_KEY, TOKEN_KEY, bearer
from ochredb.rpc.channel import connection_options
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.pools import BoundedPool
from ochredb.rpc.tls import server_credentials

log = logging.getLogger("ochredb.rpc")

PACKAGE = "ochredb.proto.v1"
_RETRY_AFTER_S = 0.5
_SLOW_S = 1.0
_LAST_BYTES_S = 1.0  # For what was answered to leave the process.
_FOREVER_S = 1e6  # What grpc says remains of a call without a deadline.

Handler = Any  # grpc.RpcMethodHandler, of whatever messages.


class Servicer(Protocol):
    """What `RpcServer.add` takes; see the module."""

    service: ClassVar[str]
    pools: ClassVar[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class _Method:
    """work: the servicer's. slow_s: calls that take longer are logged."""

    name: str
    slow_s: float
    work: Callable[..., Any]


class RpcServer:
    """One address. `start`, then `drain` or `stop`; all idempotent."""

    def __init__(self, config: RpcConfig, *, clock: Clock) -> None:
        self._config, self._clock = config, clock
        self._pools = {
            kind: BoundedPool(kind, threads, config.waiting_max)
            for kind, threads in (
                ("write", config.write_threads),
                ("read", config.read_threads),
                ("share", config.read_threads),
                ("compactor", config.compactor_threads),
            )
        }
        self._handlers: dict[str, tuple[Handler, BoundedPool]] = {}
        self._services: list[str] = []
        self._health_pool = ThreadPoolExecutor(2, thread_name_prefix="rpc-health")
        # Reflection, and refusals.
        self._other_pool = ThreadPoolExecutor(4, thread_name_prefix="rpc-other")
        self._health = health.HealthServicer(
            experimental_non_blocking=True, experimental_thread_pool=self._health_pool
        )
        self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server: grpc.Server | None = None
        self._port = 0
        self._draining = False
        self._lock = threading.Lock()

    def add(self, servicer: Servicer) -> None:
        """Offer a service. Before `start`."""
        name = f"{PACKAGE}.{servicer.service}"
        service = descriptor_pool.Default().FindServiceByName(name)
        for method in service.methods:
            snake = re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower()
            pool = self._pools[servicer.pools[snake]]
            handler = _handler(method, self._behaviour(method, getattr(servicer, snake), pool))
            self._handlers[f"/{name}/{method.name}"] = handler, pool
        self._services.append(name)

    def start(self) -> int:
        """Listen; returns the port. Raises Unavailable if the address cannot be had."""
        config = self._config
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        server = grpc.server(self._other_pool, handlers=[_Handlers(self)], options=_options(config))
        health_pb2_grpc.add_HealthServicer_to_server(
            _Health(self._health, self._health_pool), server
        )
        reflection.enable_server_reflection(names, server)
        address = f"{config.host}:{config.port}"
        try:
            if config.tls_cert_path is None:
                self._port = server.add_insecure_port(address)
            else:
                self._port = server.add_secure_port(address, server_credentials(config))
        except RuntimeError as error:
            cause = _why_not(config.host, config.port) or error
            raise Unavailable(f"rpc_host, rpc_port: cannot listen on {address}: {cause}") from error
        server.start()
        self._server = server
        self.set_serving(True)
        return self._port

    @property
    def address(self) -> str:
        return f"{self._config.host}:{self._port}"

    def set_serving(self, serving: bool) -> None:
        """What health checks are told; calls are taken all the same."""
        response = health_pb2.HealthCheckResponse
        status = response.SERVING if serving else response.NOT_SERVING
        for name in ("", *self._services):
            self._health.set(name, status)

    def drain(self, timeout_s: float) -> bool:
        """Refuse new calls (Unavailable: nothing was done), let those that run finish, stop.

        Returns whether all did within the time; the others are cancelled.
        """
        with self._lock:
            server, self._server = self._server, None
        if server is None:
            return True
        self._draining = True
        self._health.enter_graceful_shutdown()
        deadline = self._clock.monotonic_s() + timeout_s
        finished = all(
            pool.wait_idle(max(0.0, deadline - self._clock.monotonic_s()))
            for pool in self._pools.values()
        )
        if not finished:
            log.warning("calls did not finish within %.1f s of draining: cancelled", timeout_s)
        self._end(server, _LAST_BYTES_S if finished else None)
        return finished

    def stop(self) -> None:
        """Now: calls that run are cancelled."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            self._draining = True
            self._end(server, None)

    def _end(self, server: grpc.Server, grace_s: float | None) -> None:
        server.stop(grace_s).wait()
        for pool in (*self._pools.values(), self._health_pool, self._other_pool):
            pool.shutdown(wait=False)

    # -- one call

    def find(self, method: str, metadata: Any) -> Handler | None:
        """How to answer a call; asked by grpc's own thread, so it must be quick."""
        found = self._handlers.get(method)
        if found is None:
            return None
        handler, pool = found
        refusal = self._refusal(pool, metadata)
        return handler if refusal is None else _refusing(handler, refusal)

    def _refusal(self, pool: BoundedPool, metadata: Any) -> OchreError | None:
        if self._draining:
            return Unavailable("this node is shutting down; nothing was done", draining=True)
        token = self._config.token
        if token is not None:
            given = dict(metadata or ()).get(TOKEN_KEY, "")
            if not hmac.compare_digest(str(given), bearer(token)):
                return Unauthenticated("the call carries no valid token")
        if pool.is_full:
            text = f"too many {pool.kind} calls wait on this node"
            return Exhausted(text, retry_after_s=_RETRY_AFTER_S)
        return None

    def _behaviour(
        self, method: MethodDescriptor, work: Callable[..., Any], pool: BoundedPool
    ) -> Callable[..., Any]:
        run: Callable[..., Any] = self._stream if method.server_streaming else self._unary
        # What a compactor is asked for takes as long as it takes.
        slow_s = math.inf if pool.kind == "compactor" else _SLOW_S
        return _in_pool(partial(run, _Method(method.name, slow_s, work)), pool)

    def _unary(self, method: _Method, request: Any, context: grpc.ServicerContext) -> Any:
        cancel = self._cancel(context)
        started_s = self._clock.monotonic_s()
        try:
            return method.work(request, cancel)
        except BaseException as error:
            self._fail(method, context, cancel, error)
        finally:
            self._note(method, cancel, started_s)

    def _stream(
        self, method: _Method, request: Any, context: grpc.ServicerContext
    ) -> Iterator[Any]:
        cancel = self._cancel(context)
        started_s = self._clock.monotonic_s()
        try:
            yield from method.work(request, cancel)
        except Exception as error:
            self._fail(method, context, cancel, error)
        finally:
            self._note(method, cancel, started_s)

    def _cancel(self, context: grpc.ServicerContext) -> Cancel:
        remaining_s: float | None = context.time_remaining()
        if remaining_s is not None and remaining_s > _FOREVER_S:
            remaining_s = None
        cancel = Cancel(remaining_s, self._clock)
        for key, value in context.invocation_metadata():
            if key == REQUEST_ID_KEY:
                cancel.request_id = str(value)
        if not context.add_callback(cancel.cancel):
            cancel.cancel()
        return cancel

    def _fail(
        self, method: _Method, context: grpc.ServicerContext, cancel: Cancel, error: BaseException
    ) -> None:
        failure = failures.of_exception(error)
        if isinstance(failure, Internal):
            log.exception("%s failed: request_id=%s", method.name, cancel.request_id)
        elif failure.kind.http >= 500 and not isinstance(failure, Cancelled):
            log.warning(
                "%s failed: request_id=%s error=%s", method.name, cancel.request_id, failure
            )
        _abort(context, failure)

    def _note(self, method: _Method, cancel: Cancel, started_s: float) -> None:
        duration_s = self._clock.monotonic_s() - started_s
        if duration_s > method.slow_s:
            log.warning(
                "slow call: method=%s duration_ms=%.0f request_id=%s",
                method.name, duration_s * 1e3, cancel.request_id,
            )  # fmt: skip


class _Handlers(grpc.GenericRpcHandler):
    """Asks the server, call by call."""

    def __init__(self, server: RpcServer) -> None:
        self._server = server

    def service(self, details: grpc.HandlerCallDetails) -> Handler | None:
        return self._server.find(details.method, details.invocation_metadata)


class _Health:
    """The standard servicer; its checks have threads of their own too."""

    def __init__(self, servicer: health.HealthServicer, pool: ThreadPoolExecutor) -> None:
        self.Check = _in_pool(partial(servicer.Check), pool)
        self.List = _in_pool(partial(servicer.List), pool)
        self.Watch = servicer.Watch


def _in_pool(behaviour: partial[Any], pool: ThreadPoolExecutor) -> Callable[..., Any]:
    """grpc then runs it there instead of in the server's own pool."""
    behaviour.experimental_thread_pool = pool  # type: ignore[attr-defined]
    return behaviour


def _handler(method: MethodDescriptor, behaviour: Callable[..., Any]) -> Handler:
    request = message_factory.GetMessageClass(method.input_type)
    reply = message_factory.GetMessageClass(method.output_type)
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    return makers[method.client_streaming, method.server_streaming](
        behaviour,
        request_deserializer=request.FromString,
        response_serializer=reply.SerializeToString,
    )


def _refusing(handler: Handler, refusal: OchreError) -> Handler:
    """Refuses without reading the request."""

    def refuse(_requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        _abort(context, refusal)

    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    return grpc.stream_unary_rpc_method_handler(refuse)


def _abort(context: grpc.ServicerContext, failure: OchreError) -> None:
    context.set_trailing_metadata(((failures.FAILURE_KEY, failures.encode(failure)),))
    context.abort(grpc.StatusCode[failure.kind.grpc], failures.summary(failure))


def _options(config: RpcConfig) -> list[tuple[str, str | int]]:
    return [
        *connection_options(config),
        ("grpc.so_reuseport", 0),
        # Clients of the same cluster ask as often as its settings say.
        ("grpc.http2.min_ping_interval_without_data_ms", int(config.keepalive_s * 500)),
    ]


def _why_not(host: str, port: int) -> str | None:
    """Why one cannot listen there, which grpc does not tell; None: one can by now."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
            trial.listen(1)
    except OSError as error:
        return error.strerror
    return None
