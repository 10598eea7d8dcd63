"""ASGI's messages, and the headers of answers: what the application reads and writes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from ochredb.crash_points import reach
from ochredb_frontend.messages import JSON, Response

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_JSON = JSON.encode()


def decoded(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers by name; of one that is repeated, the last."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}


def headers_of(response: Response, request_id: str) -> list[tuple[bytes, bytes]]:
    """The headers of an answer, as they are sent."""
    encoded_id = request_id.encode()
    headers = [
        (b"content-length", b"%d" % len(response.body)),
        (b"x-request-id", encoded_id),
        (b"chroma-trace-id", encoded_id),
    ]
    content_type = response.content_type
    if content_type is not None:
        encoded_type = _JSON if content_type == JSON else content_type.encode()
        headers.append((b"content-type", encoded_type))
    for name, value in response.headers:
        headers.append((name.encode(), value.encode()))
    return headers


async def send_response(scope: Scope, send: Send, response: Response, request_id: str) -> None:
    """Answer a request by ASGI."""
    reach("answer.sending")
    headers = headers_of(response, request_id)
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    body = b"" if scope["method"] == "HEAD" else response.body
    await send({"type": "http.response.body", "body": body})
    reach("answer.sent")


async def lifespan(receive: Receive, send: Send) -> None:
    """Agree to begin and to end."""
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            await send({"type": "lifespan.shutdown.complete"})
            return


def raw_path(scope: Scope) -> str:
    """The path as sent: still percent-encoded, without the query string."""
    raw: bytes | None = scope.get("raw_path")
    if raw is None:
        path: str = scope["path"]
        return path
    return raw.partition(b"?")[0].decode("latin-1")


async def disconnect(receive: Receive) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
