"""The client without a server: names, signatures, checks, and what it sends through the seam."""

from __future__ import annotations

import base64
import inspect
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import ochredb
from ochredb.api.client import ClientAPI
from ochredb.api.exceptions import error_from_response, error_types
from ochredb.api.rest import Rest
from ochredb.api.transport import Response, base_url
from ochredb.api.types import Loadable
from ochredb.embedding_functions import LexicalEmbeddingFunction, known_embedding_functions
from ochredb.explain import PlanStep

from .fake_server import FakeServer

PUBLIC_NAMES = """
    AdminAPI AdminClient AuthorizationError BatchSizeExceededError ChromaAuthError ChromaError
    Client ClientAPI Collection CollectionConfiguration CollectionMetadata
    CreateCollectionConfiguration
    DEFAULT_DATABASE DEFAULT_TENANT Documents DuplicateIDError EmbeddingFunction Embeddings
    EphemeralClient GetResult HttpClient IDAlreadyExistsError IDs Include InternalError
    InvalidArgumentError InvalidDimensionException InvalidHTTPVersion InvalidUUIDError Metadata
    Metadatas NotFoundError PersistentClient QueryResult QuotaError RateLimitError ReadLevel
    Settings TokenTransportHeader URI URIs UniqueConstraintError UpdateCollectionConfiguration
    UpdateCollectionMetadata UpdateMetadata VersionMismatchError Where WhereDocument __version__
"""
_WHO = "tenant='default_tenant', database='default_database'"
_COLLECTION = "schema=None, configuration=None, metadata=None, embedding_function=LEXICAL"
_RECORDS = "self, ids, embeddings=None, metadatas=None, documents=None, images=None, uris=None"
# Compared with chromadb 1.5.9: the same names, order, kinds and defaults.
SIGNATURES = {
    "PersistentClient": f"path='./chroma', settings=None, {_WHO}",
    "EphemeralClient": f"settings=None, {_WHO}",
    "HttpClient": f"host='localhost', port=8000, ssl=False, headers=None, settings=None, {_WHO}",
    "Client": f"settings=SETTINGS, {_WHO}",
    "AdminClient": "settings=SETTINGS",
    "ClientAPI.create_collection": (
        f"self, name, {_COLLECTION}, data_loader=None, get_or_create=False"
    ),
    "ClientAPI.get_or_create_collection": f"self, name, {_COLLECTION}, data_loader=None",
    "ClientAPI.get_collection": "self, name, embedding_function=LEXICAL, data_loader=None",
    "ClientAPI.get_collection_by_id": "self, id, embedding_function=LEXICAL, data_loader=None",
    "ClientAPI.list_collections": "self, limit=None, offset=None",
    "ClientAPI.count_collections": "self",
    "ClientAPI.delete_collection": "self, name",
    "ClientAPI.heartbeat": "self",
    "ClientAPI.get_version": "self",
    "ClientAPI.get_settings": "self",
    "ClientAPI.get_max_batch_size": "self",
    "ClientAPI.get_user_identity": "self",
    "ClientAPI.reset": "self",
    "ClientAPI.set_tenant": "self, tenant, database='default_database'",
    "ClientAPI.set_database": "self, database",
    "ClientAPI.close": "self",
    "AdminAPI.create_tenant": "self, name",
    "AdminAPI.get_tenant": "self, name",
    "AdminAPI.create_database": "self, name, tenant='default_tenant'",
    "AdminAPI.get_database": "self, name, tenant='default_tenant'",
    "AdminAPI.delete_database": "self, name, tenant='default_tenant'",
    "AdminAPI.list_databases": "self, limit=None, offset=None, tenant='default_tenant'",
    "Collection.add": _RECORDS,
    "Collection.upsert": _RECORDS,
    "Collection.update": _RECORDS,
    "Collection.delete": "self, ids=None, where=None, where_document=None, limit=None",
    "Collection.get": (
        "self, ids=None, where=None, limit=None, offset=None, where_document=None, "
        "include=['metadatas', 'documents']"
    ),
    "Collection.peek": "self, limit=10",
    "Collection.count": "self, read_level='index_and_wal'",
    "Collection.get_indexing_status": "self",
    "Collection.query": (
        "self, query_embeddings=None, query_texts=None, query_images=None, query_uris=None, "
        "ids=None, n_results=10, where=None, where_document=None, "
        "include=['metadatas', 'documents', 'distances']"
    ),
    "Collection.modify": "self, name=None, metadata=None, configuration=None",
}


# What Chroma's client does not have is keyword-only.
EXTENSIONS = {
    "Collection.get": "explain=False",
    "Collection.query": "exact=False, explain=False, target_recall=None",
}


