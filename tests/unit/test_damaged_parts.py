"""Reading parts of which something is damaged: derived sections are done without, truth is named.

I9 contained, I12 honest.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from ochredb.cancel import Cancel
from ochredb.errors import Corrupt
from ochredb.integrity import Report, check
from ochredb.parts import writer
from ochredb.parts.manifest import Manifest
from ochredb.peers import GetRequest, QueryRequest
from ochredb.types import Field, Op
from ochredb.where import Compare, DocumentContains
from ochredb_compactor import scheduler
from ochredb_compactor.config import CompactorConfig
from ochredb_frontend.messages import Request
from ochredb_node.node import Node, NodeConfig

from .kernel import add_rows, all_rows, append, make_collection, operations, running_node

DERIVED = ("norms", "ids/directory", "ids/arrays", "metadata/directory", "metadata/arrays",
           "text/directory", "text/arrays", "graph")  # fmt: skip


@pytest.fixture(autouse=True)
def _small_parts_have_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "GRAPH_ROWS_MIN", 20)
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 80)
    monkeypatch.setattr(writer, "PACKED_BYTES_MAX", 0)
    monkeypatch.setattr(writer, "TEXT_INDEX_ROWS_MIN", 1)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A store whose one collection has a part with a graph, and another collection."""
    path = str(tmp_path / "store")
    with running_node(path) as node:
        for name in ("records", "other"):
            collection = make_collection(node, name)
            add_rows(node, collection, 0, 60)
            node.compactor.compact_now(collection)
    return path


def _manifest(node: Node, name: str = "records") -> tuple[str, Manifest]:
    info = node.namespace.get_collection("default_tenant", "default_database", name)
    version = node.logs.snapshot(info.id).version
    (part,) = node.versions.parts(info.id, version)
    return info.id, part.manifest


