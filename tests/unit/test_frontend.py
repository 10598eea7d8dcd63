"""Every route through `Frontend.handle`, with the roles behind it in memory."""

from __future__ import annotations

from typing import Any

import pytest

from ochredb_frontend.config import FrontendConfig

from .frontend_client import DATABASE, UNKNOWN, Client


@pytest.fixture
def client() -> Client:
    return Client()


def test_system_calls(client: Client) -> None:
    assert client.call("GET", "/api/v2/version") == (200, "1.0.0")
    status, answer = client.call("GET", "/api/v2/heartbeat")
    assert status == 200 and answer["nanosecond heartbeat"] > 1_700_000_000 * 10**9
    assert client.call("GET", "/api/v2/pre-flight-checks") == (
        200,
        {"max_batch_size": 100_000, "supports_base64_encoding": True},
    )
    assert client.call("GET", "/api/v2/auth/identity") == (
        200,
        {"user_id": "", "tenant": "default_tenant", "databases": ["default_database"]},
    )
    assert client.call("GET", "/api/v2/healthcheck") == (
        200,
        {"is_executor_ready": True, "is_log_client_ready": True},
    )


def test_healthcheck_is_503_while_the_roles_are_not_ready(client: Client) -> None:
    client.frontend.ready = lambda: False
    status, answer = client.call("GET", "/api/v2/healthcheck")
    assert status == 503 and answer["is_executor_ready"] is False


def test_reset_needs_permission(client: Client) -> None:
    refused = (403, "ChromaError", "Reset is disabled by config")
    assert client.refused("POST", "/api/v2/reset") == refused
    client = Client(FrontendConfig(allow_reset=True))
    client.collection()
    assert client.call("POST", "/api/v2/reset", **{"content-type": "text/plain"}) == (200, True)
    assert client.call("GET", f"{DATABASE}/collections_count") == (200, 0)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/api/v2/foo", 404),
        ("GET", "/api/v2/heartbeat/", 404),
        ("GET", "/api/v2/tenants//databases", 404),
        ("GET", "/api/v1", 404),
        ("DELETE", "/api/v2/heartbeat", 405),
        ("GET", f"{DATABASE}/collections/{UNKNOWN}/add", 405),
        ("POST", f"{DATABASE}/collections/by-id/{UNKNOWN}", 405),
    ],
)
def test_unknown_paths_and_methods_have_no_body(
    client: Client, method: str, path: str, status: int
) -> None:
    response = client.send(method, path)
    assert (response.status, response.body, response.content_type) == (status, b"", None)
    assert ("allow" in dict(response.headers)) == (status == 405)


def test_v1_is_gone(client: Client) -> None:
    message = "The v1 API is deprecated. Please use /v2 apis"
    for method, path in (("GET", "/api/v1/collections"), ("POST", "/api/v1/x/y")):
        assert client.refused(method, path) == (410, "Unimplemented", message)


# -- tenants and databases


def test_tenants(client: Client) -> None:
    assert client.call("POST", "/api/v2/tenants", {"name": "a b/+c"}) == (200, {})
    path = "/api/v2/tenants/a%20b%2F%2Bc"
    assert client.call("GET", path) == (200, {"name": "a b/+c", "resource_name": None})
    assert client.call("PATCH", path, {"resource_name": "r"}) == (200, {})
    assert client.call("GET", path) == (200, {"name": "a b/+c", "resource_name": "r"})
    assert client.refused("POST", "/api/v2/tenants", {"name": "a b/+c"}) == (
        409, "ChromaError", "Tenant [a b/+c] already exists",
    )  # fmt: skip
    assert client.refused("GET", "/api/v2/tenants/nope") == (
        404, "NotFoundError", "Tenant [nope] not found",
    )  # fmt: skip
    assert client.refused("POST", "/api/v2/tenants", {"name": "ab"})[:2] == (
        400, "InvalidArgumentError",
    )  # fmt: skip
    for body in ({}, {"name": 5}, {"name": None}):
        assert client.refused("POST", "/api/v2/tenants", body)[:2] == (422, "ChromaError")
    assert client.refused("PATCH", path, {})[0] == 422