def test_public_names_are_pinned() -> None:
    assert sorted(ochredb.__all__) == sorted(PUBLIC_NAMES.split())
    assert all(hasattr(ochredb, name) for name in ochredb.__all__)


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures_are_those_of_chroma(path: str) -> None:
    function: Any = ochredb
    for name in path.split("."):
        function = getattr(function, name)
    shown, extensions = [], []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            extensions.append(f"{parameter.name}={parameter.default}")
            continue
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = parameter.default
        if default is parameter.empty:
            shown.append(parameter.name)
        elif isinstance(default, LexicalEmbeddingFunction):
            shown.append(f"{parameter.name}=LEXICAL")
        elif isinstance(default, ochredb.Settings):
            shown.append(f"{parameter.name}=SETTINGS")
        else:
            text = repr(default.value) if isinstance(default, ochredb.ReadLevel) else repr(default)
            shown.append(f"{parameter.name}={text}")
    assert ", ".join(shown) == SIGNATURES[path]
    assert ", ".join(extensions) == EXTENSIONS.get(path, "")


def test_no_public_method_is_without_a_pinned_signature() -> None:
    for cls in (ochredb.ClientAPI, ochredb.AdminAPI, ochredb.Collection):
        methods = {
            f"{cls.__name__}.{name}"
            for name, _ in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_")
        }
        assert methods - {"AdminAPI.close"} <= SIGNATURES.keys()


def test_import_is_light() -> None:
    """Only numpy and orjson: `import ochredb` must stay under a third of a second."""
    program = "import sys, ochredb; ochredb.Client; print('\\n'.join(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    heavy = "httpx pyarrow sqlalchemy alembic fastapi pydantic hnswlib rich uvicorn ochredb_node"
    assert loaded.isdisjoint(heavy.split())
    assert {"numpy", "orjson"} <= loaded


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def client(server: FakeServer) -> ClientAPI:
    return ClientAPI(rest=Rest(server))


@pytest.fixture
def collection(client: ClientAPI) -> ochredb.Collection:
    return client.create_collection("abc")


def test_paths_are_percent_encoded(client: ClientAPI, server: FakeServer) -> None:
    client.get_collection("topology+name/ä")
    assert server.sent[-1][1].endswith("/collections/topology%2Bname%2F%C3%A4")
    server.answers["collections"] = []
    client.list_collections(limit=2)
    assert server.sent[-1][3] == "limit=2"


def test_embeddings_travel_as_base64_of_float32(
    collection: ochredb.Collection, server: FakeServer
) -> None:
    collection.add(ids=["a", "b"], embeddings=[[1.0, 2.0], [3.0, 4.5]])
    sent = [base64.b64decode(text) for text in server.last_body()["embeddings"]]
    assert [np.frombuffer(raw, "<f4").tolist() for raw in sent] == [[1.0, 2.0], [3.0, 4.5]]


def test_embeddings_travel_as_numbers_where_base64_is_not_offered() -> None:
    server = FakeServer(supports_base64_encoding=False)
    collection = ClientAPI(rest=Rest(server)).create_collection("abc")
    collection.upsert(ids="a", embeddings=np.array([1, 2.5]))
    assert server.last_body()["embeddings"] == [[1.0, 2.5]]
    assert server.last_body()["ids"] == ["a"]


@pytest.mark.parametrize(
    "embeddings",
    [
        [1, 2.0],
        [[1, 2.0]],
        [(1, 2.0)],
        np.array([1, 2]),
        np.array([[1, 2]], dtype=np.int32),
        [np.array([1.0, 2.0], dtype=np.float16)],
    ],
)
def test_one_vector_in_every_form(
    collection: ochredb.Collection, server: FakeServer, embeddings: Any
) -> None:
    collection.query(query_embeddings=embeddings)
    assert server.last_body()["query_embeddings"] == [[1.0, 2.0]]


def test_batches_above_the_servers_limit_are_refused(
    collection: ochredb.Collection, server: FakeServer
) -> None:
    ids = [str(index) for index in range(101)]
    sent = len(server.sent)
    with pytest.raises(ValueError, match="Batch size 101 exceeds maximum batch size 100"):
        collection.add(ids=ids, embeddings=[[1.0]] * 101)
    assert [path for _, path, _, _ in server.sent[sent:]] == ["/api/v2/pre-flight-checks"]


def test_data_is_loaded_from_uris_and_the_callers_include_stays(
    client: ClientAPI, server: FakeServer
) -> None:
    def load(uris: Any) -> Loadable:
        return [np.zeros((1, len(uri))) for uri in uris]

    collection = client.create_collection("abc", data_loader=load)
    server.answers["get"] = {"ids": ["a"], "uris": ["file:x"], "embeddings": None}
    include: ochredb.Include = ["data"]
    result = collection.get(include=include)
    assert server.last_body()["include"] == ["uris"]
    assert include == ["data"]
    assert result["uris"] is None
    assert result["data"] is not None
    assert result["data"][0] is not None
    assert result["data"][0].shape == (1, 6)


