"""What is in quarantine: listed, inspected, dropped; its bytes stay until then."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

import ochredb
from ochredb.backup import backup, restore
from ochredb.cancel import Cancel
from ochredb.catalog import objects, quarantine
from ochredb.catalog.quarantine import Quarantined
from ochredb.errors import Corrupt, NotFound
from ochredb.testing.server_process import ochredb_server
from ochredb.types import Op
from ochredb_node.cli import main
from ochredb_node.node import Node

from .kernel import (
    ManualClock,
    append,
    ids_of,
    make_collection,
    object_keys,
    operations,
    running_node,
)
from .poisoned import adds, append_bytes


def _item(collection: str, start: int, stop: int, key: str | None = None) -> Quarantined:
    return Quarantined(
        collection=collection,
        start=start,
        stop=stop,
        reason="not JSON",
        payload=b"bytes" if key is None else None,
        object_key=key,
        checksum=7,
    )


def _record(node: Node, item: Quarantined) -> None:
    with node.database.write() as session:
        if item.object_key is not None:
            objects.introduce(session, [(item.object_key, 5)])
        quarantine.record(session, [item], now_us=3)


def test_rows_are_listed_page_by_page_and_counted(node: Node) -> None:
    one, two = sorted([make_collection(node, "one"), make_collection(node, "two")])
    for item in (_item(two, 1, 1), _item(one, 9, 12), _item(one, 3, 3)):
        _record(node, item)
    table = node.quarantine.table
    places = [(one, 3), (one, 9), (two, 1)]
    assert [(item.collection, item.start) for item in table.list()] == places
    assert [(item.collection, item.start) for item in table.list((one, 3), 1)] == places[1:2]
    assert [(item.collection, item.start) for item in table.list((one, 9))] == places[2:]
    counts = [
        node.query.indexing_status(name, cancel=Cancel()).num_quarantined_ops for name in (one, two)
    ]
    assert counts == [5, 1]
    found = table.get(one, 9)
    assert (found.payload, found.reason, found.count, found.time_us) == (b"bytes", "not JSON", 4, 3)
    with pytest.raises(NotFound, match="offset 4"):
        table.get(one, 4)


def test_a_dropped_row_lets_its_object_go_and_no_other(node: Node, clock: ManualClock) -> None:
    collection = make_collection(node)
    for start in (3, 9):
        node.store.create(f"fragments/{start}", b"bytes")
        _record(node, _item(collection, start, start, f"fragments/{start}"))
    clock.advance(3_600)
    node.compactor.collect_now(sweep_orphans=True)
    assert object_keys(node) == {"fragments/3", "fragments/9"}
    assert node.quarantine.table.drop(collection, 9).object_key == "fragments/9"
    with pytest.raises(NotFound):
        node.quarantine.table.drop(collection, 9)
    clock.advance(3_600)
    node.compactor.collect_now(sweep_orphans=True)
    assert object_keys(node) == {"fragments/3"}
    node.namespace.delete_collection("default_tenant", "default_database", "records")
    clock.advance(3_600)
    node.compactor.collect_now(sweep_orphans=True)
    assert object_keys(node) == set()


@pytest.fixture
def poisoned(tmp_path: Path) -> tuple[str, str]:
    """A directory with three operations in quarantine in two rows, and their collection's id."""
    path = str(tmp_path / "store")
    with running_node(path) as node:
        collection = make_collection(node)
        append(node, collection, operations(Op.ADD, ["x"], [[1.0, 1.0]]))
        append_bytes(node, collection, adds(["a", "b"], [b"{", b'{"n":1}']), 2)
        append_bytes(node, collection, b"no fragment at all", 2)
        node.compactor.compact_now(collection)
    return path, collection


