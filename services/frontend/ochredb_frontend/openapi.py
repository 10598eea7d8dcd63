"""The OpenAPI document, made from the table of routes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ochredb_frontend.openapi_schemas import SCHEMAS, U32, JsonSchema
from ochredb_frontend.routes import Route

_PARAMETER = re.compile(r"\{(\w+)\}")
_PATH_TEXT = {
    "tenant": "The tenant's name.",
    "database": "The database's name.",
    "collection_id": "The collection's id.",
    "crn": "A resource name: `tenant:database:collection`.",
    "function_name": "The attached function's name.",
    "name": "The attached function's name.",
    "vacuum_id": "The vacuum's id, as it was given when it was begun.",
    "backup_id": "The backup's id, as it was given when it was begun.",
    "offset": "The first offset of the operations.",
    "check_id": "The id of the check, as it was given when it was begun.",
}
_BYTE_POSITION: JsonSchema = {"type": "integer", "format": "int64", "minimum": 0}
_QUERY: dict[str, JsonSchema] = {
    "purge": {
        "description": "Also erase: deleted data is in no file of the store afterwards.",
        "schema": {"type": "boolean", "default": False},
    },
    "repair": {
        "description": "Also build anew what is found damaged, if it is derived.",
        "schema": {"type": "boolean", "default": False},
    },
    "owner": {"description": "Who takes the backup; for people.", "schema": {"type": "string"}},
    "key": {
        "description": "The object's key, as the catalog names it.",
        "required": True,
        "schema": {"type": "string"},
    },
    "start": {"description": "The first byte.", "required": True, "schema": _BYTE_POSITION},
    "stop": {
        "description": "The end, not included; at most 8 MiB after `start`.",
        "required": True,
        "schema": _BYTE_POSITION,
    },
    "after_collection": {
        "description": "The `collection_id` of the last one of the answer before.",
        "schema": {"type": "string"},
    },
    "after_offset": {"description": "Its `first_offset`.", "schema": _BYTE_POSITION},
    "limit": {"description": "At most this many.", "schema": U32},
    "offset": {"description": "Leave out this many first.", "schema": U32},
    "read_level": {
        "description": "Accepted for compatibility: every read sees all acknowledged writes.",
        "schema": {
            "type": "string",
            "enum": ["index_and_wal", "index_only", "index_and_bounded_wal"],
            "default": "index_and_wal",
        },
    },
}
_STATUS_TEXT = {
    400: "The request is wrong; the message names the field.",
    401: "A token is needed.",
    403: "Not allowed by this server's configuration.",
    404: "There is no such thing.",
    409: "The name is taken.",
    413: "The body or the batch is too large.",
    415: "The body is not declared as JSON.",
    422: "The JSON has the wrong shape; the message names the field.",
    429: "Overload; retry after the pause in `Retry-After`.",
    500: "A bug in the server.",
    501: "Not offered by this server.",
    503: "A dependency failed; retry.",
    504: "The request ran out of time.",
}
_TAGS = {
    "Vacuum": "Giving back, or erasing, what was deleted. An extension.",
    "System": "The server itself.",
    "Tenant": "Tenants hold databases.",
    "Database": "Databases hold collections.",
    "Collection": "Collections hold records of one embedding space.",
    "Record": "Ids with embeddings, documents, metadata and URIs.",
    "Function": "Functions attached to collections.",
    "Backup": "Copying a whole store while it goes on working. An extension.",
    "Quarantine": "Operations that could not be folded. An extension.",
    "Check": "Verifying a whole store while it goes on working. An extension.",
}


def openapi_document(routes: Iterable[Route]) -> dict[str, Any]:
    """The whole document (OpenAPI 3.1)."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "OchreDB",
            "version": "1.0.0",
            "summary": "A vector database that speaks Chroma's REST API v2.",
            "description": (
                "Every body is JSON, in both directions. Errors are"
                ' `{"error": NAME, "message": TEXT}`. Reads see every write that was acknowledged'
                " before they began."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "responses": {"Error": _response(_STATUS_TEXT[500], "ErrorResponse")},
            "securitySchemes": {
                "token": {"type": "apiKey", "in": "header", "name": "x-chroma-token"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
        # The empty alternative: a server that was started without a token needs none.
        "security": [{"token": []}, {"bearer": []}, {}],
    }


def _operation(route: Route) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": _path_text(route, name),
            "schema": {"type": "string"},
        }
        for name in _PARAMETER.findall(route.path)
    ]
    parameters += [{"name": name, "in": "query", **_QUERY[name]} for name in route.query]
    statuses = {401, 500, *route.errors}
    if "{collection_id}" in route.path or "{crn}" in route.path:
        statuses |= {400, 404}
    if route.pool != "inline":
        statuses |= {429, 503, 504}
    operation: dict[str, Any] = {
        "operationId": route.operation,
        "tags": [route.tag],
        "summary": route.summary,
        "parameters": parameters,
    }
    if route.description:
        operation["description"] = route.description
    if "Idempotency-Key" in route.description:
        parameters.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "description": "Any string of the client's, new for each request it means once.",
                "schema": {"type": "string"},
            }
        )
    if route.request is not None:
        statuses |= {400, 413, 415, 422}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _schema(route.request)}},
        }
    if route.query:
        statuses.add(400)
    responses = {str(route.status): _response("Success.", route.response)}
    for status in sorted(statuses):
        responses[str(status)] = _response(_STATUS_TEXT[status], "ErrorResponse")
    if route.operation == "healthcheck":
        responses["503"] = _response("Not ready.", route.response)
    operation["responses"] = responses
    return operation


def _path_text(route: Route, name: str) -> str:
    by_name = ("get_collection", "delete_collection")
    if name == "collection_id" and route.operation in by_name:
        return "The collection's name."
    return _PATH_TEXT[name]


def _response(description: str, schema: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {
            "application/octet-stream" if schema == "Bytes" else "application/json": {
                "schema": _schema(schema)
            }
        },
    }


def _schema(name: str) -> JsonSchema:
    assert name in SCHEMAS, f"no schema {name}"
    return {"$ref": f"#/components/schemas/{name}"}
