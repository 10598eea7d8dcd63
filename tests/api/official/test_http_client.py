"""chromadb.HttpClient: collections, every record verb, filters, and errors as the right class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chromadb.errors import InvalidArgumentError, NotFoundError

METADATAS = [
    {"kind": "fruit", "weight": 120, "ripe": True, "tags": ["red", "round"]},
    {"kind": "fruit", "weight": 15.5, "ripe": False},
    {"kind": "stone", "weight": 900},
    None,
]
DOCUMENTS = ["a red apple", "a small plum", "a heavy granite block", "nothing is known"]
IDS = ["apple", "plum", "granite", "unknown"]
EMBEDDINGS = [[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


@pytest.fixture
def filled(collection: Any) -> Any:
    collection.add(ids=IDS, embeddings=EMBEDDINGS, documents=DOCUMENTS, metadatas=METADATAS)
    return collection


def test_server_answers(client: Any) -> None:
    assert client.heartbeat() > 0
    assert client.get_version() == "1.0.0"
    assert client.get_max_batch_size() >= 5461


def test_collections_are_created_listed_and_dropped(client: Any, name: str) -> None:
    created = client.create_collection(name, metadata={"topic": "fruit"}, embedding_function=None)
    assert created.name == name
    assert created.metadata == {"topic": "fruit"}
    assert name in [c.name for c in client.list_collections()]
    assert client.get_collection(name, embedding_function=None).id == created.id
    again = client.get_or_create_collection(name, embedding_function=None)
    assert again.id == created.id
    client.delete_collection(name)
    with pytest.raises(NotFoundError):
        client.get_collection(name)


def test_add_get_and_count(filled: Any) -> None:
    assert filled.count() == 4
    got = filled.get(include=["documents", "metadatas", "embeddings"])
    assert got["ids"] == IDS
    assert got["documents"] == DOCUMENTS
    assert got["metadatas"] == METADATAS
    assert isinstance(got["metadatas"][0]["weight"], int)
    assert isinstance(got["metadatas"][1]["weight"], float)
    np.testing.assert_array_equal(
        np.asarray(got["embeddings"], np.float32), np.array(EMBEDDINGS, np.float32)
    )
    page = filled.get(limit=2, offset=1)
    assert page["ids"] == ["plum", "granite"]
    assert filled.peek(1)["ids"] == ["apple"]


def test_query_returns_the_nearest_with_squared_distances(filled: Any) -> None:
    answer = filled.query(query_embeddings=[[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]], n_results=2)
    assert answer["ids"][0] == ["apple", "plum"]
    assert answer["ids"][1][0] == "granite"
    np.testing.assert_allclose(answer["distances"][0], [0.0, 0.02], rtol=1e-5, atol=1e-7)
    assert answer["distances"][1][0] == pytest.approx(1.0)
    assert answer["documents"][0] == ["a red apple", "a small plum"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"kind": "fruit"}, ["apple", "plum"]),
        ({"kind": {"$ne": "fruit"}}, ["granite", "unknown"]),
        ({"weight": {"$gt": 100}}, ["apple", "granite"]),
        ({"ripe": True}, ["apple"]),
        ({"kind": {"$in": ["stone", "metal"]}}, ["granite"]),
        ({"tags": {"$contains": "red"}}, ["apple"]),
        ({"$and": [{"kind": "fruit"}, {"weight": {"$lte": 15.5}}]}, ["plum"]),
        ({"$or": [{"kind": "stone"}, {"ripe": False}]}, ["plum", "granite"]),
    ],
)
def test_metadata_filters(filled: Any, where: dict[str, Any], expected: list[str]) -> None:
    assert filled.get(where=where)["ids"] == expected
    ranked = filled.query(query_embeddings=[[1.0, 0.0, 0.0]], n_results=10, where=where)
    assert sorted(ranked["ids"][0]) == sorted(expected)


@pytest.mark.parametrize(
    ("where_document", "expected"),
    [
        ({"$contains": "granite"}, ["granite"]),
        ({"$not_contains": "a "}, ["unknown"]),
        ({"$regex": "^a (red|small)"}, ["apple", "plum"]),
        ({"$and": [{"$contains": "a"}, {"$contains": "plum"}]}, ["plum"]),
    ],
)
def test_document_filters(filled: Any, where_document: dict[str, Any], expected: list[str]) -> None:
    assert filled.get(where_document=where_document)["ids"] == expected


def test_update_upsert_and_delete(filled: Any) -> None:
    filled.update(ids=["plum"], metadatas=[{"weight": 16}])
    got = filled.get(ids=["plum"], include=["documents", "metadatas", "embeddings"])
    assert got["metadatas"] == [{"kind": "fruit", "weight": 16, "ripe": False}]
    assert got["documents"] == ["a small plum"]
    np.testing.assert_allclose(got["embeddings"], [EMBEDDINGS[1]], rtol=1e-7)
    filled.update(ids=["plum"], documents=["a plum"], embeddings=[[0.8, 0.2, 0.0]])
    got = filled.get(ids=["plum"], include=["documents", "embeddings"])
    assert got["documents"] == ["a plum"]
    np.testing.assert_allclose(got["embeddings"], [[0.8, 0.2, 0.0]], rtol=1e-7)

    filled.upsert(ids=["plum", "pear"], embeddings=[[0.5, 0.5, 0.0], [0.4, 0.6, 0.0]])
    assert filled.count() == 5
    nearest = filled.query(query_embeddings=[[0.4, 0.6, 0.0]], n_results=2)
    assert nearest["ids"] == [["pear", "plum"]]

    filled.delete(ids=["apple"])
    filled.delete(where={"kind": "stone"})
    assert filled.get()["ids"] == ["plum", "unknown", "pear"]


def test_modify_renames_and_replaces_metadata(client: Any, name: str) -> None:
    collection = client.create_collection(name, embedding_function=None)
    collection.modify(name=f"{name}-b", metadata={"owner": "me"})
    found = client.get_collection(f"{name}-b", embedding_function=None)
    assert (found.id, found.metadata) == (collection.id, {"owner": "me"})
    collection.modify(configuration={"hnsw": {"ef_search": 200}})
    found = client.get_collection(f"{name}-b", embedding_function=None)
    assert found.configuration_json["hnsw"]["ef_search"] == 200
    client.delete_collection(f"{name}-b")


@pytest.mark.parametrize(
    ("space", "expected"), [("l2", 5.0), ("cosine", 1.0), ("ip", 1.0)], ids=["l2", "cosine", "ip"]
)
def test_spaces(client: Any, name: str, space: str, expected: float) -> None:
    collection = client.create_collection(
        name, configuration={"hnsw": {"space": space}}, embedding_function=None
    )
    collection.add(ids=["x"], embeddings=[[2.0, 0.0]])
    answer = collection.query(query_embeddings=[[0.0, 1.0]], n_results=1)
    assert answer["distances"][0][0] == pytest.approx(expected)
    client.delete_collection(name)


def test_ten_thousand_records_in_one_batch_size_each(collection: Any, client: Any) -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((10_000, 16)).astype(np.float32)
    ids = [f"r{i}" for i in range(len(vectors))]
    for start in range(0, len(ids), 2000):
        part = slice(start, start + 2000)
        collection.add(ids=ids[part], embeddings=vectors[part])
    assert collection.count() == 10_000
    answer = collection.query(query_embeddings=vectors[[17, 9_999]], n_results=1, include=[])
    assert answer["ids"] == [["r17"], ["r9999"]]


def test_errors_are_of_the_official_classes(filled: Any, client: Any, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="dimension of 3, got 2"):
        filled.add(ids=["short"], embeddings=[[1.0, 2.0]])
    with pytest.raises(InvalidArgumentError, match="dimension of 3, got 4"):
        filled.query(query_embeddings=[[1.0, 2.0, 3.0, 4.0]])
    with pytest.raises(Exception, match="already exists"):
        client.create_collection(filled.name, embedding_function=None)
    with pytest.raises(InvalidArgumentError, match="3-512 characters"):
        client.create_collection("ab", embedding_function=None)
    with pytest.raises(NotFoundError, match="does not exist"):
        client.delete_collection(f"{name}-missing")
    assert filled.count() == 4


def test_embedding_functions_run_in_the_client(client: Any, name: str) -> None:
    class Lengths:
        """Embeds a text as its length and its number of spaces."""

        def __call__(self, input: list[str]) -> list[Any]:  # noqa: A002 - the official name
            return [np.array([len(text), text.count(" ")], np.float32) for text in input]

        def embed_query(self, input: list[str]) -> list[Any]:  # noqa: A002
            return self(input)

    collection = client.create_collection(name, embedding_function=Lengths())
    collection.add(ids=["short", "long"], documents=["ab", "a much longer text"])
    assert collection.query(query_texts=["abc"], n_results=1)["ids"] == [["short"]]
    client.delete_collection(name)