def test_databases(client: Client) -> None:
    databases = "/api/v2/tenants/default_tenant/databases"
    assert client.call("POST", databases, {"name": "second"}) == (200, {})
    status, found = client.call("GET", databases)
    assert status == 200
    assert [item["name"] for item in found] == ["default_database", "second"]
    assert set(found[0]) == {"id", "name", "tenant"}
    assert client.call("GET", databases, query="limit=1&offset=1") == (200, found[1:])
    assert client.call("GET", databases, query="limit=0") == (200, [])
    assert client.call("GET", databases + "/second") == (200, found[1])
    assert client.refused("POST", databases, {"name": "second"})[:2] == (409, "ChromaError")
    assert client.call("DELETE", databases + "/second") == (200, {})
    assert client.refused("GET", databases + "/second") == (
        404, "NotFoundError", "Database [second] not found. Are you sure it exists?",
    )  # fmt: skip
    assert client.refused("POST", databases, {"name": "x"}) == (
        400,
        "InvalidArgumentError",
        "Expected a name containing 3-512 characters from [a-zA-Z0-9._-], starting and ending"
        " with a character in [a-zA-Z0-9]. Got: x",
    )


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("limit=-1", "limit: invalid digit found in string"),
        ("limit=x", "limit: invalid digit found in string"),
        ("limit=", "limit: cannot parse integer from empty string"),
        ("offset=99999999999999999999999", "offset: number too large to fit in target type"),
        ("limit=5&limit=6", "duplicate field `limit`"),
    ],
)
def test_bad_query_strings_are_400(client: Client, query: str, problem: str) -> None:
    for path in (f"{DATABASE}/collections", "/api/v2/tenants/default_tenant/databases"):
        assert client.refused("GET", path, query=query) == (
            400, "InvalidArgumentError", f"Failed to deserialize query string: {problem}",
        )  # fmt: skip


# -- collections


def test_a_collection_is_described_completely(client: Client) -> None:
    body = {"name": "abc", "metadata": {"k": 1, "f": 1.0, "s": "x", "b": True}}
    status, made = client.call("POST", f"{DATABASE}/collections", body)
    assert status == 200
    assert set(made) == {
        "id", "name", "configuration_json", "schema", "metadata", "dimension", "tenant",
        "database", "log_position", "version",
    }  # fmt: skip
    assert made["configuration_json"] == {
        "hnsw": {
            "space": "l2", "ef_construction": 100, "ef_search": 100, "max_neighbors": 16,
            "resize_factor": 1.2, "sync_threshold": 1000,
        },
        "spann": None,
        "embedding_function": None,
    }  # fmt: skip
    assert made["metadata"] == body["metadata"] and made["dimension"] is None
    assert (made["tenant"], made["database"]) == ("default_tenant", "default_database")
    for path in (
        f"{DATABASE}/collections/abc",
        f"{DATABASE}/collections/by-id/{made['id']}",
        "/api/v2/collections/default_tenant:default_database:abc",
        "/api/v2/collections/default_tenant%3Adefault_database%3Aabc",
    ):
        assert client.call("GET", path) == (200, made)
    assert client.call("GET", f"{DATABASE}/collections") == (200, [made])
    assert client.call("GET", f"{DATABASE}/collections_count") == (200, 1)
    again = {"name": "abc", "metadata": {"other": 2}, "get_or_create": True}
    assert client.call("POST", f"{DATABASE}/collections", again) == (200, made)
    assert client.call("DELETE", f"{DATABASE}/collections/abc") == (200, {})
    assert client.refused("DELETE", f"{DATABASE}/collections/abc") == (
        404, "NotFoundError", "Collection [abc] does not exist",
    )  # fmt: skip


SHAPE = "Failed to deserialize the JSON body into the target type: "
BAD_NAME = (
    "Expected a name containing 3-512 characters from [a-zA-Z0-9._-], starting and ending with a"
    " character in [a-zA-Z0-9]. Got: x"
)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 422, SHAPE + "missing field `name`"),
        ({"name": 5}, 422, SHAPE + "name: invalid type: integer `5`, expected a string"),
        ({"name": "abc", "metadata": "a"}, 422, SHAPE + 'metadata: invalid type: string "a", exp'),
        ({"name": "abc", "metadata": {"a": None}}, 422, SHAPE + "metadata.a: data did not match"),
        ({"name": "abc", "metadata": {"a": {}}}, 422, SHAPE + "metadata.a: data did not match"),
        ({"name": "abc", "get_or_create": "x"}, 422, SHAPE + "get_or_create: invalid type: stri"),
        ({"name": "abc", "get_or_create": None}, 422, SHAPE + "get_or_create: invalid type: null"),
        ({"name": "abc", "configuration": 5}, 422, SHAPE),
        ({"name": "abc", "configuration": {"hnsw": {"space": "l3"}}}, 422, SHAPE),
        ({"name": "abc", "configuration": {"hnsw": {"other": 1}}}, 422, SHAPE),
        ({"name": "abc", "schema": 5}, 422, SHAPE),
        (
            {"name": "abc", "configuration": {"hnsw": {}, "spann": {}}},
            400,
            "Multiple vector index configurations provided",
        ),
        ({"name": "x"}, 400, "Validation error: name: " + BAD_NAME),
        (
            {"name": "x", "metadata": {}},
            400,
            f"Validation error: name: {BAD_NAME}\nmetadata: Metadata cannot be empty",
        ),
        (
            {"name": "abc", "metadata": {}},
            400,
            "Validation error: metadata: Metadata cannot be emp",
        ),
        ({"name": "abc", "metadata": {"#a": 1}}, 400, "Validation error: metadata: "),
        ({"name": "a..b"}, 400, "Validation error: name: Expected a name that does not contains"),
        ({"name": "192.168.0.1"}, 400, "Validation error: name: Expected a name that is not a va"),
    ],
)
def test_bad_collections_are_refused(client: Client, body: Any, status: int, message: str) -> None:
    refused = client.refused("POST", f"{DATABASE}/collections", body)
    assert refused[:2] == (status, "ChromaError" if status == 422 else "InvalidArgumentError")
    assert refused[2].startswith(message)
    assert client.world.collections == {}


