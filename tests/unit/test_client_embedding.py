"""Which embedding function a collection uses, and what is stored about it."""

from __future__ import annotations

import re
from typing import Any, cast

import numpy as np
import pytest

from ochredb.api.client import ClientAPI
from ochredb.api.rest import Rest
from ochredb.api.types import Documents, Embeddings, Space
from ochredb.embedding_functions import EmbeddingFunction, LexicalEmbeddingFunction

from .fake_server import FakeServer


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def client(server: FakeServer) -> ClientAPI:
    return ClientAPI(rest=Rest(server))


class Constant(EmbeddingFunction[Documents]):
    """One vector for everything."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def __call__(self, input: Documents) -> Embeddings:  # noqa: A002
        return [np.array([self.value, 0.0], dtype=np.float32) for _ in input]

    @staticmethod
    def name() -> str:
        return "test-constant"

    def get_config(self) -> dict[str, Any]:
        return {"value": self.value}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> Constant:
        return Constant(config["value"])

    def default_space(self) -> Space:
        return "ip"


class Nameless:
    """A function that describes nothing."""

    def __call__(self, input: Documents) -> Embeddings:  # noqa: A002
        return [np.array([3.0, 4.0], dtype=np.float32) for _ in input]


def test_the_default_function_is_stored_and_leaves_the_distance_alone(
    client: ClientAPI, server: FakeServer
) -> None:
    client.create_collection("abc")
    configuration = server.last_body()["configuration"]
    assert configuration["embedding_function"] == {
        "type": "known", "name": "ochredb-lexical", "config": {"version": 1},
    }  # fmt: skip
    assert configuration["hnsw"] is None


@pytest.mark.parametrize(
    ("configuration", "metadata", "space"),
    [
        (None, None, "ip"),
        ({"hnsw": {"ef_search": 9}}, None, "ip"),
        ({"hnsw": {"space": "l2"}}, None, "l2"),
        (None, {"hnsw:space": "cosine"}, None),
    ],
)
def test_a_chosen_function_chooses_the_distance_unless_told(
    client: ClientAPI, server: FakeServer, configuration: Any, metadata: Any, space: str | None
) -> None:
    client.create_collection(
        "abc", configuration=configuration, metadata=metadata, embedding_function=Constant()
    )
    sent = server.last_body()["configuration"]
    assert (sent["hnsw"] or {}).get("space") == space
    assert sent["embedding_function"]["name"] == "test-constant"


def test_a_space_the_function_does_not_support_warns(client: ClientAPI) -> None:
    class CosineOnly(Constant):
        def supported_spaces(self) -> list[Space]:
            return ["cosine"]

    with pytest.warns(UserWarning, match="does not support the space l2"):
        client.create_collection(
            "abc",
            configuration={"hnsw": {"space": "l2"}},
            embedding_function=CosineOnly(),
        )


def test_a_schema_alone_is_sent_alone(client: ClientAPI, server: FakeServer) -> None:
    client.create_collection("abc", schema={"defaults": {}})
    assert server.last_body()["configuration"] is None
    assert server.last_body()["schema"] == {"defaults": {}}


def test_two_functions_at_once_are_refused(client: ClientAPI) -> None:
    with pytest.raises(ValueError, match="two embedding functions"):
        client.create_collection(
            "abc",
            embedding_function=Constant(1),
            configuration={"embedding_function": Constant(2)},
        )


def test_the_stored_function_is_rebuilt_by_name(client: ClientAPI, server: FakeServer) -> None:
    client.create_collection("abc", embedding_function=Constant(7.0))
    server.embedding_function = {"type": "known", "name": "test-constant", "config": {"value": 7.0}}
    for opened in (
        client.get_collection("abc"),
        client.get_collection("abc", embedding_function=None),
    ):
        opened.query(query_texts="anything")
        assert server.last_body()["query_embeddings"] == [[7.0, 0.0]]
    function = client.get_collection("abc").configuration["embedding_function"]
    assert isinstance(function, Constant)


def test_a_function_that_is_not_registered_is_named_when_it_is_needed(
    client: ClientAPI, server: FakeServer
) -> None:
    server.embedding_function = {"type": "known", "name": "default", "config": {}}
    opened = client.get_collection("abc")
    opened.query(query_embeddings=[1.0])  # Needs no function.
    with pytest.raises(ValueError, match="'default' of this collection is not known here"):
        opened.query(query_texts="anything")


def test_another_function_than_the_stored_one_is_refused(
    client: ClientAPI, server: FakeServer
) -> None:
    server.embedding_function = {"type": "known", "name": "openai", "config": {}}
    for function in (Constant(), Nameless(), LexicalEmbeddingFunction()):
        with pytest.raises(ValueError, match="made by the embedding function openai"):
            client.get_collection("abc", embedding_function=cast(Any, function))


def test_a_function_that_does_not_describe_itself_is_stored_as_legacy(
    client: ClientAPI, server: FakeServer
) -> None:
    collection = client.create_collection("abc", embedding_function=cast(Any, Nameless()))
    assert server.last_body()["configuration"]["embedding_function"] == {"type": "legacy"}
    server.embedding_function = {"type": "legacy"}
    collection.query(query_texts="anything")
    assert server.last_body()["query_embeddings"] == [[3.0, 4.0]]


def test_no_function_means_no_texts(client: ClientAPI) -> None:
    collection = client.create_collection("abc", embedding_function=None)
    with pytest.raises(ValueError, match="has no embedding function"):
        collection.add(ids=["a"], documents=["x"])


def test_a_function_with_another_signature_is_refused(client: ClientAPI) -> None:
    class Old:
        def __call__(self, texts: Documents) -> Embeddings:
            return []

    with pytest.raises(ValueError, match=re.escape("must take (self, input), not (self, texts)")):
        client.create_collection("abc", embedding_function=cast(Any, Old()))


def test_a_function_must_return_one_vector_for_each_input(client: ClientAPI) -> None:
    class Short(Nameless):
        def __call__(self, input: Documents) -> Embeddings:  # noqa: A002
            return super().__call__(input)[1:]

    collection = client.create_collection("abc", embedding_function=cast(Any, Short()))
    with pytest.raises(ValueError, match="returned 1 vectors for 2 inputs"):
        collection.add(ids=["a", "b"], documents=["x", "y"])


def test_modify_cannot_replace_the_stored_function(client: ClientAPI, server: FakeServer) -> None:
    server.embedding_function = {"type": "known", "name": "openai", "config": {}}
    opened = client.get_collection("abc")
    with pytest.raises(ValueError, match="cannot change from openai to test-constant"):
        opened.modify(configuration={"embedding_function": Constant()})
