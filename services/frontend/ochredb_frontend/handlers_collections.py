"""Collection calls: JSON in, one method of the frontend, JSON out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ochredb import configuration, metadata, names
from ochredb.errors import InvalidArgument, NotFound, Unimplemented, Unprocessable
from ochredb.types import CollectionInfo
from ochredb_frontend import shapes
from ochredb_frontend.handlers_system import page
from ochredb_frontend.messages import Request, Response, json_response

if TYPE_CHECKING:
    from ochredb_frontend.service import Frontend

_EMPTY = b"{}"
_VALIDATION_ERROR = "Validation error: "  # Once, however many problems follow.


def collection_json(info: CollectionInfo) -> dict[str, Any]:
    """The collection as clients see it. `log_position` and `version` are not internal counters."""
    return {
        "id": info.id,
        "name": info.name,
        "configuration_json": configuration.shown(info.configuration),
        "schema": configuration.schema_with_keys(info.schema, info.key_types),
        "metadata": info.metadata or None,
        "dimension": info.dimension,
        "tenant": info.tenant,
        "database": info.database,
        "log_position": 0,
        "version": 0,
    }


def create_collection(frontend: Frontend, request: Request) -> Response:
    body = shapes.json_object(request)
    name = shapes.string(body, "name")
    get_or_create = shapes.boolean(body, "get_or_create", False)
    problem = names.name_problem(name)
    problems = [] if problem is None else [f"name: {problem}"]
    collection_metadata = None
    try:
        collection_metadata = metadata.check_collection_metadata(body.get("metadata"))
    except Unprocessable:
        raise
    except InvalidArgument as error:
        problems.append(str(error).removeprefix(_VALIDATION_ERROR))
    if problems:
        raise InvalidArgument(_VALIDATION_ERROR + "\n".join(problems))
    resolved, schema = configuration.resolve(
        collection_metadata,
        body.get("configuration"),
        body.get("schema"),
        num_threads=os.cpu_count() or 1,
    )
    info = frontend.create_collection(
        request.parameters["tenant"],
        request.parameters["database"],
        name,
        configuration=resolved,
        schema=schema,
        metadata=collection_metadata,
        get_or_create=get_or_create,
    )
    return json_response(collection_json(info))


def get_collection(frontend: Frontend, request: Request) -> Response:
    """By name, although the path's parameter is called an id."""
    parameters = request.parameters
    info = frontend.get_collection(
        parameters["tenant"], parameters["database"], parameters["collection_id"]
    )
    return json_response(collection_json(info))


def get_collection_by_id(frontend: Frontend, request: Request) -> Response:
    collection_id = shapes.collection_id(request)
    missing = NotFound(f"Collection [{collection_id}] does not exist")
    try:
        info = frontend.get_collection_by_id(collection_id)
    except NotFound:
        raise missing from None
    place = (request.parameters["tenant"], request.parameters["database"])
    if (info.tenant, info.database) != place:
        raise missing
    return json_response(collection_json(info))


def get_collection_by_crn(frontend: Frontend, request: Request) -> Response:
    crn = request.parameters["crn"]
    parts = crn.rsplit(":", 2)
    if len(parts) != 3 or not all(parts):
        raise InvalidArgument(f"crn: expected `tenant:database:collection`, got `{crn}`")
    return json_response(collection_json(frontend.get_collection(*parts)))


def list_collections(frontend: Frontend, request: Request) -> Response:
    limit, offset = page(request)
    parameters = request.parameters
    found = frontend.list_collections(parameters["tenant"], parameters["database"], limit, offset)
    return json_response([collection_json(info) for info in found])


def count_collections(frontend: Frontend, request: Request) -> Response:
    parameters = request.parameters
    return json_response(frontend.count_collections(parameters["tenant"], parameters["database"]))


def update_collection(frontend: Frontend, request: Request) -> Response:
    body = shapes.json_object(request)
    new_name = shapes.optional_string(body, "new_name")
    new_metadata = metadata.check_collection_metadata(body.get("new_metadata"), "new_metadata")
    collection_id = shapes.collection_id(request)
    if new_name is not None:
        names.validate_collection_name(new_name, "new_name")
    changes = body.get("new_configuration")

    def change(info: CollectionInfo) -> tuple[dict[str, Any], dict[str, Any]]:
        return configuration.update(info.configuration, info.schema, changes)

    frontend.update_collection(
        collection_id,
        new_name=new_name,
        new_metadata=new_metadata,
        change_configuration=None if changes is None else change,
    )
    return Response(200, _EMPTY)


def delete_collection(frontend: Frontend, request: Request) -> Response:
    """By name, although the path's parameter is called an id."""
    parameters = request.parameters
    frontend.delete_collection(
        parameters["tenant"], parameters["database"], parameters["collection_id"]
    )
    return Response(200, _EMPTY)


# -- not offered yet: the shape of the request is checked, then 501


def search(frontend: Frontend, request: Request) -> Response:
    body = shapes.json_object(request)
    searches = shapes.require(body, "searches")
    if not isinstance(searches, list):
        raise shapes.wrong_type("searches", searches, "a sequence")
    frontend.get_collection_by_id(shapes.collection_id(request))
    raise Unimplemented(
        "Error executing plan: Not implemented:"
        " Search operation is not implemented for local executor"
    )


def fork(frontend: Frontend, request: Request) -> Response:
    shapes.string(shapes.json_object(request), "new_name")
    frontend.get_collection_by_id(shapes.collection_id(request))
    raise Unimplemented("Collection forking is unsupported for local chroma")


def fork_count(frontend: Frontend, request: Request) -> Response:
    frontend.get_collection_by_id(shapes.collection_id(request))
    raise Unimplemented("Count forks is unsupported for local chroma")


def attach_function(frontend: Frontend, request: Request) -> Response:
    body = shapes.json_object(request)
    for field in ("name", "function_id", "output_collection"):
        shapes.string(body, field)
    frontend.get_collection_by_id(shapes.collection_id(request))
    raise Unimplemented("Attached functions are not implemented")


def get_attached_function(frontend: Frontend, request: Request) -> Response:
    frontend.get_collection_by_id(shapes.collection_id(request))
    raise NotFound("Attached function not found")


def detach_function(frontend: Frontend, request: Request) -> Response:
    shapes.boolean(shapes.json_object(request), "delete_output", False)
    frontend.get_collection_by_id(shapes.collection_id(request))
    raise Unimplemented("Attached functions are not implemented")
