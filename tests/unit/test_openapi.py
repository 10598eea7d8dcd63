"""The OpenAPI document and its page, compared with the live routes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ochredb_frontend.routes import ROUTES

from .live_server import DATABASE, Live


@pytest.fixture
def live() -> Iterator[Live]:
    server = Live()
    yield server
    server.close()


def test_the_document_describes_exactly_the_live_routes(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    documented = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    }
    assert documented == {(route.method, route.path) for route in ROUTES}
    ids = [
        operation["operationId"]
        for operations in document["paths"].values()
        for operation in operations.values()
    ]
    assert len(ids) == len(set(ids)) == len(ROUTES)
    values = {"tenant": "default_tenant", "database": "default_database"}
    for method, path in documented:
        filled = path
        for part in path.split("/"):
            if part.startswith("{"):
                filled = filled.replace(part, values.get(part[1:-1], "some-value"))
        answer = live.http.request(method, filled, json=None if method == "GET" else {})
        assert answer.status_code != 405, (method, path)
        assert answer.content, (method, path, "an empty body is the router's refusal")
        operation = document["paths"][path][method.lower()]
        assert str(answer.status_code) in operation["responses"], (method, path, answer.text)


def test_references_of_the_document_resolve(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    for piece in text.split('"#/components/schemas/')[1:]:
        assert piece.split('"')[0] in schemas
    used = {piece.split('"')[0] for piece in text.split('"#/components/schemas/')[1:]}
    assert used == set(schemas)


def test_answers_have_the_documented_keys(live: Live) -> None:
    path = live.collection()
    schemas = live.http.get("/openapi.json").json()["components"]["schemas"]
    query = {"query_embeddings": [[1, 2]]}
    for answer, name in (
        (live.http.post(f"{path}/get", json={"explain": True}), "GetResponse"),
        (live.http.post(f"{path}/query", json={**query, "explain": True}), "QueryResponse"),
        (live.http.get(f"{DATABASE}/collections/by-id/{path.rsplit('/', 1)[1]}"), "Collection"),
        (live.http.get(f"{path}/indexing_status"), "IndexStatusResponse"),
        (live.http.get("/api/v2/pre-flight-checks"), "ChecklistResponse"),
        (live.http.get("/api/v2/auth/identity"), "GetUserIdentityResponse"),
        (live.http.get("/api/v2/tenants/default_tenant"), "GetTenantResponse"),
        (live.http.get("/api/v2/tenants/nope"), "ErrorResponse"),
    ):
        keys = set(schemas[name]["properties"]) - {"num_quarantined_ops"}  # Only if there are any.
        assert set(answer.json()) == keys, name
        if "plan" in answer.json():
            assert set(answer.json()["plan"]) == set(schemas["PlanStep"]["properties"]), name


def test_the_docs_page_needs_nothing_from_elsewhere(live: Live) -> None:
    answer = live.http.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "<script" not in answer.text and "http://" not in answer.text
    assert "https://" not in answer.text
    for route in ROUTES:
        assert f'id="{route.operation}"' in answer.text
