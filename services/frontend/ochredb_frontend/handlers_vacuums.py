"""Vacuum calls (an extension): begin one, ask how far it is, end it.

A vacuum takes longer than a request may: the process does it by itself, one at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ochredb_frontend import shapes
from ochredb_frontend.messages import Request, Response, json_response

if TYPE_CHECKING:
    from ochredb_frontend.service import Frontend


def create_vacuum(frontend: Frontend, request: Request) -> Response:
    purge = shapes.query_flag(request, "purge")
    return json_response(frontend.vacuums.start(purge=purge).to_json(), 201)


def get_vacuum(frontend: Frontend, request: Request) -> Response:
    return json_response(frontend.vacuums.state(request.parameters["vacuum_id"]).to_json())


def cancel_vacuum(frontend: Frontend, request: Request) -> Response:
    return json_response(frontend.vacuums.cancel(request.parameters["vacuum_id"]).to_json())
