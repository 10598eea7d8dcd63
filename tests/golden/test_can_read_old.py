"""Today's readers on files of every format version that was ever released."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from ochredb.cancel import Cancel
from ochredb.catalog.migrate import format_version
from ochredb.catalog.schema import FORMAT_VERSION
from ochredb.configuration import IndexSettings
from ochredb.fragment import decode
from ochredb.parts import deleted
from ochredb.parts.manifest import Manifest
from ochredb.parts.reader import Part
from ochredb.peers import GetRequest, QueryRequest
from ochredb.storage.directory import DirectoryStore
from ochredb.types import Field, Op, Operations
from ochredb.where import Compare, DocumentContains
from ochredb_compactor import scheduler
from ochredb_node.node import Node, NodeConfig

from .make import DELETED_ROWS, example, rows
from .stores import HERE, VERSIONS, rebuild

ALL_FIELDS = Field.DOCUMENT | Field.EMBEDDING | Field.METADATA | Field.URI
GONE = {"id-1", "id-2", "id-3", "id-9", "id-41", "id-90"}
LAST = 105


@pytest.fixture(params=VERSIONS)
def golden(request: pytest.FixtureRequest) -> Path:
    return HERE / str(request.param)


@pytest.fixture
def node(golden: Path, tmp_path: Path) -> Iterator[Node]:
    """A node on a store that is put together again from the dump and the objects."""
    rebuild(golden.name, tmp_path)
    node = Node(NodeConfig(path=str(tmp_path)))
    node.start(background=False)
    yield node
    node.close()


def _expected() -> list[dict[str, Any]]:
    """Every living record, in order of insertion."""
    records = rows(0, LAST)
    assert records.embeddings is not None
    assert records.documents is not None
    assert records.uris is not None
    assert records.metadatas is not None
    return [
        {
            "id": name,
            "embedding": records.embeddings[i].tolist(),
            "document": "changed" if name == "id-7" else records.documents[i],
            "uri": records.uris[i],
            "metadata": orjson.loads(records.metadatas[i] or b"null"),
        }
        for i, name in enumerate(records.ids)
        if name not in GONE
    ]


def _collection(node: Node) -> str:
    return node.namespace.get_collection("default_tenant", "default_database", "golden").id


def _rows(node: Node) -> list[dict[str, Any]]:
    answer = node.query.get(_collection(node), GetRequest(fields=ALL_FIELDS), cancel=Cancel())
    assert answer.documents is not None
    assert answer.uris is not None
    assert answer.metadatas is not None
    assert answer.embeddings is not None
    return [
        {
            "id": name,
            "embedding": answer.embeddings[i].tolist(),
            "document": answer.documents[i],
            "uri": answer.uris[i],
            "metadata": orjson.loads(answer.metadatas[i] or b"null"),
        }
        for i, name in enumerate(answer.ids)
    ]


def test_there_is_a_golden_folder_of_each_format() -> None:
    assert [f"v{number}" for number in range(1, FORMAT_VERSION + 1)] == VERSIONS


def test_a_golden_store_is_of_the_format_that_its_folder_names(tmp_path: Path) -> None:
    for name in VERSIONS:
        rebuild(name, tmp_path / name)
        assert format_version(str(tmp_path / name)) == int(name[1:])


def test_a_fragment(golden: Path) -> None:
    found, expected = decode((golden / "fragment.arrows").read_bytes()), example()
    assert (found.op, found.ids) == (expected.op, expected.ids)
    assert (found.documents, found.uris) == (expected.documents, expected.uris)
    assert found.metadatas == expected.metadatas
    assert found.embedded is not None
    assert expected.embedded is not None
    assert found.embedded.tolist() == expected.embedded.tolist()
    assert found.embeddings is not None
    assert expected.embeddings is not None
    mask = found.embedded
    assert found.embeddings[mask].tobytes() == expected.embeddings[mask].tobytes()


def test_deleted_rows(golden: Path) -> None:
    live = deleted.decode((golden / "deleted-rows.bin").read_bytes(), 70_001)
    assert np.flatnonzero(~live).tolist() == DELETED_ROWS


def test_a_part_with_every_section(golden: Path) -> None:
    manifest = Manifest.from_json((golden / "manifest.json").read_text(encoding="utf-8"))
    assert {
        "records", "vectors", "norms", "graph_rows", "ids/directory", "ids/arrays",
        "metadata/directory", "metadata/arrays", "text/directory", "text/arrays",
    } <= manifest.sections.keys()  # fmt: skip
    graph = {"graph"} if golden.name in ("v1", "v2") else {"graph/directory", "graph/arrays"}
    assert graph <= manifest.sections.keys()
    store = DirectoryStore(str(golden / "objects"))
    part = Part(store, manifest, IndexSettings(space="cosine"))
    expected = [record for record in rows(0, 80).ids if record not in ("id-1", "id-41")]
    assert part.take_ids(np.arange(len(part))) == expected
    assert (len(part), part.graph_labels, part.dimension) == (78, 79, 4)
    assert part.seqs.tolist() == [n + 1 for n in range(80) if n not in (1, 41)]
    records = rows(0, 80)
    assert records.embeddings is not None
    kept = [n for n in range(80) if n not in (1, 41)]
    assert part.vectors.tobytes() == records.embeddings[kept].tobytes()
    np.testing.assert_allclose(part.squared_norms, (part.vectors**2).sum(axis=1), rtol=1e-6)
    assert part.find_ids(["id-0", "id-1", "id-79"]).tolist() == [0, -1, 77]
    assert part.text is not None
    candidates = part.text.candidates(b"number 42 ")
    assert candidates is None or part.find_ids(["id-42"])[0] in candidates
    assert part.graph is not None
    for row in (0, 20, 77):
        found = part.graph.search(part.vectors[row : row + 1], 100)
        assert found is not None
        assert row in found[0].tolist()


def test_a_whole_store(node: Node) -> None:
    collection = _collection(node)
    info = node.namespace.get_collection_by_id(collection)
    assert info.metadata == {"purpose": "golden", "number": 7}
    assert info.configuration["hnsw"]["space"] == "cosine"
    assert ("half", "float") in info.key_types
    assert _rows(node) == _expected()

    def ids(where: Any) -> list[str]:
        request = GetRequest(where=where, fields=Field.NONE)
        return node.query.get(collection, request, cancel=Cancel()).ids

    assert ids(Compare("n", "$lt", 5)) == ["id-0", "id-4"]
    assert ids(Compare("half", "$gte", 51.5)) == ["id-103"]
    assert ids(DocumentContains("number 88 ", False)) == ["id-88"]
    vectors = np.array([_expected()[50]["embedding"]], np.float32)
    for exact in (False, True):
        request = QueryRequest(embeddings=vectors, n_results=1, exact=exact)
        answer = node.query.query(collection, request, cancel=Cancel())
        assert answer.records[0].ids == [_expected()[50]["id"]]


def test_a_whole_store_goes_on(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Appends, a repeated key, compaction and merging on what an older release left."""
    monkeypatch.setattr(scheduler, "GRAPH_ROWS_MIN", 20)
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 80)
    collection = _collection(node)
    again = Operations(op=Op.UPDATE, ids=["id-7"], documents=["changed"])
    assert node.log.append(
        collection, again, idempotency_key="a client's key", cancel=Cancel()
    ).repeated
    node.compactor.compact_now(collection)
    assert _rows(node) == _expected()
    (part,) = node.versions.parts(collection, node.logs.snapshot(collection).version)
    assert part.manifest.graph_labels == 79 + 25  # It grew.
    assert part.manifest.sections.keys() >= {"graph/directory", "graph/arrays", "graph_rows"}
    node.log.append(collection, rows(LAST, 3), cancel=Cancel())
    assert [row["id"] for row in _rows(node)][-3:] == ["id-105", "id-106", "id-107"]
