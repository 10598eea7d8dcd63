"""Checks of the whole store (an extension), with repairs if asked for: begun, asked how far they
are, ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ochredb_frontend import shapes
from ochredb_frontend.messages import Request, Response, json_response

if TYPE_CHECKING:
    from ochredb_frontend.service import Frontend


def create_check(frontend: Frontend, request: Request) -> Response:
    repair = shapes.query_flag(request, "repair")
    return json_response({"id": frontend.checks.begin(repair=repair)}, 201)


def get_check(frontend: Frontend, request: Request) -> Response:
    return json_response(frontend.checks.state(request.parameters["check_id"]))


def delete_check(frontend: Frontend, request: Request) -> Response:
    frontend.checks.end(request.parameters["check_id"])
    return Response(200, b"{}")
