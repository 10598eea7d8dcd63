"""Backup calls (an extension): a state that is kept, and its bytes in pieces.

A backup is a handful of small questions, each of which any process with the store may answer:
nothing is streamed, so a slow taker holds up nothing and bodies stay small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ochredb.errors import InvalidArgument
from ochredb_frontend import shapes
from ochredb_frontend.messages import Request, Response, json_response

if TYPE_CHECKING:
    from ochredb_frontend.service import Frontend

_EMPTY = b"{}"
_BYTES = "application/octet-stream"
_OWNER_CHARS_MAX = 200
_DIGITS_MAX = 18


def create_backup(frontend: Frontend, request: Request) -> Response:
    owner = shapes.query_parameters(request).get("owner", "")
    started = frontend.backups.begin(f"http/{owner[:_OWNER_CHARS_MAX]}")
    document = {
        "id": started.id,
        "store_id": started.store_id,
        "created_us": started.created_us,
        "ttl_s": started.ttl_s,
        "catalog_bytes": started.catalog_bytes,
        "catalog_checksum": f"{started.catalog_checksum:016x}",
    }
    return json_response(document, 201)


def read_backup_catalog(frontend: Frontend, request: Request) -> Response:
    query = shapes.query_parameters(request)
    data = frontend.backups.read_catalog(
        request.parameters["backup_id"], _position(query, "start"), _position(query, "stop")
    )
    return Response(200, data, content_type=_BYTES)


def read_backup_object(frontend: Frontend, request: Request) -> Response:
    query = shapes.query_parameters(request)
    data = frontend.backups.read_object(
        request.parameters["backup_id"],
        _text(query, "key"),
        _position(query, "start"),
        _position(query, "stop"),
    )
    return Response(200, data, content_type=_BYTES)


def renew_backup(frontend: Frontend, request: Request) -> Response:
    frontend.backups.renew(request.parameters["backup_id"])
    return Response(200, _EMPTY)


def delete_backup(frontend: Frontend, request: Request) -> Response:
    frontend.backups.end(request.parameters["backup_id"])
    return Response(200, _EMPTY)


def _text(query: Mapping[str, str], field: str) -> str:
    value = query.get(field)
    if value is None:
        raise InvalidArgument(f"Failed to deserialize query string: missing field `{field}`")
    return value


def _position(query: Mapping[str, str], field: str) -> int:
    """A number of bytes; objects may be larger than 32 bits say."""
    text = _text(query, field)
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX):
        raise InvalidArgument(f"Failed to deserialize query string: {field}: not a number of bytes")
    return int(text)
