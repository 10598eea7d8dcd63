"""`ochredb repair`: put back, built anew, given up; nothing is lost without being named."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from ochredb import crash_points
from ochredb.checksum import block_checksums, xxh3
from ochredb.integrity import check, mend
from ochredb.integrity.evidence import Evidence
from ochredb.integrity.mend import flipped_bit, mended_object
from ochredb.integrity.mend_catalog import mend_catalog
from ochredb.parts import deleted, writer
from ochredb.parts.manifest import ObjectInfo
from ochredb.types import Op
from ochredb_compactor import scheduler
from ochredb_node import cli
from ochredb_node.node import Node

from .kernel import all_rows, append, make_collection, operations, running_node, sql
from .poisoned import append_bytes

ROWS, DIMENSION = 600, 256
Change = Callable[[bytearray], None]


def _go_on() -> None:
    pass


def _add(node: Node, collection: str, first: int, count: int) -> None:
    numbers = range(first, first + count)
    vectors = [[float(n * (axis + 3) % 97) for axis in range(DIMENSION)] for n in numbers]
    append(node, collection, operations(
        Op.ADD, [f"id-{n}" for n in numbers], vectors,
        documents=[f"document {n} " + "x" * 1_000 for n in numbers],
        metadatas=[{"number": n} for n in numbers],
    ))  # fmt: skip


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A part of several blocks with a graph and deleted rows, and a tail; nobody has it open."""
    monkeypatch.setattr(scheduler, "GRAPH_ROWS_MIN", 20)
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 80)
    monkeypatch.setattr(writer, "PACKED_BYTES_MAX", 0)
    monkeypatch.setattr(deleted, "INLINE_BYTES_MAX", 0)
    monkeypatch.setattr(mend, "BYTES_MAX", 80_000)  # A whole block takes half a minute.
    path = str(tmp_path / "store")
    with running_node(path, inline_bytes_max=3_000, grace_s=0.0) as node:
        collection = make_collection(node)
        _add(node, collection, 0, ROWS)
        node.compactor.compact_now(collection)
        append(node, collection, operations(Op.DELETE, ["id-3", "id-590"]))
        node.compactor.fold_now(collection)
        _add(node, collection, 700, 3)  # In an object of its own.
        append(node, collection, operations(Op.UPDATE, ["id-5", "id-6"], documents=["a", "b"]))
        node.versions.release_replaced(node.clock.now_us() + 1, 100)
        node.compactor.collect_now(sweep_orphans=False)
    return path


def _rows(path: str) -> list[dict[str, Any]]:
    with running_node(path) as node:
        info = node.namespace.get_collection("default_tenant", "default_database", "records")
        return all_rows(node, info.id)


def _object(path: str, ending: str) -> str:
    root = Path(path, "objects")
    (found,) = (item for item in root.rglob("*") if item.is_file() and ending in str(item))
    return str(found)


def _change(file: str, change: Change) -> None:
    content = bytearray(Path(file).read_bytes())
    change(content)
    Path(file + ".new").write_bytes(content)
    os.rename(file + ".new", file)


def _flip(place: int) -> Change:
    def change(content: bytearray) -> None:
        content[place] ^= 4

    return change


def _overwrite(place: int) -> Change:
    def change(content: bytearray) -> None:
        content[place : place + 100] = b"\xff" * 100

    return change


def _repair(path: str, *options: str) -> int:
    return cli.main(["repair", path, *options])