def _damage(path: str, section: str, name: str = "records") -> None:
    """Flip a byte in the middle of a section; nobody has the store open."""
    with running_node(path) as node:
        _, manifest = _manifest(node, name)
    names = [name for name in manifest.sections if name.split("/")[0] == section] or [section]
    place = manifest.sections[names[0]]
    file = os.path.join(path, "objects", manifest.objects[place.object].key)
    content = bytearray(Path(file).read_bytes())
    content[(place.start + place.stop) // 2] ^= 0x10
    Path(file + ".new").write_bytes(content)
    os.rename(file + ".new", file)


def _answers(node: Node, collection: str) -> list[Any]:
    """What reads of every kind say."""
    cancel = Cancel()
    where = (Compare("number", "$gt", 30), DocumentContains("ment 4", False))
    found: list[Any] = [node.query.count(collection, cancel=cancel), all_rows(node, collection)]
    found += [
        node.query.get(collection, GetRequest(where=item), cancel=cancel).ids for item in where
    ]
    found.append(node.query.get(collection, GetRequest(ids=["id-7", "no"]), cancel=cancel).ids)
    for exact in (False, True):
        request = QueryRequest(
            embeddings=np.array([[1, 2, 3, 4]], np.float32), n_results=7, fields=Field.NONE,
            exact=exact,
        )  # fmt: skip
        answer = node.query.query(collection, request, cancel=cancel)
        found.append([item.ids for item in answer.records])
    return found


@pytest.mark.parametrize("section", DERIVED)
def test_a_damaged_index_is_done_without_and_built_anew(
    path: str, section: str, caplog: pytest.LogCaptureFixture
) -> None:
    with running_node(path) as node:
        collection, manifest = _manifest(node)
        right = _answers(node, collection)
    _damage(path, section)
    assert check(path).is_damaged
    with running_node(path, grace_s=0.0) as node:
        assert _answers(node, collection) == right
        assert _answers(node, collection) == right
        told = [item for item in caplog.records if "goes on without" in item.message]
        assert len({item.message for item in told}) == len(told) > 0
        node.compactor.rebuild_damaged()
        assert _manifest(node)[1].id != manifest.id
        assert not node.compactor.rebuild_damaged()
        assert _answers(node, collection) == right
        add_rows(node, collection, 60, 5)
        node.compactor.compact_now(collection)
        assert node.query.count(collection, cancel=Cancel()) == 65
        node.versions.release_replaced(node.clock.now_us() + 1, 100)
        node.compactor.collect_now(sweep_orphans=False)
    assert not check(path).is_damaged


def test_a_node_at_work_builds_a_damaged_graph_anew_by_itself(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own threads find it, after the first query that had to scan; nobody asks for it."""
    with running_node(path) as node:
        collection, manifest = _manifest(node)
        assert manifest.has_graph
        right = _answers(node, collection)
    _damage(path, "graph")
    config = NodeConfig(path=path, compactor=CompactorConfig(grace_s=0.0, graph_threads=1))
    node = Node(config)
    node.start()
    try:
        assert _answers(node, collection) == right
        assert any("goes on without" in item.message for item in caplog.records)
        deadline_s = time.monotonic() + 60.0
        while _manifest(node)[1].id == manifest.id:
            assert time.monotonic() < deadline_s, "it is not built anew"
            time.sleep(0.05)
        rebuilt = _manifest(node)[1]
        assert rebuilt.has_graph and rebuilt.rows == manifest.rows
        caplog.clear()
        assert _answers(node, collection) == right
        assert not [item for item in caplog.records if "goes on without" in item.message]
    finally:
        node.close()
    assert not check(path).is_damaged


@pytest.mark.parametrize("rows", [60, 9_000])  # Of less than a block, and of several.
@pytest.mark.parametrize("section", ["norms", "ids", "metadata", "text"])
def test_a_damaged_index_in_an_object_with_its_records_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, rows: int
) -> None:
    """Small parts are one object: records share blocks with indexes, but not their damage."""
    monkeypatch.setattr(writer, "PACKED_BYTES_MAX", 8 << 20)
    path = str(tmp_path / "packed")
    with running_node(path) as node:
        collection = make_collection(node, "records")
        add_rows(node, collection, 0, rows)
        node.compactor.compact_now(collection)
        _, manifest = _manifest(node)
        assert {place.object for place in manifest.sections.values()} == {0, 1}
        right = _answers(node, collection)
    _damage(path, section)
    (finding,) = check(path).findings
    assert finding.derived and section in {name.split("/")[0] for name in finding.sections}
    with running_node(path) as node:
        for _ in range(3):
            assert _answers(node, collection) == right
        node.compactor.rebuild_damaged()
        assert _manifest(node)[1].id != manifest.id
        assert _answers(node, collection) == right


@pytest.mark.parametrize("file", ["index", "graph"])
def test_a_missing_file_of_indexes_is_no_reason_to_stop(path: str, file: str) -> None:
    with running_node(path) as node:
        collection, manifest = _manifest(node)
        right = _answers(node, collection)
    os.unlink(os.path.join(path, "objects", "parts", manifest.id, file))
    with running_node(path) as node:
        assert _answers(node, collection) == right
        node.compactor.rebuild_damaged()
        assert _answers(node, collection) == right


@pytest.mark.parametrize("section", ["records", "vectors"])
def test_damaged_truth_is_an_error_that_names_the_records(path: str, section: str) -> None:
    _damage(path, section)
    with running_node(path) as node:
        collection, manifest = _manifest(node)
        with pytest.raises(Corrupt, match="60 of 60 records") as caught:
            all_rows(node, collection)
        assert f"parts/{manifest.id}/{section}" in str(caught.value)
        if section == "vectors":
            assert "'id-0', 'id-1'" in str(caught.value)
            ids = node.query.get(collection, GetRequest(), cancel=Cancel()).ids
            assert len(ids) == 60
        other, _ = _manifest(node, "other")
        assert len(all_rows(node, other)) == 60
        append(node, other, operations(Op.DELETE, ["id-1"]))
        node.compactor.compact_now(other)
        assert node.query.count(other, cancel=Cancel()) == 59


def test_growing_a_damaged_graph_builds_a_new_one(path: str) -> None:
    _damage(path, "graph")
    with running_node(path) as node:
        collection, _ = _manifest(node)
        add_rows(node, collection, 60, 60)
        node.compactor.compact_now(collection)
        _, manifest = _manifest(node)
        assert manifest.graph_labels == 120
        assert node.query.count(collection, cancel=Cancel()) == 120


def _checked(node: Node, query: str) -> Report:
    """What the server's own check says, asked over its API."""
    request = Request(method="POST", path="/api/v2/checks", query_string=query)
    begun = orjson.loads(node.frontend.handle(request).body)
    request = Request(method="GET", path=f"/api/v2/checks/{begun['id']}")
    while (state := orjson.loads(node.frontend.handle(request).body))["report"] is None:
        assert state["error"] is None, state
    return Report.from_document(state["report"])


@pytest.mark.parametrize("section", DERIVED)
def test_a_server_that_is_asked_builds_anew_what_it_finds(path: str, section: str) -> None:
    _damage(path, section)
    with running_node(path, grace_s=0.0) as node:
        _, manifest = _manifest(node)
        assert _checked(node, "").is_damaged
        report = _checked(node, "repair=true")
        assert [item.mended for item in report.findings] == [True]
        assert not report.is_damaged
        assert _manifest(node)[1].id != manifest.id
        assert not _checked(node, "").findings
        assert not _checked(node, "repair=true").findings


def test_a_part_that_has_lost_records_is_left_and_the_others_are_mended(path: str) -> None:
    with running_node(path) as node:
        part_ids = [_manifest(node, name)[1].id for name in ("records", "other")]
    for section in ("records", "graph"):
        _damage(path, section)
    _damage(path, "graph", "other")
    with running_node(path) as node:
        report = _checked(node, "repair=true")
        assert report.is_damaged
        after = [_manifest(node, name)[1].id for name in ("records", "other")]
        assert after[0] == part_ids[0] and after[1] != part_ids[1]
        (mended,) = [item for item in report.findings if item.mended]
        assert part_ids[1] in mended.place
        (graph,) = [item for item in report.findings if item.derived and not item.mended]
        assert "it cannot be built anew: " in graph.problem


def test_a_check_that_is_to_repair_needs_true_or_false(path: str) -> None:
    with running_node(path) as node:
        request = Request(method="POST", path="/api/v2/checks", query_string="repair=yes")
        answer = node.frontend.handle(request)
        assert (answer.status, b"repair" in answer.body) == (400, True)
