"""Requests that need more than one role to be right, on a real node in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from ochredb.catalog.appends import BacklogLimits
from ochredb_node.node import Node, NodeConfig
from ochredb_query import answer as answer_module

ROOT = "/api/v2/tenants/default_tenant/databases/default_database/collections"


class Client:
    """A node and one collection of it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.path = f"{ROOT}/{self.call('POST', ROOT, {'name': 'records'})[1]['id']}"

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        status, _, answer = self.node.handle(
            method, path, "", {"content-type": "application/json", **names}, orjson.dumps(body)
        )
        return status, orjson.loads(answer)

    def post(self, verb: str, body: Any, **headers: str) -> tuple[int, Any]:
        return self.call("POST", f"{self.path}/{verb}", body, **headers)

    def add(self, *ids: str, **headers: str) -> tuple[int, Any]:
        vectors = [[float(number), 1.0] for number in range(len(ids))]
        metadatas = [{"kind": "x"} for _ in ids]
        return self.post(
            "add", {"ids": ids, "embeddings": vectors, "metadatas": metadatas}, **headers
        )

    def ids(self) -> list[str]:
        found: list[str] = self.post("get", {})[1]["ids"]
        return found


@pytest.fixture
def client() -> Iterator[Client]:
    node = Node(NodeConfig())
    node.start(background=False)
    yield Client(node)
    node.close()


def test_a_query_among_ids_skips_unknown_ones_but_refuses_only_unknown_ones(
    client: Client,
) -> None:
    client.add("a", "b", "c")
    query: dict[str, Any] = {"query_embeddings": [[0, 1]], "ids": ["zz", "b"]}
    assert client.post("query", query)[1]["ids"] == [["b"]]
    query["ids"] = ["zz"]
    status, body = client.post("query", query)
    assert (status, body["error"]) == (400, "InvalidArgumentError")
    assert body["message"].startswith("Error finding id")
    assert client.post("query", {**query, "n_results": 0})[1]["ids"] == [[]]
    client.post("delete", {"ids": ["a", "b", "c"]})
    assert client.post("query", query)[1]["ids"] == [[]]


def test_a_write_repeated_with_its_key_is_applied_once(client: Client) -> None:
    assert client.add("a", idempotency_key="k1")[0] == 201
    client.post("delete", {"ids": ["a"]})
    assert client.add("a", idempotency_key="k1")[0] == 201
    assert client.ids() == []
    status, body = client.add("b", idempotency_key="k1")
    assert status == 422 and "k1" in body["message"]
    assert client.ids() == []


def test_a_delete_by_filter_repeated_with_its_key_deletes_nothing_more(client: Client) -> None:
    client.add("a", "b")
    delete = {"where": {"kind": "x"}}
    assert client.post("delete", delete, idempotency_key="k2")[1] == {"deleted": 2}
    client.add("c")
    assert client.post("delete", delete, idempotency_key="k2")[1] == {"deleted": 2}
    assert client.ids() == ["c"]
    other = {"where": {"kind": "y"}}
    assert client.post("delete", other, idempotency_key="k2")[0] == 422
    assert client.post("delete", delete)[1] == {"deleted": 1}


def test_a_delete_by_filter_that_found_nothing_is_remembered_too(client: Client) -> None:
    delete = {"where": {"kind": "x"}}
    assert client.post("delete", delete, idempotency_key="k3")[1] == {"deleted": 0}
    client.add("a")
    assert client.post("delete", delete, idempotency_key="k3")[1] == {"deleted": 0}
    assert client.ids() == ["a"]


def test_an_answer_that_would_fill_memory_is_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.post("add", {"ids": ["a"], "embeddings": [[0, 1]], "documents": ["x" * 10_000]})
    query = {"query_embeddings": [[0, 1]] * 100, "n_results": 1}
    assert client.post("query", query)[0] == 200
    monkeypatch.setattr(answer_module, "_ANSWER_BYTES_MAX", 100_000)
    status, body = client.post("query", query)
    assert status == 413 and "query_embeddings" in body["message"]
    assert client.post("query", {**query, "include": ["distances"]})[0] == 200


def test_one_request_larger_than_the_backlog_is_taken_into_an_empty_one() -> None:
    node = Node(NodeConfig(backlog=BacklogLimits(tail_rows_max=10)))
    node.start(background=False)
    client = Client(node)
    collection = client.path.rsplit("/", 1)[1]
    for prefix in "ab":
        assert client.add(*(f"{prefix}{number}" for number in range(9)))[0] == 201
        node.compactor.compact_now(collection)
    client.add("last")
    status, _ = client.post("delete", {"where": {"kind": "x"}})
    assert status == 429
    node.compactor.compact_now(collection)
    assert client.post("delete", {"where": {"kind": "x"}}) == (200, {"deleted": 19})
    assert client.ids() == []
    node.close()


def test_modified_metadata_of_nulls_only_is_no_metadata(client: Client) -> None:
    status, _ = client.call("PUT", client.path, {"new_metadata": {"a": 1}})
    assert status == 200
    status, _ = client.call("PUT", client.path, {"new_metadata": {"a": None}})
    assert status == 200
    assert client.call("GET", f"{ROOT}/records")[1]["metadata"] is None
