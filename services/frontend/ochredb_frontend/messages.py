"""Requests and responses as plain values, and the one table from errors to responses."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from ochredb.cancel import Cancel, Cancelled
from ochredb.errors import Exhausted, Kind, OchreError, OutOfMemory

logger = logging.getLogger("ochredb.frontend")

JSON = "application/json"
_SERIALIZE = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


@dataclass(slots=True, kw_only=True)
class Request:
    """One HTTP request.

    path: as sent, still percent-encoded. headers: lower-case names. parameters: the path's
    parameters, decoded; filled in by whoever matched the path.
    """

    method: str
    path: str
    query_string: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cancel: Cancel = field(default_factory=Cancel)
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Response:
    """One HTTP response. headers: beyond content-type and content-length."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str | None = JSON


class EdgeError(OchreError):
    """A refusal that exists in HTTP only, with its own response."""

    def __init__(self, response: Response, message: str) -> None:
        super().__init__(message)
        self.response = response


def encode(value: Any) -> bytes:
    """JSON bytes; float32 arrays in their shortest form, NaN and infinities as null."""
    return orjson.dumps(value, option=_SERIALIZE)


def json_response(value: Any, status: int = 200) -> Response:
    return Response(status, encode(value))


def error_body(name: str, message: str) -> bytes:
    return orjson.dumps({"error": name, "message": message})


def unsupported_media_type() -> EdgeError:
    message = "Expected request with `Content-Type: application/json`"
    return EdgeError(Response(415, error_body("ChromaError", message)), message)


def body_too_large() -> Response:
    return Response(413, b"Payload too large", content_type="text/plain; charset=utf-8")


def error_response(error: BaseException) -> Response:
    """The response to any exception. What is not an OchreError is a bug: logged, and 500."""
    if isinstance(error, EdgeError):
        return error.response
    if isinstance(error, Cancelled):
        return Response(499, error_body("ChromaError", str(error)))  # Nobody reads it.
    if isinstance(error, MemoryError):
        logger.warning("not enough memory for a request", exc_info=error)
        error = OutOfMemory("not enough memory for this request now; retry later, or ask for less")
    if not isinstance(error, OchreError):
        logger.error("unexpected error", exc_info=error)
        message = f"Internal error ({type(error).__name__}); the server's log has the details"
        return Response(500, error_body(Kind.INTERNAL.chroma_name, message))
    kind = error.kind
    if kind.http == 500:
        logger.error("internal error: %s", error, exc_info=error)
    headers: tuple[tuple[str, str], ...] = ()
    if isinstance(error, Exhausted):
        headers = (("retry-after", str(max(1, math.ceil(error.retry_after_s)))),)
    elif kind is Kind.UNAVAILABLE:
        headers = (("retry-after", "1"),)
    elif kind is Kind.STORAGE_FULL:
        headers = (("retry-after", "5"),)
    elif kind is Kind.UNAUTHENTICATED:
        headers = (("www-authenticate", "Bearer"),)
    return Response(kind.http, error_body(kind.chroma_name, str(error)), headers)
