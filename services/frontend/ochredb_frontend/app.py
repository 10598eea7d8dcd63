"""The application: a small dispatcher over the table of routes, and FastAPI for the pages.

Requests of up to a megabyte to the hot routes come whole (`App.exchange`), all others by ASGI. What
a reader would look for in middleware is here, once, around both: request ids, authentication, the
body limit, the deadline, cancellation, metrics and the slow-request log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ochredb.cancel import Cancel
from ochredb.crash_points import reach
from ochredb.errors import Unauthenticated
from ochredb.ids import IdSource
from ochredb.metrics import Metrics
from ochredb.peers import ON_LOOP_US_MAX
from ochredb.types import Appended, Op
from ochredb_frontend import wire
from ochredb_frontend.asgi import (
    Receive,
    Scope,
    Send,
    decoded,
    headers_of,
    lifespan,
    raw_path,
    send_response,
)
from ochredb_frontend.auth import TokenAuth
from ochredb_frontend.messages import (
    Request,
    Response,
    body_too_large,
    error_response,
)
from ochredb_frontend.pool import WorkerPool
from ochredb_frontend.pooled import PooledRead, answer_together
from ochredb_frontend.routes import ROUTES, Matcher, Route
from ochredb_frontend.service import Frontend
from ochredb_frontend.together import Together
from ochredb_frontend.watching import DisconnectedError, lost, resolve, watch

if TYPE_CHECKING:
    from ochredb_frontend.protocol import Exchange, Protocol
    from ochredb_frontend.web import Web

logger = logging.getLogger("ochredb.frontend")

_REQUEST_ID_CHARS_MAX = 128
_PAGES = ("/docs", "/openapi.json")
# The literal segments of /api/v2/tenants/{}/databases/{}/collections/{}/VERB.
_COLLECTION_LITERALS = ("api", "v2", "tenants", "databases", "collections")


Result = bytes | Response | Exception
Answer = Callable[[Result], None]


@dataclass(slots=True)
class _Call:
    """What is noted of a request: its path, its id, and when it began by the monotonic clock.

    tenant: whose limits it was let in by.
    """

    path: str
    request_id: str
    started_s: float
    operation: str = "unmatched"
    tenant: str | None = None


def _stays(_protocol: Protocol) -> None:
    """Nobody else would go on with the connection."""


class _BodyTooLargeError(Exception):
    """The body passed the limit while it was read."""


class App:
    """Serves one Frontend: requests to hot routes whole, where they may be, others over ASGI.

    Reads that answer from memory run on the event loop, small writes are submitted to the log from
    there; everything else runs in two bounded pools, one for reads, one for writes, whose threads
    tenants take in turns.
    """

    def __init__(self, frontend: Frontend, *, ids: IdSource | None = None) -> None:
        config = frontend.config
        self.frontend = frontend
        self.metrics = Metrics()
        self._config = config
        self.body_bytes_max = config.body_bytes_max
        self.connections_max = sys.maxsize  # The server knows better.
        self.on_reading: Callable[[Protocol], None] = _stays  # Told of connections that only read.
        self._clock, self._limits = frontend.clock, frontend.limits
        self._ids = ids or IdSource()
        self._auth = TokenAuth(config.token)
        self._pools = {
            "read": WorkerPool("read", threads=config.read_threads, queue_max=config.queue_max),
            "write": WorkerPool("write", threads=config.write_threads, queue_max=config.queue_max),
        }
        self.together = Together(frontend)
        self._in_flight = 0
        self._hot: dict[tuple[str, str], Route] = {
            (route.method, route.path.rsplit("/", 1)[1]): route for route in ROUTES if route.hot
        }
        metrics = Route(
            method="GET", path="/metrics", operation="metrics", handler=self._metrics_page,
            tag="System", summary="Figures for Prometheus", pool="inline",
        )  # fmt: skip
        self._matcher = Matcher((*ROUTES, metrics))
        self._web: Web | None = None  # Built when a page is first asked for.
        for name, pool in self._pools.items():
            self.metrics.gauge(
                f"ochredb_{name}_pool_pending",
                f"Requests that wait for or run on a thread of the {name} pool.",
                partial(lambda pool: pool.pending, pool),
            )
        self.metrics.gauge(
            "ochredb_requests_in_flight", "Requests being answered.", lambda: self._in_flight
        )

    def close(self) -> None:
        """Wait for running work; call after the server has stopped accepting requests."""
        self.together.close()
        for pool in self._pools.values():
            pool.close()

    # -- ASGI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            await self._http(scope, receive, send)
        elif kind == "lifespan":
            await lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = decoded(scope["headers"])
        method: str = scope["method"]
        path = raw_path(scope)
        call = self._begin(path, headers)
        try:
            self._auth.check(path, headers)
            hot = self._hot_route(method, path)
            if hot is not None:
                route, parameters = hot
                call.operation = route.operation
                self._enter(call, parameters)
                request = self._new_request(method, call, scope["query_string"], headers)
                request.parameters = parameters
                if method == "POST":
                    request.body = await self._read_body(headers, receive)
                response = await self._run(route, request, receive)
            elif path in _PAGES:
                call.operation, response = await self._serve_page(scope, headers, path, receive)
            else:
                response = await self._serve_other(scope, call, headers, receive)
        except _BodyTooLargeError:
            response = body_too_large()
        except DisconnectedError:
            return
        except Exception as error:
            response = error_response(error)
        finally:
            self._leave(call)
        await send_response(scope, send, response, call.request_id)
        self._note(call, response.status)

    # -- whole requests

    def lets_in(self, fields: Mapping[bytes, bytes]) -> bool:
        """Whether a request with these headers has what it takes to be let in."""
        try:
            self._auth.check("", decoded(fields.items()))
        except Unauthenticated:
            return False
        return True

    def exchange(self, exchange: Exchange) -> bool:
        """Answer a whole request now or later; False if it is not for a hot route.

        Called on the event loop. What is quick is answered before this returns, or at the end of
        the loop's turn together with others; the rest in a pool.
        """
        method, path = exchange.method.decode("latin-1"), exchange.path.decode("latin-1")
        hot = self._hot_route(method, path)
        if hot is None:
            return False
        headers = decoded(exchange.fields.items())
        call = self._begin(path, headers)
        route, parameters = hot
        call.operation = route.operation
        request = self._new_request(method, call, exchange.query_string, headers)
        request.body, request.parameters = exchange.body, parameters
        answer = partial(self._answer, exchange, call)
        receive = partial(lost, exchange)
        waiting: Coroutine[Any, Any, Response] | None
        try:
            self._auth.check(path, headers)
            exchange.note_read(route.pool == "read")
            self._enter(call, parameters)
            waiting = self._begin_write(route, request, receive)
            if waiting is None:
                work = self._begin_read(route, request, answer)
                if work is not None:
                    waiting = self._in_pool(route, work, request, receive)
        except Exception as error:
            answer(error)
            return True
        if waiting is not None:
            exchange.spawn(self._answer_later(waiting, call, answer))
        return True

    async def _answer_later(
        self, waiting: Coroutine[Any, Any, Response], call: _Call, answer: Answer
    ) -> None:
        try:
            response = await waiting
        except DisconnectedError:
            self._leave(call)
        except Exception as error:
            answer(error)
        else:
            reach("answer.sending")
            answer(response)
            reach("answer.sent")

    def _answer(self, exchange: Exchange, call: _Call, result: Result) -> None:
        self._leave(call)
        if isinstance(result, bytes):
            response = Response(200, result)
        elif isinstance(result, Response):
            response = result
        else:
            response = error_response(result)
        head = b"".join([b"%b: %b\r\n" % one for one in headers_of(response, call.request_id)])
        exchange.respond(response.status, head, response.body)
        self._note(call, response.status)

    # -- what every request has

    def _begin(self, path: str, headers: Mapping[str, str]) -> _Call:
        self._in_flight += 1
        return _Call(path, self._request_id(headers), self._clock.monotonic_s())

    def _enter(self, call: _Call, parameters: Mapping[str, str]) -> None:
        """Raises Exhausted for a request beyond the limits of its tenant."""
        if self._limits is not None:
            tenant = parameters.get("tenant")
            if tenant is not None:
                self._limits.enter(tenant)
                call.tenant = tenant

    def _leave(self, call: _Call) -> None:
        self._in_flight -= 1
        if call.tenant is not None and self._limits is not None:
            self._limits.leave(call.tenant)

    def _note(self, call: _Call, status: int) -> None:
        duration_s = self._clock.monotonic_s() - call.started_s
        self.metrics.observe(call.operation, status, duration_s)
        if duration_s >= self._config.slow_request_s:
            logger.warning(
                "slow request: operation=%s status=%d duration_ms=%.0f request_id=%s path=%s",
                call.operation, status, duration_s * 1000, call.request_id, call.path,
            )  # fmt: skip

    def _hot_route(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        """The hot route of a path, and its parameters."""
        parts = path.split("/")
        if len(parts) != 10 or (*parts[1:4], parts[5], parts[7]) != _COLLECTION_LITERALS:
            return None
        route = self._hot.get((method, parts[9]))
        if route is None:
            return None
        parameters = {"tenant": parts[4], "database": parts[6], "collection_id": parts[8]}
        if "%" in path:
            parameters = {name: unquote(value) for name, value in parameters.items()}
        return route, parameters

    def _new_request(
        self, method: str, call: _Call, query_string: bytes, headers: Mapping[str, str]
    ) -> Request:
        return Request(
            method=method,
            path=call.path,
            query_string=query_string.decode("latin-1"),
            headers=headers,
            cancel=self._new_cancel(call.request_id),
        )

    def _request_id(self, headers: Mapping[str, str]) -> str:
        given = headers.get("x-request-id") or headers.get("chroma-trace-id")
        if (
            given
            and len(given) <= _REQUEST_ID_CHARS_MAX
            and given.isascii()
            and given.isprintable()
        ):
            return given
        return self._ids.uuid7()

    async def _read_body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body. Raises _BodyTooLargeError; if the length is announced, before reading."""
        limit = self._config.body_bytes_max
        announced = headers.get("content-length")
        if announced is not None and announced.isdigit() and int(announced[:20]) > limit:
            raise _BodyTooLargeError
        chunks: list[bytes] = []
        size_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise DisconnectedError
            chunk = message.get("body", b"")
            size_bytes += len(chunk)
            if size_bytes > limit:
                raise _BodyTooLargeError
            chunks.append(chunk)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    # -- running handlers

    async def _run(self, route: Route, request: Request, receive: Receive) -> Response:
        """Answer on the event loop if that is quick, in the route's pool otherwise."""
        if route.pool == "inline":
            return route.handler(self.frontend, request)
        answers: list[Result] = []
        work = self._begin_read(route, request, answers.append, alone=True)
        if work is not None:
            return await self._in_pool(route, work, request, receive)
        (answer,) = answers
        if isinstance(answer, BaseException):
            raise answer
        return Response(200, answer) if isinstance(answer, bytes) else answer

    def _begin_read(
        self, route: Route, request: Request, answer: Answer, *, alone: bool = False
    ) -> Callable[[], Response] | None:
        """Have `answer` called with what a quick read finds, or return the work for a pool.

        alone: now; else perhaps together with other reads, when this turn of the loop is over.
        """
        if route.parse_read is None or not self._parses_quickly(request.body):
            return partial(route.handler, self.frontend, request)
        read = route.parse_read(request, self._config)
        quick = self.frontend.quick(read)
        if quick is not None and alone and quick.quick.search_us <= ON_LOOP_US_MAX:
            answer(quick.run(request.cancel))
            return None
        if quick is not None and not alone and self.together.run(quick, request.cancel, answer):
            return None
        return PooledRead(self.frontend, read, request.cancel)

    def _begin_write(
        self, route: Route, request: Request, receive: Receive
    ) -> Coroutine[Any, Any, Response] | None:
        """Submit a small write to the log and return what waits for its answer, or None.

        Parsing and encoding it here takes less than handing it to another thread would.
        """
        if route.writes is None or len(request.body) > self._config.inline_write_bytes_max:
            return None
        if route.writes is Op.DELETE and not self._parses_quickly(request.body):
            return None  # By a filter, perhaps, with patterns to compile.
        submission = wire.parse_submission(request, route.writes, self._config)
        if submission is None:
            return None
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Response] = loop.create_future()

        def deliver(outcome: Appended | BaseException) -> None:
            result = submission.answer if isinstance(outcome, Appended) else outcome
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits.
                loop.call_soon_threadsafe(resolve, future, result)

        self.frontend.submit(submission.write, request.cancel, deliver)
        return self._watched(future, request.cancel, receive)

    def _parses_quickly(self, body: bytes) -> bool:
        """Whether the event loop may parse a body: it is short and has no pattern to compile.

        A JSON escape could spell "$regex" in another way, so a body with one counts as slow. Single
        characters are looked for first: that takes a hundredth of the time.
        """
        if len(body) > self._config.inline_body_bytes_max:
            return False
        return (b"$" not in body or b"regex" not in body) and (
            b"\\" not in body or b"\\u" not in body
        )

    async def _in_pool(
        self, route: Route, work: Callable[[], Response], request: Request, receive: Receive
    ) -> Response:
        cancel, tenant = request.cancel, request.parameters.get("tenant")

        def checked() -> Response:
            cancel.check()  # It may have waited in the queue for too long.
            try:
                return work()
            except Exception as error:
                return error_response(error)

        pool = self._pools[route.pool]
        group = work.group if isinstance(work, PooledRead) else None
        if isinstance(work, PooledRead) and group is not None:
            future = pool.submit_together(group, work, answer_together, tenant=tenant)
        else:
            future = pool.submit(checked, tenant=tenant)
        return await self._watched(future, cancel, receive)

    async def _watched(
        self, future: asyncio.Future[Response], cancel: Cancel, receive: Receive
    ) -> Response:
        """The future's result, unless its time is up or its client goes away."""
        loop = asyncio.get_running_loop()
        watcher: asyncio.Task[None] | None = None

        def begin_watching() -> None:
            nonlocal watcher
            watcher = loop.create_task(watch(future, cancel, receive))

        # Most requests end before this; only the others pay for a task.
        timer = loop.call_later(self._config.disconnect_check_s, begin_watching)
        try:
            return await future
        finally:
            timer.cancel()
            if watcher is not None:
                watcher.cancel()

    # -- everything that is not hot

    async def _serve_other(
        self, scope: Scope, call: _Call, headers: dict[str, str], receive: Receive
    ) -> Response:
        """The answer of any route of the table, or the refusal of what is none."""
        matched = self._matcher.match(scope["method"], call.path)
        if isinstance(matched, Response):
            return matched
        route, parameters = matched
        call.operation = route.operation
        self._enter(call, parameters)
        request = Request(
            method=route.method,
            path=call.path,
            query_string=scope["query_string"].decode("latin-1"),
            headers=headers,
            body=b"" if route.request is None else await self._read_body(headers, receive),
            cancel=self._new_cancel(call.request_id),
            parameters=parameters,
        )
        return await self._run(route, request, receive)

    async def _serve_page(
        self, scope: Scope, headers: dict[str, str], path: str, receive: Receive
    ) -> tuple[str, Response]:
        """Let FastAPI answer; it is imported and built in a thread the first time."""
        web = self._web
        if web is None:
            web = self._web = await self._pools["read"].submit(self.build_web)
        return await web.answer(scope, path, receive, partial(self._read_body, headers, receive))

    def build_web(self) -> Web:
        """The same application in FastAPI: pages and table. Cost: 0.3 s and 20 MB at first."""
        from ochredb_frontend.web import Web

        return Web(ROUTES, self._run, self._new_cancel)

    def _new_cancel(self, request_id: str | None = None) -> Cancel:
        return Cancel(self._config.deadline_s, self._clock, request_id)

    def _metrics_page(self, _frontend: Frontend, _request: Request) -> Response:
        return Response(200, self.metrics.text(), content_type="text/plain; version=0.0.4")
