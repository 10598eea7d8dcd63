"""Our own client against real engines: embedded on disk, embedded in memory, and over HTTP.

Everything in the first part must hold for all three; the second part is about life inside a
process: sharing, closing, not closing, forking.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ochredb
from ochredb.api.types import Documents, Embeddings
from ochredb.embedding_functions import EmbeddingFunction
from ochredb.testing.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
VECTORS = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
DOCUMENTS = ["a red fox", "a sleeping dog", "Foxes are RED", "nothing of the kind"]
METADATAS: list[dict[str, Any]] = [
    {"animal": "fox", "legs": 4, "weight": 6.0, "wild": True},
    {"animal": "dog", "legs": 4, "weight": 20.5, "wild": False, "tags": ["tame", "asleep"]},
    {"animal": "fox", "legs": 8},
    {"legs": 0},
]
Settings = ochredb.Settings


@pytest.fixture(params=["persistent", "ephemeral", "http"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> ochredb.Settings:
    """What leads to an engine of each kind."""
    if request.param == "persistent":
        return Settings(is_persistent=True, persist_directory=str(tmp_path / "data"))
    if request.param == "ephemeral":
        return Settings()
    server: ServerProcess = request.getfixturevalue("server")
    return Settings(chroma_server_host=server.host, chroma_server_http_port=server.port)


@pytest.fixture
def admin(settings: ochredb.Settings) -> Iterator[ochredb.AdminAPI]:
    with ochredb.AdminClient(settings) as opened:
        yield opened


@pytest.fixture
def client(settings: ochredb.Settings, admin: ochredb.AdminAPI) -> Iterator[ochredb.ClientAPI]:
    """A client of a database of its own: engines may be shared with other tests."""
    database = f"db-{uuid.uuid4().hex}"
    admin.create_database(database)
    with ochredb.Client(settings, database=database) as opened:
        yield opened


@pytest.fixture
def filled(client: ochredb.ClientAPI) -> ochredb.Collection:
    collection = client.create_collection("animals")
    collection.add(ids=list("abcd"), embeddings=VECTORS, documents=DOCUMENTS, metadatas=METADATAS)
    return collection


def test_the_server_introduces_itself(client: ochredb.ClientAPI) -> None:
    assert client.heartbeat() > 1_600_000_000_000_000_000
    assert client.get_version() == "1.0.0"
    assert client.get_max_batch_size() > 0
    assert client.get_user_identity().tenant == ochredb.DEFAULT_TENANT


def test_records_come_back_as_they_were_written(filled: ochredb.Collection) -> None:
    filled.add(ids="e", embeddings=[0.1, -2.5, 1e-7], uris="file:e")
    assert filled.count() == 5
    got = filled.get(include=["embeddings", "documents", "metadatas", "uris"])
    assert got["ids"] == list("abcde")
    assert got["documents"] == [*DOCUMENTS, None]
    assert got["metadatas"] == [*METADATAS, None]
    assert got["uris"] == [None, None, None, None, "file:e"]
    assert got["embeddings"] is not None
    assert got["embeddings"].shape == (5, 3)
    assert got["embeddings"][4].tolist() == [0.1, -2.5, 1e-7]
    first = got["metadatas"][0]
    assert first is not None
    assert [type(first[key]) for key in ("legs", "weight", "wild")] == [int, float, bool]


def test_peek_limit_and_offset(filled: ochredb.Collection) -> None:
    peeked = filled.peek(2)
    assert peeked["ids"] == ["a", "b"]
    assert peeked["embeddings"] is not None
    assert peeked["embeddings"].tolist() == VECTORS[:2]
    assert filled.get(limit=2, offset=1)["ids"] == ["b", "c"]
    assert filled.get(ids=["d", "nobody", "a"])["ids"] == ["a", "d"]
    assert filled.get(ids="b", include=[])["documents"] is None


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        ({"animal": "fox"}, "ac"),
        ({"legs": {"$gte": 4}}, "abc"),
        ({"weight": {"$lt": 10}}, "a"),
        ({"wild": False}, "b"),
        ({"animal": {"$in": ["dog", "cat"]}}, "b"),
        ({"animal": {"$ne": "fox"}}, "bd"),
        ({"tags": {"$contains": "tame"}}, "b"),
        ({"$and": [{"animal": "fox"}, {"legs": 8}]}, "c"),
        ({"$or": [{"legs": 0}, {"wild": True}]}, "ad"),
    ],
)
def test_metadata_filters(filled: ochredb.Collection, where: dict[str, Any], ids: str) -> None:
    assert filled.get(where=where)["ids"] == list(ids)


@pytest.mark.parametrize(
    ("where_document", "ids"),
    [
        ({"$contains": "fox"}, "a"),
        ({"$not_contains": "fox"}, "bcd"),
        ({"$regex": "(?i)red"}, "ac"),
        ({"$or": [{"$contains": "dog"}, {"$contains": "kind"}]}, "bd"),
    ],
)
def test_text_filters(filled: ochredb.Collection, where_document: dict[str, Any], ids: str) -> None:
    assert filled.get(where_document=where_document)["ids"] == list(ids)


@pytest.mark.parametrize(
    ("space", "distances"),
    [
        ("l2", [0.0, 1.0, 2.0, 2.0]),
        ("cosine", [0.0, 1 - 2**-0.5, 1.0, 1.0]),
        ("ip", [0.0, 0.0, 1.0, 1.0]),
    ],
)
def test_queries_rank_by_distance(
    client: ochredb.ClientAPI, space: Any, distances: list[float]
) -> None:
    collection = client.create_collection("spaces", configuration={"hnsw": {"space": space}})
    collection.add(ids=list("abcd"), embeddings=np.array(VECTORS, dtype=np.float32))
    result = collection.query([VECTORS[0], VECTORS[2]], include=["distances", "embeddings"])
    assert result["distances"] is not None
    np.testing.assert_allclose(result["distances"][0], distances, atol=1e-6)
    assert set(result["ids"][0][:2]) == {"a", "d"}
    assert result["ids"][1][0] == "c"
    assert result["embeddings"] is not None
    assert result["embeddings"][1][0].tolist() == VECTORS[2]


def test_queries_by_text_use_the_collections_function(client: ochredb.ClientAPI) -> None:
    client.create_collection("texts").add(ids=list("abcd"), documents=DOCUMENTS)
    reopened = client.get_collection("texts")
    result = reopened.query(query_texts=["fox", "dogs sleep"], n_results=1)
    assert result["ids"][1] == ["b"]
    assert result["documents"] is not None
    assert "fox" in str(result["documents"][0][0]).lower()
    assert reopened.query(query_texts="fox", where={"none": 1})["ids"] == [[]]
    assert reopened.configuration_json["hnsw"]["space"] == "l2"


def test_queries_compose_with_filters(filled: ochredb.Collection) -> None:
    result = filled.query(
        [1.0, 0.0, 0.0],
        n_results=3,
        where={"legs": {"$gt": 0}},
        where_document={"$regex": "dog|RED"},
    )
    assert sorted(result["ids"][0]) == ["b", "c"]
    assert filled.query([1.0, 0.0, 0.0], ids=["b", "d"], n_results=1)["ids"] == [["d"]]


def test_update_upsert_and_delete(filled: ochredb.Collection) -> None:
    filled.update(
        ids=["a", "nobody"],
        embeddings=[[9.0, 9.0, 9.0]] * 2,
        metadatas=[{"legs": 3, "wild": None}, {"legs": 1}],
        documents=["x", "y"],
    )
    filled.upsert(
        ids=["b", "e"], embeddings=[[5.0, 5.0, 5.0]] * 2, metadatas=[{"new": 1}, {"new": 2}]
    )
    got = filled.get(
        ids=["a", "b", "e", "nobody"], include=["metadatas", "documents", "embeddings"]
    )
    assert got["ids"] == ["a", "b", "e"]
    assert got["documents"] == ["x", DOCUMENTS[1], None]
    assert got["metadatas"] == [
        {"animal": "fox", "legs": 3, "weight": 6.0},
        {**METADATAS[1], "new": 1},
        {"new": 2},
    ]
    assert got["embeddings"] is not None
    assert got["embeddings"].tolist() == [[9.0] * 3, [5.0] * 3, [5.0] * 3]
    assert filled.delete(ids=["a"]) == {"deleted": 1}
    assert filled.delete(where={"new": {"$gte": 1}}, limit=1) == {"deleted": 1}
    assert filled.get()["ids"] == ["c", "d", "e"]


def test_an_id_that_exists_is_not_added_again(filled: ochredb.Collection) -> None:
    filled.add(ids=["a", "z"], embeddings=[[7.0, 7.0, 7.0]] * 2, documents=["other", "new"])
    assert filled.get(ids=["a", "z"])["documents"] == [DOCUMENTS[0], "new"]


def test_collections_are_created_listed_renamed_and_deleted(client: ochredb.ClientAPI) -> None:
    for name in ("one", "two", "three"):
        client.create_collection(name, metadata={"name": name})
    assert client.count_collections() == 3
    assert sorted(each.name for each in client.list_collections()) == ["one", "three", "two"]
    assert len(client.list_collections(limit=2, offset=2)) == 1
    with pytest.raises(ochredb.UniqueConstraintError, match="one"):
        client.create_collection("one")
    one = client.get_or_create_collection("one", metadata={"ignored": True})
    assert one.metadata == {"name": "one"}
    assert client.get_collection_by_id(one.id) == one
    one.modify(name="uno", metadata={"a": 1}, configuration={"hnsw": {"ef_search": 77}})
    again = client.get_collection("uno")
    assert again == one
    assert again.metadata == {"a": 1}
    assert again.configuration_json["hnsw"]["ef_search"] == 77
    assert again.schema == one.schema
    client.delete_collection("uno")
    with pytest.raises(ochredb.NotFoundError):
        client.get_collection("uno")
    with pytest.raises(ochredb.NotFoundError):
        one.count()


def test_tenants_and_databases(
    settings: ochredb.Settings, admin: ochredb.AdminAPI, client: ochredb.ClientAPI
) -> None:
    tenant, database = f"tenant-{uuid.uuid4().hex}", f"db-{uuid.uuid4().hex}"
    admin.create_tenant(tenant)
    assert admin.get_tenant(tenant) == {"name": tenant}
    with pytest.raises(ochredb.UniqueConstraintError):
        admin.create_tenant(tenant)
    for name in (database, "another"):
        admin.create_database(name, tenant)
    assert [each["name"] for each in admin.list_databases(tenant=tenant)] == ["another", database]
    assert len(admin.list_databases(limit=1, offset=1, tenant=tenant)) == 1
    assert admin.get_database(database, tenant)["tenant"] == tenant

    client.set_tenant(tenant, database)
    there = client.create_collection("there")
    assert (there.tenant, there.database) == (tenant, database)
    client.set_database("another")
    assert client.count_collections() == 0
    with pytest.raises(ochredb.NotFoundError):
        client.set_database("missing")
    with pytest.raises(ochredb.NotFoundError):
        client.set_tenant("missing")
    assert (client.tenant, client.database) == (tenant, "another")
    with pytest.raises(ochredb.NotFoundError):
        ochredb.Client(settings, tenant=tenant, database="missing")
    admin.delete_database(database, tenant)
    with pytest.raises(ochredb.NotFoundError):
        there.count()


def test_refusals_name_the_mistake(filled: ochredb.Collection, client: ochredb.ClientAPI) -> None:
    with pytest.raises(ValueError, match="dimension of 3, got 2"):
        filled.add(ids=["x", "y"], embeddings=[[1.0, 2.0]] * 2)
    with pytest.raises(ochredb.InvalidArgumentError, match="Invalid where clause"):
        filled.get(where={"legs": {"$unknown": 1}})
    with pytest.raises(ochredb.InvalidArgumentError):
        filled.add(ids=["x"], embeddings=[[1e300, 0.0, 0.0]])
    with pytest.raises(ochredb.InvalidArgumentError, match="3-512 characters"):
        client.create_collection("x")
    assert filled.count() == 4


def test_threads_share_a_client(client: ochredb.ClientAPI) -> None:
    collection = client.create_collection("threads")

    def work(worker: int) -> int:
        for batch in range(5):
            ids = [f"{worker}-{batch}-{index}" for index in range(20)]
            collection.add(ids=ids, embeddings=[[float(worker), 1.0]] * 20)
        return len(collection.get(ids=[f"{worker}-4-19"])["ids"])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [1] * 4
    assert collection.count() == 400


# ------------------------------------------------------------------ life inside a process


def test_clients_of_one_directory_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = ochredb.PersistentClient("data")
    second = ochredb.PersistentClient(tmp_path / "data")
    with ochredb.PersistentClient(tmp_path / "other") as other:
        assert other.count_collections() == 0
        first.create_collection("shared").add(ids=["a"], embeddings=[[1.0]])
        assert second.get_collection("shared").count() == 1
        assert other.count_collections() == 0
    first.close()
    assert second.get_collection("shared").count() == 1
    with pytest.raises(RuntimeError, match="closed"):
        first.heartbeat()
    second.close()
    with ochredb.PersistentClient("data") as third:
        assert third.get_collection("shared").get()["ids"] == ["a"]


def test_ephemeral_clients_share_their_memory() -> None:
    name = f"memory-{uuid.uuid4().hex}"
    with ochredb.EphemeralClient() as first:
        first.create_collection(name)
    with ochredb.EphemeralClient() as second:
        assert second.get_collection(name).count() == 0
        second.delete_collection(name)


def test_reset_needs_permission_of_the_client_that_asks(tmp_path: Path) -> None:
    with (
        ochredb.PersistentClient(tmp_path) as careful,
        ochredb.PersistentClient(tmp_path, Settings(allow_reset=True)) as bold,
    ):
        careful.create_collection("kept")
        with pytest.raises(ochredb.ChromaError, match="Reset is disabled"):
            careful.reset()
        assert careful.count_collections() == 1
        assert bold.reset() is True
        assert careful.count_collections() == 0


class Reversed(EmbeddingFunction[Documents]):
    """Character codes of the end of a text."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input: Documents) -> Embeddings:  # noqa: A002
        codes = [[float(ord(char)) for char in text[::-1]] for text in input]
        return [np.array((row + [0.0] * self.length)[: self.length]) for row in codes]

    @staticmethod
    def name() -> str:
        return "test-reversed"

    def get_config(self) -> dict[str, Any]:
        return {"length": self.length}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> Reversed:
        return Reversed(config["length"])