def _cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["quarantine", *arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


@pytest.mark.parametrize("through", ["path", "url"])
def test_the_command_lists_shows_and_drops(
    poisoned: tuple[str, str],
    through: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, collection = poisoned
    monkeypatch.setenv("OCHREDB_TOKEN", "secret")
    with contextlib.ExitStack() as stack:
        target = path
        if through == "url":
            server = stack.enter_context(
                ochredb_server(Path(path), environment={"OCHREDB_TOKEN": "secret"})
            )
            target = server.url
        status, out, _ = _cli(capsys, "list", target)
        assert (status, out.count(collection)) == (0, 2)
        assert "default_tenant/default_database/records  1 operation  " in out
        assert "3 operations in quarantine" in out
        status, out, _ = _cli(capsys, "list", target, "--json")
        rows = [json.loads(line) for line in out.splitlines()]
        assert [(row["first_offset"], row["last_offset"]) for row in rows] == [(2, 2), (4, 5)]
        status, out, _ = _cli(capsys, "show", target, collection, "2")
        assert json.loads(out) == {
            "operation": "add",
            "id": "a",
            "dimension": 2,
            "document": "text of a",
            "metadata": "{",
        }
        status, out, err = _cli(capsys, "show", target, collection, "4")
        assert (status, out.strip()) == (0, "b'no fragment at all'")
        assert "not a fragment" in err
        file = str(tmp_path / "bytes")
        assert _cli(capsys, "show", target, collection, "4", "--output", file)[0] == 0
        assert Path(file).read_bytes() == b"no fragment at all"
        assert _cli(capsys, "drop", target, collection, "4")[0] == 0
        status, _, err = _cli(capsys, "drop", target, collection, "4")
        assert (status, "offset 4" in err) == (1, True)
        assert _cli(capsys, "drop", target, collection, "2")[0] == 0
        assert _cli(capsys, "list", target)[:2] == (0, "nothing is in quarantine\n")
        assert _cli(capsys, "show", target, "not-an-id", "2")[0] == 1
        if through == "url":
            monkeypatch.setenv("OCHREDB_TOKEN", "wrong")
            assert _cli(capsys, "list", target)[0] == 1
    assert _cli(capsys, "list", str(tmp_path / "nowhere"))[0] == 2


def test_damaged_bytes_in_quarantine_are_not_shown(node: Node) -> None:
    collection = make_collection(node)
    _record(node, _item(collection, 3, 3))
    with pytest.raises(Corrupt, match="fails its checksum"):
        node.quarantine.read(collection, 3)


def test_the_status_names_them_to_clients_once_there_are_any(
    poisoned: tuple[str, str], tmp_path: Path
) -> None:
    with ochredb.PersistentClient(poisoned[0]) as client:
        status = client.get_collection("records", embedding_function=None).get_indexing_status()
        assert (status.num_quarantined_ops, status.total_ops) == (3, 5)
        assert status.op_indexing_progress == 1.0
    with ochredb.PersistentClient(tmp_path / "other") as client:
        status = client.create_collection("new").get_indexing_status()
        assert status.num_quarantined_ops == 0


def test_a_backup_has_what_is_in_quarantine_and_checks_it(tmp_path: Path) -> None:
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    with running_node(source) as node:
        collection = make_collection(node)
        append(node, collection, operations(Op.ADD, ["x"], [[1.0, 1.0]]))
        append_bytes(node, collection, b"\xff" * 100_000, 2)
        append_bytes(node, collection, adds(["a", "b"], [b"{", b"{}"]), 2)
        node.compactor.compact_now(collection)
        append_bytes(node, collection, adds(["c", "d"], [b"{", b"{}"]), 2)
        key = node.quarantine.table.get(collection, 2).object_key
        assert key is not None
    assert backup(source, str(tmp_path / "backup")).records == 3
    restore(str(tmp_path / "backup"), target)
    with running_node(target) as node:
        assert ids_of(node, collection) == ["x", "b", "d"]
        assert node.quarantine.read(collection, 2) == b"\xff" * 100_000
        node.compactor.compact_now(collection)
        assert node.query.indexing_status(collection, cancel=Cancel()).num_quarantined_ops == 4
    file = Path(source, "objects", key)
    file.chmod(0o644)
    file.write_bytes(b"\xff" * 99_999 + b"!")
    with pytest.raises(Corrupt, match="fails its checksum"):
        backup(source, str(tmp_path / "again"))
