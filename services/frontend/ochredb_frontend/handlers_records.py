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


def add(frontend: Frontend, request: Request) -> Response:
    return _write(frontend, request, Op.ADD)


def upsert(frontend: Frontend, request: Request) -> Response:
    return _write(frontend, request, Op.UPSERT)


def update(frontend: Frontend, request: Request) -> Response:
    return _write(frontend, request, Op.UPDATE)


def _write(frontend: Frontend, request: Request, op: Op) -> Response:
    frontend.write(wire.parse_write(request, op, frontend.config), request.cancel)
    return wire.written(op)


def delete(frontend: Frontend, request: Request) -> Response:
    deletion = wire.parse_delete(request)
    return wire.deleted(frontend.delete(deletion, request.cancel))


def get(frontend: Frontend, request: Request) -> Response:
    return _read(frontend, request, wire.parse_get)


def query(frontend: Frontend, request: Request) -> Response:
    return _read(frontend, request, wire.parse_query)


def count(frontend: Frontend, request: Request) -> Response:
    return _read(frontend, request, wire.parse_count)


def _read(frontend: Frontend, request: Request, parse: ReadParser) -> Response:
    return Response(200, frontend.read(parse(request, frontend.config), request.cancel))


def indexing_status(frontend: Frontend, request: Request) -> Response:
    status = frontend.indexing_status(shapes.collection_id(request), request.cancel)
    document: dict[str, object] = {
        "op_indexing_progress": status.progress,
        "num_unindexed_ops": status.num_unindexed_ops,
        "num_indexed_ops": status.num_indexed_ops,
        "total_ops": status.total_ops,
    }
    if status.num_quarantined_ops:  # An extension, which others need not know.
        document["num_quarantined_ops"] = status.num_quarantined_ops
    return json_response(document)
