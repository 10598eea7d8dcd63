"""The ASGI application: a small dispatcher over the table of routes, and FastAPI for the pages.

What a reader would look for in middleware is here, once, around both: request ids, authentication,
the body limit, the deadline, cancellation, metrics and the slow-request log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ochredb.cancel import Cancel
from ochredb.errors import DeadlineExceeded
from ochredb.ids import IdSource
from ochredb_frontend.auth import TokenAuth
from ochredb_frontend.messages import (
    Request,
    Response,
    body_too_large,
    error_response,
)
from ochredb_frontend.metrics import Metrics
from ochredb_frontend.pool import WorkerPool
from ochredb_frontend.routes import ROUTES, Matcher, Route
from ochredb_frontend.service import Frontend
from ochredb_frontend.together import Together

if TYPE_CHECKING:
    from ochredb_frontend.web import Web

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger("ochredb.frontend")

_REQUEST_ID_CHARS_MAX = 128
_DEADLINE_GRACE_S = 0.25  # Work that checks its deadline gets this long to say so itself.
_JSON = b"application/json"
_PAGES = ("/docs", "/openapi.json")
# The literal segments of /api/v2/tenants/{}/databases/{}/collections/{}/VERB.
_COLLECTION_LITERALS = ("api", "v2", "tenants", "databases", "collections")


class _BodyTooLargeError(Exception):
    """The body passed the limit while it was read."""


class _DisconnectedError(Exception):
    """The client went away before its request was complete."""


class App:
    """Serves one Frontend over ASGI.

    Reads that answer from memory run on the event loop; everything else in two bounded pools, one
    for reads, one for writes.
    """

    def __init__(self, frontend: Frontend, *, ids: IdSource | None = None) -> None:
        config = frontend.config
        self.frontend = frontend
        self.metrics = Metrics()
        self._config = config
        self.body_bytes_max = config.body_bytes_max
        self._clock = frontend.clock
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
        for pool in self._pools.values():
            pool.close()

    # -- ASGI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            await self._http(scope, receive, send)
        elif kind == "lifespan":
            await _lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        request_id = self._request_id(headers)
        method: str = scope["method"]
        path = _raw_path(scope)
        started_s = self._clock.monotonic_s()
        operation = "unmatched"
        self._in_flight += 1
        try:
            self._auth.check(path, headers)
            parts = path.split("/")
            route = None
            if len(parts) == 10 and (*parts[1:4], parts[5], parts[7]) == _COLLECTION_LITERALS:
                route = self._hot.get((method, parts[9]))
            if route is not None:
                operation = route.operation
                request = Request(
                    method=method,
                    path=path,
                    query_string=scope["query_string"].decode("latin-1"),
                    headers=headers,
                    cancel=Cancel(self._config.deadline_s, self._clock),
                    parameters={
                        "tenant": unquote(parts[4]),
                        "database": unquote(parts[6]),
                        "collection_id": unquote(parts[8]),
                    },
                )
                if method == "POST":
                    request.body = await self._read_body(headers, receive)
                response = await self._run(route, request, receive)
            elif path in _PAGES:
                operation, response = await self._serve_page(scope, headers, path, receive)
            else:
                operation, response = await self._serve_other(scope, headers, path, receive)
        except _BodyTooLargeError:
            response = body_too_large()
        except _DisconnectedError:
            scope.pop("ochredb.respond", None)  # It refers to the scope: a cycle.
            return
        except Exception as error:
            response = error_response(error)
        finally:
            self._in_flight -= 1
        await _send(scope, send, response, request_id)
        duration_s = self._clock.monotonic_s() - started_s
        self.metrics.observe(operation, response.status, duration_s)
        if duration_s >= self._config.slow_request_s:
            logger.warning(
                "slow request: operation=%s status=%d duration_ms=%.0f request_id=%s path=%s",
                operation, response.status, duration_s * 1000, request_id, path,
            )  # fmt: skip

    def _request_id(self, headers: dict[str, str]) -> str:
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
                raise _DisconnectedError
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
        work: Callable[[], Response]
        if route.parse_read is None or not self._parses_quickly(request.body):
            work = partial(route.handler, self.frontend, request)
        else:
            read = route.parse_read(request, self._config)
            quick = self.frontend.quick(read)
            if quick is not None:
                body = self.together.run(quick, request.cancel)
                return Response(200, body if isinstance(body, bytes) else await body)
            work = partial(_answer_read, self.frontend, read, request.cancel)
        return await self._in_pool(route, work, request.cancel, receive)

    def _parses_quickly(self, body: bytes) -> bool:
        """Whether the event loop may parse a body: it is short and has no pattern to compile.

        A JSON escape could spell "$regex" in another way, so a body with one counts as slow.
        """
        return (
            len(body) <= self._config.inline_body_bytes_max
            and b"regex" not in body
            and b"\\u" not in body
        )

    async def _in_pool(
        self, route: Route, work: Callable[[], Response], cancel: Cancel, receive: Receive
    ) -> Response:
        def checked() -> Response:
            cancel.check()  # It may have waited in the queue for too long.
            try:
                return work()
            except Exception as error:
                return error_response(error)

        future = self._pools[route.pool].submit(checked)
        loop = asyncio.get_running_loop()
        watcher: asyncio.Task[None] | None = None

        def watch() -> None:
            nonlocal watcher
            watcher = loop.create_task(_watch(future, cancel, receive))

        # Most requests end before this; only the others pay for a task.
        timer = loop.call_later(self._config.disconnect_check_s, watch)
        try:
            return await future
        finally:
            timer.cancel()
            if watcher is not None:
                watcher.cancel()

    # -- everything that is not hot

    async def _serve_other(
        self, scope: Scope, headers: dict[str, str], path: str, receive: Receive
    ) -> tuple[str, Response]:
        """Operation and response of any route of the table, or the refusal of what is none."""
        matched = self._matcher.match(scope["method"], path)
        if isinstance(matched, Response):
            return "unmatched", matched
        route, parameters = matched
        request = Request(
            method=route.method,
            path=path,
            query_string=scope["query_string"].decode("latin-1"),
            headers=headers,
            body=b"" if route.request is None else await self._read_body(headers, receive),
            cancel=self._new_cancel(),
            parameters=parameters,
        )
        try:
            return route.operation, await self._run(route, request, receive)
        except _DisconnectedError:
            raise
        except Exception as error:
            return route.operation, error_response(error)

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

    def _new_cancel(self) -> Cancel:
        return Cancel(self._config.deadline_s, self._clock)

    def _metrics_page(self, _frontend: Frontend, _request: Request) -> Response:
        return Response(200, self.metrics.text(), content_type="text/plain; version=0.0.4")


def _answer_read(frontend: Frontend, read: Any, cancel: Cancel) -> Response:
    return Response(200, frontend.read(read, cancel))


async def _watch(future: asyncio.Future[Response], cancel: Cancel, receive: Receive) -> None:
    """Cancel the work when the client goes away; answer for it when its time is up."""
    disconnected = asyncio.ensure_future(_disconnect(receive))
    try:
        remaining_s = cancel.remaining_s()
        timeout_s = None if remaining_s is None else remaining_s + _DEADLINE_GRACE_S
        waited: set[asyncio.Future[Any]] = {future, disconnected}
        await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return
        cancel.cancel()
        if disconnected.done():
            future.set_exception(_DisconnectedError())
        else:
            future.set_exception(
                DeadlineExceeded(
                    "the request ran out of time; if it was a write, it may have been applied"
                )
            )
    finally:
        disconnected.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(scope: Scope, send: Send, response: Response, request_id: str) -> None:
    encoded_id = request_id.encode()
    content_type = response.content_type
    body = b"" if scope["method"] == "HEAD" else response.body
    headers = [
        (b"content-length", b"%d" % len(response.body)),
        (b"x-request-id", encoded_id),
        (b"chroma-trace-id", encoded_id),
    ]
    if content_type is not None:
        encoded_type = _JSON if content_type == "application/json" else content_type.encode()
        headers.append((b"content-type", encoded_type))
    for name, value in response.headers:
        headers.append((name.encode(), value.encode()))
    respond: Callable[[int, bytes, bytes], bool] | None = scope.pop("ochredb.respond", None)
    if respond is not None:
        head = b"".join([b"%b: %b\r\n" % header for header in headers])
        if respond(response.status, head, body):
            return
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            await send({"type": "lifespan.shutdown.complete"})
            return


def _raw_path(scope: Scope) -> str:
    """The path as sent: still percent-encoded, without the query string."""
    raw: bytes | None = scope.get("raw_path")
    if raw is None:
        path: str = scope["path"]
        return path
    return raw.partition(b"?")[0].decode("latin-1")
