"""System, tenant and database calls: JSON in, one method of the frontend, JSON out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ochredb import names
from ochredb_frontend import shapes
from ochredb_frontend.messages import Request, Response, error_body, json_response

if TYPE_CHECKING:
    from ochredb.catalog.namespace import DatabaseInfo
    from ochredb_frontend.service import Frontend

API_VERSION = "1.0.0"  # Of the REST API, which clients read; not of this server.
_EMPTY = b"{}"


def heartbeat(frontend: Frontend, request: Request) -> Response:  # noqa: ARG001
    return json_response({"nanosecond heartbeat": frontend.heartbeat_ns()})


def healthcheck(frontend: Frontend, request: Request) -> Response:  # noqa: ARG001
    ready = frontend.ready()
    body = {"is_executor_ready": ready, "is_log_client_ready": ready}
    return json_response(body, 200 if ready else 503)


def version(frontend: Frontend, request: Request) -> Response:  # noqa: ARG001
    return json_response(API_VERSION)


def pre_flight_checks(frontend: Frontend, request: Request) -> Response:  # noqa: ARG001
    return json_response(
        {"max_batch_size": frontend.config.batch_records_max, "supports_base64_encoding": True}
    )


def identity(frontend: Frontend, request: Request) -> Response:  # noqa: ARG001
    config = frontend.config
    return json_response(
        {"user_id": "", "tenant": config.default_tenant, "databases": [config.default_database]}
    )


def reset(frontend: Frontend, request: Request) -> Response:  # noqa: ARG001
    frontend.reset()
    return json_response(True)


def v1_gone(frontend: Frontend, request: Request) -> Response:  # noqa: ARG001
    message = "The v1 API is deprecated. Please use /v2 apis"
    return Response(410, error_body("Unimplemented", message))


# -- tenants


def create_tenant(frontend: Frontend, request: Request) -> Response:
    name = shapes.string(shapes.json_object(request), "name")
    names.validate_tenant_name(name)
    frontend.create_tenant(name)
    return Response(200, _EMPTY)


def get_tenant(frontend: Frontend, request: Request) -> Response:
    tenant = frontend.get_tenant(request.parameters["tenant"])
    return json_response({"name": tenant["name"], "resource_name": tenant["resource_name"]})


def update_tenant(frontend: Frontend, request: Request) -> Response:
    resource_name = shapes.string(shapes.json_object(request), "resource_name")
    frontend.update_tenant(request.parameters["tenant"], resource_name)
    return Response(200, _EMPTY)


# -- databases


def create_database(frontend: Frontend, request: Request) -> Response:
    name = shapes.string(shapes.json_object(request), "name")
    names.validate_database_name(name)
    frontend.create_database(request.parameters["tenant"], name)
    return Response(200, _EMPTY)


def get_database(frontend: Frontend, request: Request) -> Response:
    parameters = request.parameters
    return json_response(
        _database(frontend.get_database(parameters["tenant"], parameters["database"]))
    )


def list_databases(frontend: Frontend, request: Request) -> Response:
    limit, offset = page(request)
    found = frontend.list_databases(request.parameters["tenant"], limit, offset)
    return json_response([_database(info) for info in found])


def delete_database(frontend: Frontend, request: Request) -> Response:
    frontend.delete_database(request.parameters["tenant"], request.parameters["database"])
    return Response(200, _EMPTY)


def page(request: Request) -> tuple[int | None, int]:
    """`limit` and `offset` of the query string."""
    query = shapes.query_parameters(request)
    return shapes.query_u32(query, "limit"), shapes.query_u32(query, "offset") or 0


def _database(info: DatabaseInfo) -> dict[str, str]:
    return {"id": info.id, "name": info.name, "tenant": info.tenant}