def test_a_reopened_collection_embeds_as_before(tmp_path: Path) -> None:
    with ochredb.PersistentClient(tmp_path) as client:
        collection = client.create_collection("mine", embedding_function=Reversed(4))
        collection.add(ids=["a", "b"], documents=["abc", "xyz"])
    with ochredb.PersistentClient(tmp_path) as client:
        reopened = client.get_collection("mine")
        result = reopened.query(query_texts="1xyz", n_results=1)
        assert result["ids"] == [["b"]]
        with pytest.raises(ValueError, match="test-reversed"):
            client.get_collection("mine", embedding_function=Other())


class Other(Reversed):
    def __init__(self) -> None:
        super().__init__(1)

    @staticmethod
    def name() -> str:
        return "test-other"


def run_python(program: str, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_a_process_that_never_closes_loses_nothing(tmp_path: Path) -> None:
    program = """
        import sys, ochredb
        client = ochredb.PersistentClient(sys.argv[1])
        client.create_collection("kept").add(ids=["a", "b"], documents=["x", "y"])
    """
    run_python(program, str(tmp_path))
    with ochredb.PersistentClient(tmp_path) as client:
        assert client.get_collection("kept").get()["documents"] == ["x", "y"]


def test_a_client_that_is_dropped_closes_its_connections(server: ServerProcess) -> None:
    program = f"""
        import gc, sys, warnings
        warnings.simplefilter("error")
        unraisable = []
        sys.unraisablehook = lambda hook: unraisable.append(hook.exc_value)
        import ochredb
        client = ochredb.HttpClient({server.host!r}, {server.port})
        client.heartbeat()
        del client
        gc.collect()
        print(unraisable)
    """
    assert run_python(program).strip() == "[]"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("kind", ["persistent", "http"])
def test_parent_and_child_both_go_on_after_a_fork(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, collection_name: str
) -> None:
    if kind == "http":
        server: ServerProcess = request.getfixturevalue("server")
        address = f"HttpClient({server.host!r}, {server.port})"
    else:
        address = f"PersistentClient({str(tmp_path / 'data')!r})"
    program = f"""
        import os, sys, warnings
        warnings.simplefilter("ignore")  # Newer Pythons warn of forking with threads.
        import ochredb
        collection = ochredb.{address}.create_collection({collection_name!r})
        collection.add(ids=["before"], embeddings=[[1.0]])
        child = os.fork()
        me = "parent" if child else "child"
        for index in range(20):
            collection.add(ids=[f"{{me}}-{{index}}"], embeddings=[[2.0]])
            assert f"{{me}}-{{index}}" in collection.get(include=[])["ids"]
        if not child:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print(collection.count())
    """
    assert run_python(program).strip() == "41"


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("not a database")
    with pytest.raises(ochredb.InvalidArgumentError, match=str(tmp_path)):
        ochredb.PersistentClient(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_the_demo_runs_into_a_pipe() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "stdlib_search.py")],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for text in ("tempfile.NamedTemporaryFile", "['shutil.copytree'], seen at once", "Done in"):
        assert text in run.stdout
    assert "\x1b" not in run.stdout, "no colours in a file"
    assert max(map(len, run.stdout.splitlines())) <= 100
