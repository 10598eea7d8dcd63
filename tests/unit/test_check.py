"""`ochredb check`: what it finds in a store that is whole, damaged, or in use."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from ochredb.backup import Progress
from ochredb.clock import SystemClock
from ochredb.errors import Corrupt, Exhausted, InvalidArgument
from ochredb.integrity import Report, check, check_store, running
from ochredb.parts import deleted, writer
from ochredb.types import Op
from ochredb_compactor import scheduler
from ochredb_frontend.messages import Request
from ochredb_node import cli
from ochredb_node.node import Node

from .kernel import add_rows, append, make_collection, operations, running_node


def _fill(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of object: split parts with graphs, bitmaps, fragments inline and in objects."""
    monkeypatch.setattr(scheduler, "GRAPH_ROWS_MIN", 20)
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 80)
    monkeypatch.setattr(writer, "PACKED_BYTES_MAX", 4_000)
    monkeypatch.setattr(deleted, "INLINE_BYTES_MAX", 0)
    for number in range(2):
        name = make_collection(node, f"name-{number}")
        add_rows(node, name, 0, 40)
        node.compactor.compact_now(name)
        add_rows(node, name, 40, 10)
        append(node, name, operations(Op.DELETE, ["id-3", "id-45", "id-4"]))
        node.compactor.fold_now(name)
        add_rows(node, name, 60, 30)
        append(node, name, operations(Op.UPDATE, ["id-7"], documents=["changed"]))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that nobody has open."""
    path = str(tmp_path / "store")
    with running_node(path, inline_bytes_max=600, grace_s=0.0) as node:
        _fill(node, monkeypatch)
        _collect(node)
    return path


def _collect(node: Node) -> None:
    """Leave no garbage: nobody refers to it, and nobody needs to know that it is damaged."""
    node.versions.release_replaced(node.clock.now_us() + 1, 100)
    node.compactor.collect_now(sweep_orphans=False)


def _objects(store: str) -> list[str]:
    root = os.path.join(store, "objects")
    return sorted(
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root)
        for name in names
        if os.path.basename(folder) != "tmp"
    )


def _replace(path: str, content: bytes) -> None:
    with open(path + ".new", "wb") as file:
        file.write(content)
    os.rename(path + ".new", path)


def test_a_whole_store_is_undamaged_and_unchanged(store: str) -> None:
    before = _objects(store)
    report = check(store)
    assert not report.is_damaged, report.findings
    assert (report.collections, report.notes, report.quarantine) == (2, (), ())
    assert {"store_id", *(key for key in before)} == set(_objects(store))
    kinds = {key.split("/")[0] for key in before} | {key.split("/")[-1] for key in before}
    assert kinds >= {"parts", "fragments", "deleted", "packed", "records", "vectors", "graph"}
    assert report.objects == len(before) - 1
    assert Report.from_document(orjson.loads(orjson.dumps(report.to_document()))) == report


@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "deleted"])
def test_all_damaged_objects_are_named(store: str, how: str) -> None:
    keys = _objects(store)
    for key in keys:
        path = os.path.join(store, "objects", key)
        content = Path(path).read_bytes()
        middle = len(content) // 2
        if how == "flipped":
            changed = bytes([content[middle] ^ 1])
            _replace(path, content[:middle] + changed + content[middle + 1 :])
        elif how == "deleted":
            os.unlink(path)
        else:
            _replace(path, content[:-1] if how == "cut" else content + b"\0")
    report = check(store)
    assert sorted(finding.place for finding in report.findings) == keys
    for finding in report.findings:
        if finding.place.startswith("parts/"):
            assert finding.collections[0].startswith("default_tenant/default_database/name-")
            assert finding.sections
            # The end of a packed object is derived, and its records are known to be whole.
            derived = ("/index", "/graph") if how in ("flipped", "deleted") else (
                "/index", "/graph", "/packed"
            )  # fmt: skip
            assert finding.derived == finding.place.endswith(derived)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("UPDATE logs SET next_offset = next_offset - 1", "the log ends at offset"),
        ("UPDATE logs SET version = version - 1", "does not exist"),
        ("UPDATE version_parts SET part = 'other' WHERE position = 0", "does not exist"),
        ("UPDATE version_parts SET deleted_count = deleted_count + 1", "deleted"),
        ("DELETE FROM fragments WHERE rowid = 1", "fragment"),
        ("DELETE FROM object_references WHERE kind = 'version'", "is not kept"),
        ("DELETE FROM objects", "is not known"),
        ("UPDATE fragments SET checksum = checksum + 1", "checksum"),
        ("UPDATE collections SET database_id = 'x'", "database that does not exist"),
        ("UPDATE parts SET manifest = replace(manifest, '\"rows\"', '\"rowz\"')", "manifest"),
    ],
)
def test_catalogs_that_contradict_themselves(store: str, change: str, problem: str) -> None:
    connection = sqlite3.connect(os.path.join(store, "ochredb.sqlite3"))
    connection.execute(change)
    connection.commit()
    connection.close()
    os.unlink(os.path.join(store, "ochredb.seal"))
    os.unlink(os.path.join(store, "write.lock"))
    report = check(store)
    assert any(problem in finding.problem for finding in report.findings), report.findings


def test_a_catalog_that_cannot_be_opened_is_damage(store: str) -> None:
    path = os.path.join(store, "ochredb.sqlite3")
    content = Path(path).read_bytes()
    _replace(path, b"x" * 100 + content[100:])
    assert [item.place for item in check(store).findings] == ["catalog"]
    os.unlink(path)
    (finding,) = check(store).findings
    assert "is missing" in finding.problem
    assert not os.path.exists(path)


def test_a_catalog_that_lacks_its_last_byte(store: str) -> None:
    """SQLite takes it for zero; here it is found without the seal, too."""
    path = os.path.join(store, "ochredb.sqlite3")
    _replace(path, Path(path).read_bytes()[:-1])
    os.unlink(os.path.join(store, "ochredb.seal"))
    assert any("no whole pages" in item.problem for item in check(store).findings)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        check(str(tmp_path / "nothing"))


def test_quarantine_is_reported(store: str) -> None:
    connection = sqlite3.connect(os.path.join(store, "ochredb.sqlite3"))
    connection.execute("INSERT INTO quarantine VALUES ('some', 7, 9, 'why', NULL, NULL, 1, 1)")
    connection.commit()
    connection.close()
    os.unlink(os.path.join(store, "ochredb.seal"))
    report = check(store)
    assert [(item.start, item.stop, item.reason) for item in report.quarantine] == [(7, 9, "why")]
    assert not report.is_damaged


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    with running_node(str(tmp_path / "store"), inline_bytes_max=600) as node:
        _fill(node, monkeypatch)
        yield node


def test_a_store_in_use_is_checked_by_its_server(node: Node) -> None:
    def ask(method: str, path: str) -> tuple[int, dict[str, object]]:
        request = Request(method=method, path=f"/api/v2/checks{path}")
        response = node.frontend.handle(request)
        return response.status, orjson.loads(response.body)

    status, begun = ask("POST", "")
    assert status == 201
    while (state := ask("GET", f"/{begun['id']}")[1])["report"] is None:
        assert state["error"] is None
    report = Report.from_document(state["report"])
    assert not report.is_damaged
    assert report.objects > 5
    assert ask("DELETE", f"/{begun['id']}") == (200, {})
    assert ask("GET", f"/{begun['id']}")[0] == 404


def test_one_check_runs_at_a_time_and_can_be_given_up(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(_backups: object, _clock: object, progress: Progress) -> Report:
        go_on.wait(10)
        progress("x", 1, 2)
        raise AssertionError("it was given up")

    monkeypatch.setattr(running, "check_store", slow)
    checks = node.frontend.checks
    first = checks.begin()
    with pytest.raises(Exhausted):
        checks.begin()
    checks.end(first)
    go_on.set()


def test_a_pin_keeps_what_is_checked(node: Node) -> None:
    seen: list[str] = []

    def progress(what: str, done_bytes: int, total_bytes: int) -> None:
        assert done_bytes <= total_bytes
        if not seen:  # While it runs, everything is replaced and collected.
            for info in node.namespace.list_collections(
                "default_tenant", "default_database", None, 0
            ):
                append(node, info.id, operations(Op.DELETE, ["id-1"]))
                node.compactor.compact_now(info.id)
            _collect(node)
        seen.append(what)

    assert not check_store(node.backups, SystemClock(), progress).is_damaged
    assert seen


def test_the_command(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", store]) == 0
    assert ": undamaged; 2 collections" in capsys.readouterr().out
    key = next(key for key in _objects(store) if key.endswith("/graph"))
    os.unlink(os.path.join(store, "objects", key))
    assert cli.main(["check", store]) == 1
    out, err = capsys.readouterr()
    assert "1 damage found" in out
    assert f"damaged: {key}: is missing (in graph" in err
    assert cli.main(["check", store, "--json"]) == 1
    assert orjson.loads(capsys.readouterr().out)["findings"][0]["place"] == key


@pytest.mark.parametrize("table", ["parts", "version_parts"])
def test_rows_that_a_damaged_index_hides_are_no_answer(node: Node, table: str) -> None:
    """As a page of zeros does, which SQLite takes for an empty one."""
    (info, *_) = node.namespace.list_collections("default_tenant", "default_database", None, 0)
    version = node.logs.snapshot(info.id).version
    with node.database.write() as session:
        session.connection.execute(f"DELETE FROM {table}")  # type: ignore[attr-defined]
    with pytest.raises(Corrupt, match=r"not in the catalog|without parts"):
        node.versions.parts(info.id, version)
