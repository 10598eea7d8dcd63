"""Record calls and errors through `Frontend.handle`, with the roles behind it in memory."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import orjson
import pytest

from ochredb.cancel import Cancel
from ochredb.errors import Exhausted, OutcomeUnknown
from ochredb.types import Op
from ochredb_frontend import wire
from ochredb_frontend.messages import Request

from .frontend_client import DATABASE, UNKNOWN, Client


@pytest.fixture
def client() -> Client:
    return Client()


def test_records_come_back_as_they_were_written(client: Client) -> None:
    path = client.collection()
    body = {
        "ids": ["b", "a"],
        "embeddings": [[0.1, 1.0], [2, 3]],
        "documents": ["x", None],
        "metadatas": [{"i": 1, "f": 1.0, "b": True, "l": [1, 2]}, None],
    }
    assert client.call("POST", f"{path}/add", body) == (201, {})
    assert client.call("GET", f"{path}/count") == (200, 2)
    assert client.call("POST", f"{path}/get", {"include": ["embeddings", "metadatas", "uris"]}) == (
        200,
        {
            "ids": ["b", "a"],
            "embeddings": [[0.1, 1.0], [2.0, 3.0]],
            "documents": None,
            "uris": [None, None],
            "metadatas": [{"i": 1, "f": 1.0, "b": True, "l": [1, 2]}, None],
            "include": ["embeddings", "metadatas", "uris"],
        },
    )
    query = {"query_embeddings": [[2, 3], [0.1, 1]], "n_results": 1}
    status, answer = client.call("POST", f"{path}/query", query)
    assert (status, answer["ids"], answer["distances"]) == (200, [["a"], ["b"]], [[0.0], [0.0]])
    assert client.call("POST", f"{path}/query", {"query_embeddings": []})[1] == {
        "ids": [], "embeddings": None, "documents": [], "uris": None, "metadatas": [],
        "distances": [], "include": ["documents", "metadatas", "distances"],
    }  # fmt: skip
    assert client.refused("POST", f"{path}/query", {"query_embeddings": [[]]}) == (
        400, "InvalidArgumentError", "Collection expecting embedding with dimension of 2, got 0",
    )  # fmt: skip
    assert client.call("POST", f"{path}/update", {"ids": ["a"], "documents": ["y"]}) == (200, {})
    assert client.call("POST", f"{path}/upsert", {**body, "documents": ["z", None]}) == (200, {})
    assert client.call("POST", f"{path}/get", {})[1]["documents"] == ["z", "y"]


def parsed_query(client: Client, path: str, body: dict[str, Any]) -> wire.Read:
    request = Request(
        method="POST",
        path=f"{path}/query",
        headers={"content-type": "application/json"},
        body=orjson.dumps(body),
        parameters={"collection_id": path.rsplit("/", 1)[1]},
    )
    return wire.parse_query(request, client.frontend.config)


def test_an_empty_batch_only_asks_whether_the_collection_exists(client: Client) -> None:
    path = client.collection()
    body: dict[str, Any] = {"ids": [], "embeddings": []}
    assert client.call("POST", f"{path}/add", body) == (201, {})
    assert client.world.appended == []
    unknown = f"{DATABASE}/collections/{UNKNOWN}"
    missing = (404, "NotFoundError", f"Collection [{UNKNOWN}] does not exist.")
    for verb, empty in (
        ("add", body), ("upsert", body), ("update", {"ids": []}), ("delete", {}), ("get", {}),
        ("query", {"query_embeddings": []}), ("query", {"query_embeddings": [[1]]}),
    ):  # fmt: skip
        assert client.refused("POST", f"{unknown}/{verb}", empty) == missing
    assert client.refused("GET", f"{unknown}/count") == missing
    assert client.refused("GET", f"{DATABASE}/collections/xyz/count")[0] == 400


def test_idempotency_keys_reach_the_log(client: Client) -> None:
    path = client.collection()
    one = {"ids": ["a"], "embeddings": [[1]]}
    for verb in ("add", "upsert", "update", "delete"):
        body = {"ids": ["a"]} if verb == "delete" else one
        client.call("POST", f"{path}/{verb}", body, **{"idempotency-key": verb})
    assert [(entry[1].op, entry[2]) for entry in client.world.appended] == [
        (Op.ADD, "add"), (Op.UPSERT, "upsert"), (Op.UPDATE, "update"), (Op.DELETE, "delete"),
    ]  # fmt: skip


def three_records(client: Client) -> str:
    path = client.collection()
    body = {"ids": ["a", "b", "c"], "embeddings": [[1], [2], [3]]}
    assert client.call("POST", f"{path}/add", body)[0] == 201
    client.world.appended.clear()
    return path


def test_deleting_by_ids_reports_the_ids_given(client: Client) -> None:
    path = three_records(client)
    assert client.call("POST", f"{path}/delete", {"ids": ["a", "zz"]}) == (200, {"deleted": 2})
    assert client.call("POST", f"{path}/delete", {}) == (200, {"deleted": 0})
    assert client.call("POST", f"{path}/delete", {"ids": None}) == (200, {"deleted": 0})
    assert client.call("GET", f"{path}/count") == (200, 2)


def test_deleting_by_filter_is_conditional(client: Client) -> None:
    path = three_records(client)
    client.world.matching = lambda record_id: record_id != "b"
    body = {"where": {"k": 1}, "limit": 1}
    assert client.call("POST", f"{path}/delete", body) == (200, {"deleted": 1})
    (_, operations, _, expected) = client.world.appended[0]
    assert (operations.op, operations.ids, expected) == (Op.DELETE, ["a"], 0)
    client.world.conflicts = 2
    body = {"where": {"k": 1}, "ids": ["b", "c"]}
    assert client.call("POST", f"{path}/delete", body) == (200, {"deleted": 1})
    assert client.world.appended[-1][1].ids == ["c"]
    assert client.call("POST", f"{path}/delete", body) == (200, {"deleted": 0})
    assert len(client.world.appended) == 2


def test_deleting_by_filter_in_a_crowd_ends(client: Client) -> None:
    path = three_records(client)
    client.world.conflicts = 1_000
    assert client.call("POST", f"{path}/delete", {"where": {"k": 1}}) == (200, {"deleted": 3})
    assert client.world.conflicts == 997
    assert client.world.appended[-1][3] is None


def test_filters_on_disabled_indexes_are_400(client: Client) -> None:
    body = {
        "name": "abc",
        "schema": {
            "defaults": {"string": {"string_inverted_index": {"enabled": False, "config": {}}}},
            "keys": {},
        },
    }
    status, made = client.call("POST", f"{DATABASE}/collections", body)
    assert status == 200
    path = f"{DATABASE}/collections/{made['id']}"
    message = "Cannot filter using metadata key 's' with type 'Str' because indexing is disabled"
    refused = (400, "InvalidArgumentError", message)
    where = {"where": {"s": "x"}}
    assert client.refused("POST", f"{path}/get", where) == refused
    assert client.refused("POST", f"{path}/delete", where) == refused
    query = {"query_embeddings": [[1]], **where}
    assert client.refused("POST", f"{path}/query", query) == refused
    assert client.call("POST", f"{path}/get", {"where": {"s": 1}})[0] == 200


# -- errors


def test_overload_says_when_to_come_back(client: Client) -> None:
    path = three_records(client)

    def refuse(_cancel: Cancel) -> None:
        raise Exhausted("the backlog is full", retry_after_s=1.2)

    client.world.before_answer = refuse
    response = client.send("POST", f"{path}/get", {})
    assert response.status == 429 and dict(response.headers)["retry-after"] == "2"
    assert orjson.loads(response.body)["error"] == "RateLimitError"


def test_unknown_outcomes_are_503(client: Client) -> None:
    path = three_records(client)

    def lose(_cancel: Cancel) -> None:
        raise OutcomeUnknown("the reply was lost")

    client.world.before_answer = lose
    response = client.send("POST", f"{path}/delete", {"ids": ["a"]})
    assert response.status == 503 and "retry-after" in dict(response.headers)


def test_bugs_are_500_without_details(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    path = three_records(client)

    def fail(_cancel: Cancel) -> None:
        raise KeyError("secret")

    client.world.before_answer = fail
    status, error, message = client.refused("POST", f"{path}/get", {})
    assert (status, error) == (500, "InternalError")
    assert "secret" not in message
    assert "secret" in caplog.text


def test_the_frontend_takes_calls_from_many_threads(client: Client) -> None:
    path = three_records(client)
    statuses: list[int] = []

    def ask() -> None:
        for _ in range(20):
            statuses.append(client.send("POST", f"{path}/get", {"where": {"a": 1}}).status)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 80


def test_quick_reads_answer_the_same(client: Client) -> None:
    path = three_records(client)
    body = {"query_embeddings": [[1]], "where": {"a": 1}}
    read = parsed_query(client, path, body)
    assert client.frontend.quick(read) is None
    client.world.quick = True
    assert client.frontend.quick(read) is None, "its schema is not known yet"
    slow = client.send("POST", f"{path}/query", body).body
    quick = client.frontend.quick(read)
    assert quick is not None and quick.run(Cancel()) == slow


def test_the_embedded_way_imports_no_web_framework() -> None:
    code = (
        "import sys, ochredb_frontend.service\n"
        "print([m for m in ('fastapi', 'starlette', 'uvicorn', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
