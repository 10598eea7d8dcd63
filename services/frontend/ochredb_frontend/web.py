"""The web application in FastAPI: the pages for people, and every route of the table.

Built when a page is first asked for: importing FastAPI takes longer than starting the rest of the
server. The API itself is answered by the dispatcher in `app.py`, from the same table and with the
same handlers; a test compares the two ways for every route.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import unquote

from fastapi import FastAPI
from fastapi import Request as FastAPIRequest
from fastapi import Response as FastAPIResponse
from starlette.exceptions import HTTPException

from ochredb.cancel import Cancel
from ochredb_frontend.docs_page import docs_html
from ochredb_frontend.messages import Request, Response, encode, error_response
from ochredb_frontend.openapi import openapi_document
from ochredb_frontend.routes import Route

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Run = Callable[[Route, Request, Receive], Awaitable[Response]]
"""Runs a route's handler where it may run; the last argument tells of a disconnect."""


class Web:
    """One FastAPI application. `app` is its ASGI callable, `answer` one request through it."""

    def __init__(self, routes: Iterable[Route], run: Run, new_cancel: Callable[[], Cancel]) -> None:
        """run: answers a route's request. new_cancel: the deadline of a request that begins now."""
        self._run, self._new_cancel = run, new_cancel
        routes = tuple(routes)
        document = openapi_document(routes)
        encoded, html = encode(document), docs_html(document)
        self.app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        self.app.openapi = lambda: document  # type: ignore[method-assign]
        self.app.add_exception_handler(HTTPException, _empty_refusal)
        for route in routes:
            self._add(route.method, route.path, self._endpoint(route))
        for path, name, content_type, body in (
            ("/openapi.json", "openapi", "application/json", encoded),
            ("/docs", "docs", "text/html; charset=utf-8", html),
        ):
            self._add("GET", path, _page(name, content_type, body))

    def _add(
        self,
        method: str,
        path: str,
        endpoint: Callable[[FastAPIRequest], Awaitable[FastAPIResponse]],
    ) -> None:
        methods = ["GET", "HEAD"] if method == "GET" else [method]
        self.app.add_api_route(path, endpoint, methods=methods, include_in_schema=False)

    async def answer(
        self, scope: Scope, path: str, receive: Receive, read_body: Callable[[], Awaitable[bytes]]
    ) -> tuple[str, Response]:
        """Let FastAPI route and answer: the operation, and the response caught instead of sent."""
        status, content_type, body = 500, None, [b""]
        extra: list[tuple[str, str]] = []

        async def receive_all() -> Message:
            return {"type": "http.request", "body": await read_body()}

        async def catch(message: Message) -> None:
            nonlocal status, content_type
            if message["type"] == "http.response.start":
                status = message["status"]
                for name, value in message["headers"]:
                    if name == b"content-type":
                        content_type = value.decode("latin-1")
                    elif name != b"content-length":
                        extra.append((name.decode("latin-1"), value.decode("latin-1")))
            else:
                body.append(message.get("body", b""))

        # Segments stay percent-encoded while they are matched, so an encoded slash is no separator.
        inner = dict(scope, path=path, raw_path=path.encode("latin-1"))
        inner["ochredb.receive"] = receive
        await self.app(inner, receive_all, catch)
        operation = inner.get("ochredb.operation", "unmatched")
        return operation, Response(status, b"".join(body), tuple(extra), content_type)

    def _endpoint(self, route: Route) -> Callable[[FastAPIRequest], Awaitable[FastAPIResponse]]:
        async def endpoint(web_request: FastAPIRequest) -> FastAPIResponse:
            scope = web_request.scope
            scope["ochredb.operation"] = route.operation
            request = Request(
                method=route.method,
                path=scope["path"],
                query_string=scope["query_string"].decode("latin-1"),
                headers=web_request.headers,
                body=b"" if route.request is None else await web_request.body(),
                cancel=self._new_cancel(),
                parameters={k: unquote(v) for k, v in scope["path_params"].items()},
            )
            try:
                response = await self._run(route, request, scope["ochredb.receive"])
            except Exception as error:
                response = error_response(error)
            return FastAPIResponse(
                response.body, response.status, dict(response.headers), response.content_type
            )

        return endpoint


async def _empty_refusal(_request: FastAPIRequest, error: Exception) -> FastAPIResponse:
    """404 and 405 of the router: an empty body."""
    assert isinstance(error, HTTPException)
    return FastAPIResponse(status_code=error.status_code, headers=error.headers)


def _page(
    name: str, content_type: str, body: bytes
) -> Callable[[FastAPIRequest], Awaitable[FastAPIResponse]]:
    async def page(web_request: FastAPIRequest) -> FastAPIResponse:
        web_request.scope["ochredb.operation"] = name
        return FastAPIResponse(body, media_type=content_type)

    return page