def test_collections_need_a_database_and_a_free_name(client: Client) -> None:
    client.collection("abc")
    assert client.refused("POST", f"{DATABASE}/collections", {"name": "abc"}) == (
        409, "ChromaError", "Collection [abc] already exists",
    )  # fmt: skip
    elsewhere = "/api/v2/tenants/default_tenant/databases/nope/collections"
    assert client.refused("POST", elsewhere, {"name": "abc"}) == (
        400, "InvalidArgumentError", "Database [nope] does not exist",
    )  # fmt: skip
    assert client.call("GET", elsewhere) == (200, [])
    assert client.refused("GET", "/api/v2/collections/abc")[0] == 400
    assert client.refused("GET", "/api/v2/collections/a:b:c")[0] == 404


def test_a_collection_is_found_by_id_in_its_own_database_only(client: Client) -> None:
    collection_id = client.collection().rsplit("/", 1)[1]
    elsewhere = "/api/v2/tenants/default_tenant/databases/other/collections/by-id/"
    for path in (elsewhere + collection_id, f"{DATABASE}/collections/by-id/{UNKNOWN}"):
        status, error, message = client.refused("GET", path)
        assert (status, error) == (404, "NotFoundError")
        assert message.endswith("does not exist")


def test_collections_change(client: Client) -> None:
    path = client.collection("abc")
    client.collection("taken")
    assert client.call("PUT", path, {}) == (200, {})
    change = {
        "new_name": "abcd",
        "new_metadata": {"a": 1},
        "new_configuration": {"hnsw": {"ef_search": 7}},
    }
    assert client.call("PUT", path, change) == (200, {})
    status, found = client.call("GET", f"{DATABASE}/collections/abcd")
    assert status == 200 and found["metadata"] == {"a": 1}
    assert found["configuration_json"]["hnsw"]["ef_search"] == 7
    assert client.call("PUT", path, {"new_metadata": {"b": 2, "gone": None}}) == (200, {})
    assert client.call("GET", f"{DATABASE}/collections/abcd")[1]["metadata"] == {"b": 2}
    for body, status, message in (
        ({"new_metadata": {}}, 400, "Validation error: new_metadata: Metadata cannot be empty"),
        ({"new_metadata": 5}, 422, SHAPE + "new_metadata: invalid type: integer `5`"),
        ({"new_name": 5}, 422, SHAPE + "new_name: invalid type: integer `5`, expected a string"),
        ({"new_name": "x"}, 400, "Validation error: new_name: " + BAD_NAME),
        ({"new_name": "taken"}, 409, "Collection [taken] already exists"),
        ({"new_configuration": 5}, 422, SHAPE + "new_configuration"),
        ({"new_configuration": {"hnsw": {"space": "ip"}}}, 422, SHAPE + "new_configuration"),
    ):
        refused = client.refused("PUT", path, body)
        assert refused[0] == status and refused[2].startswith(message)
    assert client.refused("PUT", f"{DATABASE}/collections/xyz", {"new_name": "abc"}) == (
        400, "InvalidArgumentError", "Collection ID is not a valid UUIDv4",
    )  # fmt: skip
    assert client.refused("PUT", f"{DATABASE}/collections/{UNKNOWN}", {}) == (
        404, "NotFoundError", f"Collection [{UNKNOWN}] does not exist.",
    )  # fmt: skip


def test_what_is_not_offered_answers_501(client: Client) -> None:
    path = client.collection()
    attach = {"name": "n", "function_id": "f", "output_collection": "o"}
    for method, verb, body in (
        ("POST", "search", {"searches": []}),
        ("POST", "fork", {"new_name": "xyz"}),
        ("GET", "fork_count", None),
        ("POST", "functions/attach", attach),
        ("POST", "attached_functions/f/detach", {"delete_output": True}),
    ):
        status, error, message = client.refused(method, f"{path}/{verb}", body)
        assert (status, error) == (501, "ChromaError") and message
    assert client.refused("POST", f"{path}/search", {})[0] == 422
    assert client.refused("GET", f"{path}/functions/f") == (
        404, "NotFoundError", "Attached function not found",
    )  # fmt: skip
    assert client.refused("GET", f"{DATABASE}/collections/{UNKNOWN}/fork_count")[0] == 404


def test_indexing_status(client: Client) -> None:
    assert client.call("GET", f"{client.collection()}/indexing_status") == (
        200,
        {
            "op_indexing_progress": 0.75,
            "num_unindexed_ops": 1,
            "num_indexed_ops": 3,
            "total_ops": 4,
        },
    )