@pytest.mark.parametrize("size", [1, 40, 4_097, 9_000])
def test_one_flipped_bit_is_found(size: int) -> None:
    rng = random.Random(size)
    data = rng.randbytes(size)
    for place in {0, size // 2, size - 1}:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        assert flipped_bit(bytes(damaged), xxh3(data), _go_on) == data
    assert flipped_bit(bytes(size), xxh3(data), _go_on) != bytes(size)


def test_objects_are_mended_in_data_and_table() -> None:
    data = random.Random(1).randbytes(3_000)
    table = block_checksums(data).tobytes()
    content = data + table
    info = ObjectInfo("parts/x/records", len(content), xxh3(table))
    for place in (0, 2_999, 3_000, 3_007):
        damaged = bytearray(content)
        damaged[place] ^= 8
        assert mended_object(bytes(damaged), info, _go_on) == content
    assert mended_object(content + b"more", info, _go_on) == content
    assert mended_object(content[:3_000] + bytes(8), info, _go_on) == content
    assert mended_object(content[:-1], info, _go_on) is None
    assert mended_object(bytes(len(content)), info, _go_on) is None


def test_a_whole_store_is_left_alone(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {str(item) for item in Path(store, "objects").rglob("*")}
    assert _repair(store) == 0
    assert capsys.readouterr().out == f"{store}: undamaged\n"
    assert {str(item) for item in Path(store, "objects").rglob("*")} == before


@pytest.mark.parametrize("ending", ["/index", "/graph", "/deleted/", "/fragments/", "/store_id"])
def test_what_is_derived_or_one_bit_is_mended_without_loss(store: str, ending: str) -> None:
    right = _rows(store)
    file = _object(store, ending)
    _change(file, _flip(os.path.getsize(file) // 2))
    assert check(store).is_damaged
    assert _repair(store) == 0
    assert not check(store).is_damaged
    assert _rows(store) == right


def test_a_missing_graph_and_a_longer_file_are_mended(store: str) -> None:
    right = _rows(store)
    os.unlink(_object(store, "/graph"))
    _change(_object(store, "/records"), lambda content: content.extend(b"more"))
    _change(_object(store, "/vectors"), _flip(-3))  # In its table of checksums.
    assert _repair(store) == 0
    assert not check(store).is_damaged
    assert _rows(store) == right


def test_lost_vectors_are_named_and_given_up_only_when_asked(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    right = _rows(store)
    file = _object(store, "/vectors")
    block = 256 << 10
    _change(file, _overwrite(block + 5_000))
    first, last = block // (4 * DIMENSION), (2 * block - 1) // (4 * DIMENSION)
    lost = {f"id-{row}" for row in range(first, last + 1)}
    assert _repair(store, "--json") == 1
    (told,) = orjson.loads(capsys.readouterr().out)["repaired"]
    assert told["outcome"] == "left"
    assert {item["id"] for item in told["lost"]} == lost
    assert [item["offset"] for item in told["lost"]] == [row + 1 for row in range(first, last + 1)]
    assert os.path.exists(file)
    assert _repair(store, "--accept-loss") == 1
    out = capsys.readouterr().out
    assert f"{len(lost)} of 598 records cannot be read" in out
    assert f"id id-{first}, offset {first + 1}" in out
    assert not check(store).is_damaged
    assert _rows(store) == [row for row in right if row["id"] not in lost]
    (folder,) = Path(store, "damaged").iterdir()
    kept = {item.name for item in folder.rglob("*") if item.is_file()}
    assert kept >= {"vectors", "records", "report.json"}
    report = orjson.loads((folder / "report.json").read_bytes())
    assert {item["id"] for item in report["repaired"][0]["lost"]} == lost


def test_a_repair_that_is_cut_off_has_said_what_it_gave_up(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _change(_object(store, "/vectors"), _overwrite((256 << 10) + 5_000))

    class CutOff(BaseException):
        pass

    def cut_off(point: str) -> None:
        if point == "version.committed":
            raise CutOff

    crash_points.observe(cut_off)
    with pytest.raises(CutOff):
        _repair(store, "--accept-loss")
    crash_points.observe(None)
    capsys.readouterr()
    assert _repair(store) == 0
    (folder,) = Path(store, "damaged").iterdir()
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"damaged/{folder.name}: of a repair that was cut off")
    assert told[1:] == [f"{store}: undamaged"]
    loss = orjson.loads((folder / "loss-1.json").read_bytes())
    assert loss["outcome"] == "giving up"
    assert 598 - len(_rows(store)[:-3]) == len(loss["lost"]) > 0


@pytest.mark.parametrize("has_links", [True, False])
def test_what_is_kept_is_durable_before_anything_is_changed(
    store: str, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """By a second name; or by a copy, which has to be synced, where there are no hard links."""
    name = os.path.relpath(_object(store, "/records"), store)
    content = Path(store, name).read_bytes()
    if not has_links:

        def no_links(source: str, target: str) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)

        monkeypatch.setattr(os, "link", no_links)
    points: list[str] = []
    crash_points.observe(points.append)
    evidence = Evidence(store, "of-a-test")
    evidence.keep_file(name)
    crash_points.observe(None)
    written = [] if has_links else ["evidence.written", "evidence.synced"]
    assert points == [*written, "evidence.named", "evidence.kept"]
    kept = Path(evidence.path, name)
    assert kept.read_bytes() == content
    assert [item.name for item in kept.parent.iterdir()] == [kept.name]
    assert os.path.samefile(kept, Path(store, name)) == has_links


def test_lost_documents_take_only_their_records(store: str) -> None:
    right = _rows(store)
    file = _object(store, "/records")
    content = Path(file).read_bytes()
    _change(file, _overwrite(content.index(b"document 300 ")))
    assert _repair(store, "--accept-loss") == 1
    left = _rows(store)
    assert 0 < len(right) - len(left) <= 262
    gone = {row["id"] for row in right} - {row["id"] for row in left}
    assert "id-300" in gone
    assert left == [row for row in right if row["id"] not in gone]
    assert not check(store).is_damaged


def test_lost_requests_of_the_log(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    right = _rows(store)
    _change(_object(store, "/fragments/"), _overwrite(1_000))
    assert _repair(store) == 1
    assert "--accept-loss" in capsys.readouterr().out
    assert _repair(store, "--accept-loss", "--json") == 1
    (told,) = orjson.loads(capsys.readouterr().out)["repaired"]
    assert [item["offset"] for item in told["lost"]] == [603, 604, 605]
    assert not check(store).is_damaged
    assert _rows(store) == [row for row in right if row["id"] not in ("id-700", "id-701", "id-702")]
    with running_node(store) as node:
        info = node.namespace.get_collection("default_tenant", "default_database", "records")
        node.compactor.compact_now(info.id)
        _add(node, info.id, 700, 1)
        node.compactor.compact_now(info.id)
    assert len(_rows(store)) == len(right) - 2


def test_lost_deleted_rows_are_left(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.unlink(_object(store, "/deleted/"))
    assert _repair(store, "--accept-loss") == 1
    assert "which 2 records were deleted is not known" in capsys.readouterr().out


def test_a_damaged_catalog_is_left(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = os.path.join(store, "ochredb.sqlite3")
    _change(file, lambda content: content.__setitem__(slice(0, 16), bytes(16)))
    before = Path(file).read_bytes()
    assert _repair(store, "--accept-loss") == 1
    assert "Restore a backup" in capsys.readouterr().err
    assert Path(file).read_bytes() == before


def test_nobody_opens_a_catalog_while_it_is_mended(store: str) -> None:
    """Who mended it at once and went on would lose what was written since."""
    right = _rows(store)
    file = os.path.join(store, "ochredb.sqlite3")
    _change(file, _flip(os.path.getsize(file) // 2))
    tried: list[str] = []

    def open_it(point: str) -> None:
        if point.startswith("mended-catalog."):
            with (
                open(os.path.join(store, "open.lock"), "rb") as lock,
                pytest.raises(BlockingIOError),
            ):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            tried.append(point)

    crash_points.observe(open_it)
    status = _repair(store)
    crash_points.observe(None)
    assert len(tried) == 3
    assert status == 0
    assert not check(store).is_damaged
    assert _rows(store) == right


def test_a_catalog_that_somebody_has_open_is_not_mended(store: str) -> None:
    file = os.path.join(store, "ochredb.sqlite3")
    with running_node(store):
        _change(file, _flip(os.path.getsize(file) // 2))
        damaged = Path(file).read_bytes()
        evidence = Evidence(store, "of-a-test")
        assert mend_catalog(store, evidence, _go_on) is None
        assert Path(file).read_bytes() == damaged


def test_whole_rows_are_those_whose_blocks_pass(store: str) -> None:
    """Vectors of a row that lies in two blocks need both."""
    file = _object(store, "/vectors")
    _change(file, _overwrite(2 * (256 << 10) - 50))
    assert _repair(store, "--accept-loss") == 1
    ids = [row["id"] for row in _rows(store)]
    assert ids[:255] == [f"id-{n}" for n in range(256) if n != 3]
    assert np.array_equal(ids[255:-3], [f"id-{n}" for n in range(768, ROWS)] or ids[255:-3])


@pytest.mark.parametrize("in_object", [False, True])
@pytest.mark.parametrize("options", [(), ("--accept-loss",)])
def test_damaged_bytes_in_quarantine_are_left_and_told(
    store: str, in_object: bool, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with running_node(store, inline_bytes_max=3_000, grace_s=0.0) as node:
        collection = make_collection(node, "poisoned")
        append_bytes(node, collection, b"no fragment" * (10_000 if in_object else 1), 2)
        node.compactor.compact_now(collection)
        key = node.quarantine.table.get(collection, 1).object_key
    right = _rows(store)
    assert _repair(store) == 0
    if in_object:
        assert key is not None
        _change(os.path.join(store, "objects", key), _flip(3))
    else:
        assert key is None
        with running_node(store) as node, node.database.write() as session:
            session.run(sql("UPDATE quarantine SET payload = CAST('other bytes' AS BLOB)"))
    (finding,) = check(store).findings
    capsys.readouterr()
    assert _repair(store, *options) == 1
    out = capsys.readouterr().out
    where = f"left: {key or 'catalog'}: quarantined operations 1 to 2: "
    assert out.startswith(where) and "undamaged" not in out and "--accept-loss" not in out
    assert f"ochredb quarantine drop PATH {collection} 1" in out
    assert check(store).findings == (finding,), "nothing was done"
    assert _repair(store, *options, "--json") == 1
    document = orjson.loads(capsys.readouterr().out)
    assert [item["outcome"] for item in document["repaired"]] == ["left"]
    assert cli.main(["quarantine", "drop", store, collection, "1"]) == 0
    assert not check(store).is_damaged
    assert _repair(store) == 0
    assert _rows(store) == right


def test_what_nothing_mends_is_left_and_told(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The requests in it are whole; what follows them belongs to nobody."""
    file = _object(store, "/fragments/")
    _change(file, lambda content: content.extend(b"more"))
    (finding,) = check(store).findings
    assert _repair(store) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"left: {finding.place}: is longer than its ")
    assert "nothing was done about it" in out
