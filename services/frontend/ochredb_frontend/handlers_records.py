"""Record calls (the hot ones): parse, one method of the frontend, encode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ochredb.types import Op
from ochredb_frontend import shapes, wire
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.messages import Request, Response, json_response

if TYPE_CHECKING:
    from ochredb_frontend.service import Frontend

ReadParser = Callable[[Request, FrontendConfig], wire.Read]
_EMPTY = b"{}"


def add(frontend: Frontend, request: Request) -> Response:
    frontend.write(wire.parse_write(request, Op.ADD, frontend.config), request.cancel)
    return Response(201, _EMPTY)


def upsert(frontend: Frontend, request: Request) -> Response:
    frontend.write(wire.parse_write(request, Op.UPSERT, frontend.config), request.cancel)
    return Response(200, _EMPTY)


def update(frontend: Frontend, request: Request) -> Response:
    frontend.write(wire.parse_write(request, Op.UPDATE, frontend.config), request.cancel)
    return Response(200, _EMPTY)


def delete(frontend: Frontend, request: Request) -> Response:
    deletion = wire.parse_delete(request)
    return json_response({"deleted": frontend.delete(deletion, request.cancel)})


def get(frontend: Frontend, request: Request) -> Response:
    return _read(frontend, request, wire.parse_get)


def query(frontend: Frontend, request: Request) -> Response:
    return _read(frontend, request, wire.parse_query)


def count(frontend: Frontend, request: Request) -> Response:
    return _read(frontend, request, wire.parse_count)


def _read(frontend: Frontend, request: Request, parse: ReadParser) -> Response:
    return Response(200, frontend.read(parse(request, frontend.config), request.cancel))


def indexing_status(frontend: Frontend, request: Request) -> Response:
    status = frontend.indexing_status(shapes.collection_id(request))
    return json_response(
        {
            "op_indexing_progress": status.progress,
            "num_unindexed_ops": status.num_unindexed_ops,
            "num_indexed_ops": status.num_indexed_ops,
            "total_ops": status.total_ops,
        }
    )