def test_results_have_chromas_keys_and_arrays(
    collection: ochredb.Collection, server: FakeServer
) -> None:
    server.answers["get"] = {"ids": ["a"], "embeddings": [[0.1, 2.0]], "documents": None}
    got = collection.get(include=["embeddings"])
    assert list(got) == [
        "ids", "embeddings", "documents", "uris", "data", "metadatas", "included",
    ]  # fmt: skip
    assert got["embeddings"] is not None
    assert got["embeddings"].dtype == np.float64
    assert got["embeddings"].tolist() == [[0.1, 2.0]]
    server.answers["query"] = {"ids": [["a"]], "embeddings": [[[1.0]]], "distances": [[0.5]]}
    found = collection.query([1.0], include=["embeddings", "distances"])
    assert list(found) == [
        "ids", "embeddings", "documents", "uris", "data", "metadatas", "distances", "included",
    ]  # fmt: skip
    assert found["embeddings"] is not None
    assert [batch.tolist() for batch in found["embeddings"]] == [[[1.0]]]
    assert found["included"] == ["embeddings", "distances"]


def test_without_extensions_requests_and_results_are_chromas(
    collection: ochredb.Collection, server: FakeServer
) -> None:
    server.answers["get"], server.answers["query"] = {"ids": []}, {"ids": [[]]}
    for got in (collection.get(), collection.get(explain=False)):
        assert list(server.last_body()) == [
            "ids", "where", "where_document", "limit", "offset", "include",
        ]  # fmt: skip
        assert "plan" not in got
    plain = collection.query([1.0])
    for found in (plain, collection.query([1.0], exact=False, explain=False, target_recall=None)):
        assert list(server.last_body()) == [
            "ids", "query_embeddings", "n_results", "where", "where_document", "include",
        ]  # fmt: skip
        assert "plan" not in found


def test_extensions_travel_and_the_plan_comes_back(
    collection: ochredb.Collection, server: FakeServer
) -> None:
    plan = PlanStep("Query", {"rows": 3}, 12.5, [PlanStep("Scan", {"reason": None})])
    server.answers["get"] = {"ids": [], "plan": plan.to_json()}
    server.answers["query"] = {"ids": [[]], "plan": plan.to_json()}
    got = collection.get(explain=True)
    assert server.last_body()["explain"] is True
    assert got["plan"] == plan
    found = collection.query([1.0], exact=True, explain=True, target_recall=0)
    sent = server.last_body()
    assert (sent["exact"], sent["explain"], sent["target_recall"]) == (True, True, 0.0)
    assert found["plan"] == plan
    collection.query([1.0], target_recall=np.float32(0.5))  # type: ignore[arg-type]
    sent = server.last_body()
    assert sent["target_recall"] == 0.5
    assert {"exact", "explain"}.isdisjoint(sent)


def test_a_server_without_plans_answers_without_one(
    collection: ochredb.Collection, server: FakeServer
) -> None:
    server.answers["get"], server.answers["query"] = {"ids": []}, {"ids": [[]]}
    assert "plan" not in collection.get(explain=True)
    assert "plan" not in collection.query([1.0], explain=True)


@pytest.mark.parametrize("target_recall", [1, 1.0, -0.01, float("nan"), True, "0.9", [0.9]])
def test_impossible_recalls_are_refused_before_anything_is_sent(
    collection: ochredb.Collection, server: FakeServer, target_recall: Any
) -> None:
    sent = len(server.sent)
    with pytest.raises(ValueError, match=r"target_recall must be a number of .* in query\."):
        collection.query([1.0], target_recall=target_recall)
    assert len(server.sent) == sent


def test_modify_sends_what_is_given_and_remembers_it(
    collection: ochredb.Collection, server: FakeServer
) -> None:
    collection.modify(name="new", metadata={"a": 1}, configuration={"hnsw": {"ef_search": 7}})
    put = next(body for method, _, body, _ in server.sent if method == "PUT")
    assert put == {
        "new_name": "new",
        "new_metadata": {"a": 1},
        "new_configuration": {"hnsw": {"ef_search": 7}},
    }
    assert (collection.name, collection.metadata) == ("new", {"a": 1})
    assert collection.configuration_json["hnsw"] == {"space": "l2", "ef_search": 7}


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", error_types)
def test_errors_are_raised_by_name(name: str) -> None:
    body = json.dumps({"error": name, "message": "what happened"}).encode()
    error = error_from_response(400, {"chroma-trace-id": "t1"}, body)
    assert type(error) is error_types[name]
    assert isinstance(error, ochredb.ChromaError)
    assert str(error) == error.message() == "what happened"
    assert error.trace_id == "t1"
    assert error.name() == name


