"""Quarantine calls (an extension): operations that could not be folded, until they are dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ochredb.errors import InvalidArgument
from ochredb_frontend import shapes
from ochredb_frontend.messages import Request, Response, json_response

if TYPE_CHECKING:
    from ochredb_frontend.service import Frontend

_ROWS = 1_000
_DIGITS_MAX = 18


def list_quarantine(frontend: Frontend, request: Request) -> Response:
    query = shapes.query_parameters(request)
    offset = _offset(query.get("after_offset", "0"), "after_offset")
    rows = frontend.quarantine.list((query.get("after_collection", ""), offset), _ROWS)
    items = [
        {
            "collection_id": row.collection,
            "tenant": None if info is None else info.tenant,
            "database": None if info is None else info.database,
            "collection": None if info is None else info.name,
            "first_offset": row.start,
            "last_offset": row.stop,
            "reason": row.reason,
            "time_us": row.time_us,
        }
        for row, info in rows
    ]
    return json_response({"operations": items, "is_last": len(items) < _ROWS})


def read_quarantine(frontend: Frontend, request: Request) -> Response:
    data = frontend.quarantine.read(*_place(request))
    return Response(200, data, content_type="application/octet-stream")


def drop_quarantine(frontend: Frontend, request: Request) -> Response:
    frontend.quarantine.drop(*_place(request))
    return Response(200, b"{}")


def _place(request: Request) -> tuple[str, int]:
    return shapes.collection_id(request), _offset(request.parameters["offset"], "offset")


def _offset(text: str, field: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX):
        raise InvalidArgument(f"{field}: not an offset of a log: {text[:50]!r}")
    return int(text)