@pytest.mark.parametrize(
    ("status", "body", "cls", "text"),
    [
        (409, b'{"error":"ChromaError","message":"m"}', ochredb.UniqueConstraintError, "m"),
        (429, b'{"error":"ChromaError","message":"m"}', ochredb.RateLimitError, "m"),
        (403, b'{"error":"ChromaError","message":"m"}', ochredb.ChromaError, "m"),
        (400, b'{"error":"NewError","message":"m"}', ochredb.ChromaError, "m"),
        (413, b"Payload too large", ochredb.BatchSizeExceededError, "HTTP 413: Payload too large"),
        (502, b"<html>\xff", ochredb.ChromaError, "HTTP 502: <html>\ufffd"),
        (404, b"", ochredb.ChromaError, "HTTP 404: empty answer"),
        (500, b"[1]", ochredb.ChromaError, "HTTP 500: [1]"),
    ],
)
def test_other_errors_are_raised_by_status(
    status: int, body: bytes, cls: type[Exception], text: str
) -> None:
    error = error_from_response(status, {}, body)
    assert type(error) is cls
    assert str(error) == text


def test_a_refusal_is_an_exception(client: ClientAPI, server: FakeServer) -> None:
    def refuse(*_: Any) -> Response:
        return Response(404, {}, b'{"error":"NotFoundError","message":"gone"}')

    server.send = refuse  # type: ignore[assignment, method-assign]
    with pytest.raises(ochredb.NotFoundError, match="gone"):
        client.get_collection("abc")


def test_invalid_arguments_are_value_errors_whoever_finds_them() -> None:
    assert issubclass(ochredb.InvalidArgumentError, ValueError)


# --------------------------------------------------------------------- settings and addresses


def test_closing_is_idempotent_and_final(client: ClientAPI, server: FakeServer) -> None:
    with client:
        pass
    client.close()
    assert server.closed == 1
    with pytest.raises(RuntimeError, match="closed"):
        client.heartbeat()


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        (("localhost", 8000, False), "http://localhost:8000"),
        (("db.example", 443, True), "https://db.example:443"),
        (("::1", 8000, False), "http://[::1]:8000"),
        (("http://db.example:9", 8000, False), "http://db.example:9"),
        (("https://db.example/prefix/", 8000, False), "https://db.example/prefix"),
        (("http://db.example/api/v2", 8000, True), "https://db.example"),
    ],
)
def test_addresses(arguments: tuple[str, int, bool], url: str) -> None:
    assert base_url(*arguments) == url


@pytest.mark.parametrize("host", ["db.example/path", "ftp://db.example"])
def test_bad_addresses(host: str) -> None:
    with pytest.raises(ValueError, match="host must be"):
        base_url(host, 1, False)


def test_nobody_there() -> None:
    with pytest.raises(ValueError, match=r"cannot connect to http://127\.0\.0\.1:1"):
        ochredb.HttpClient("127.0.0.1", 1)


def test_settings_that_contradict_the_arguments() -> None:
    with pytest.raises(ValueError, match="the settings say host elsewhere"):
        ochredb.HttpClient("here", settings=ochredb.Settings(chroma_server_host="elsewhere"))


def test_settings_take_chromas_names_and_warn_about_unknown_ones() -> None:
    settings = ochredb.Settings(allow_reset=True, anonymized_telemetry=False, chroma_db_impl="x")
    assert settings.allow_reset
    with pytest.warns(UserWarning, match="alow_reset"):
        ochredb.Settings(alow_reset=True)


@pytest.mark.parametrize(
    ("values", "headers"),
    [
        ({}, {}),
        (
            {"chroma_client_auth_provider": "chromadb.auth.token_authn.TokenAuthClientProvider"},
            {"Authorization": "Bearer s3cret"},
        ),
        (
            {
                "chroma_client_auth_provider": "TokenAuthClientProvider",
                "chroma_auth_token_transport_header": "X-Chroma-Token",
            },
            {"X-Chroma-Token": "s3cret"},
        ),
        (
            {"chroma_client_auth_provider": "BasicAuthClientProvider"},
            {"Authorization": "Basic czNjcmV0"},
        ),
    ],
)
def test_credentials_become_headers(values: dict[str, str], headers: dict[str, str]) -> None:
    settings = ochredb.Settings(chroma_client_auth_credentials="s3cret", **values)
    assert settings.authentication_headers() == headers


def test_registered_functions_are_known_by_name() -> None:
    assert known_embedding_functions["ochredb-lexical"] is LexicalEmbeddingFunction
