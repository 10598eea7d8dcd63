"""Vacuum: what is due some time is done now; what may be needed is waited for, never taken."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from ochredb.catalog.quarantine import Quarantined, record
from ochredb.errors import AlreadyExists, InvalidArgument, NotFound
from ochredb.types import Op
from ochredb.vacuum import VacuumReport, VacuumState, vacuum
from ochredb_compactor.vacuum import Surroundings, Vacuum
from ochredb_frontend.messages import Request
from ochredb_node.node import Node

from .kernel import (
    ManualClock,
    add_rows,
    all_rows,
    append,
    ids_of,
    make_collection,
    object_keys,
    operations,
    running_node,
)


@pytest.fixture
def node(clock: ManualClock, tmp_path: Path) -> Iterator[Node]:
    with running_node(str(tmp_path / "store"), clock=clock, inline_bytes_max=600) as node:
        yield node


def _around(node: Node) -> Surroundings:
    around: Surroundings = node.vacuums._around
    return around


def _vacuum(node: Node, *, purge: bool = False, phases: list[str] | None = None) -> VacuumReport:
    def progress(phase: str, done: float, total: float) -> None:
        assert 0 <= done <= total
        if phases is not None and phase not in phases[-1:]:
            phases.append(phase)

    return Vacuum(_around(node), purge=purge, progress=progress, step=lambda: None).run()


def _live_keys(node: Node) -> set[str]:
    """The objects of the newest versions."""
    keys = set()
    for collection in node.namespace.all_ids():
        version = node.logs.snapshot(collection).version
        for part in node.versions.parts(collection, version):
            keys |= {item.key for item in part.manifest.objects}
            keys |= set() if part.deleted_key is None else {part.deleted_key}
    return keys


def test_afterwards_there_is_what_lives_and_nothing_else(node: Node) -> None:
    collection, other = make_collection(node), make_collection(node, "other")
    for first in range(0, 600, 50):
        add_rows(node, collection, first, 50)
        append(node, collection, operations(Op.DELETE, [f"id-{first + 7}", f"id-{first + 9}"]))
        if first % 100 == 0:
            node.compactor.fold_now(collection)
    add_rows(node, other, 0, 300)
    node.namespace.delete_collection("default_tenant", "default_database", "other")
    node.store.create("parts/orphan/packed", b"of a crash")
    os.utime(str(node.store.path("parts/orphan/packed")), (0, 0))
    expected = all_rows(node, collection)
    database = os.path.join(str(node.config.path), "ochredb.sqlite3")
    phases: list[str] = []
    report = _vacuum(node, phases=phases)
    assert phases == ["compacting", "waiting", "deleting", "catalog"]
    assert report.is_complete and not report.problems and not report.kept
    assert report.collections == 1 and report.parts_rewritten >= 1
    assert report.objects_deleted > 3
    assert report.bytes_after < report.bytes_before
    assert object_keys(node) == _live_keys(node)
    assert os.stat(database + "-wal").st_size == 0
    assert all_rows(node, collection) == expected
    (part,) = node.versions.parts(collection, node.logs.snapshot(collection).version)
    assert part.deleted_count == 0, "4 % dead, folded and merged"


def test_nothing_is_deleted_within_the_grace(node: Node, clock: ManualClock) -> None:
    """A read that planned on the version before finds its objects for half a minute (I6)."""
    collection = make_collection(node)
    for first in (0, 100, 200, 300):
        add_rows(node, collection, first, 100)
        node.compactor.fold_now(collection)
    before = _live_keys(node)
    replaced_s: list[float] = []
    sleep = clock.sleep

    def watch(seconds: float) -> None:
        replaced_s.append(clock.monotonic_s())
        assert before <= object_keys(node), f"after {replaced_s[-1] - replaced_s[0]} s"
        sleep(seconds)

    clock.sleep = watch  # type: ignore[method-assign]
    report = _vacuum(node)
    clock.sleep = sleep  # type: ignore[method-assign]
    assert report.objects_deleted == 4 + 4, "replaced parts and folded fragments"
    assert replaced_s[-1] - replaced_s[0] >= 59.8
    assert not before & object_keys(node)


def test_with_nothing_to_give_back_it_does_not_wait(node: Node, clock: ManualClock) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 100)
    _vacuum(node)
    for purge in (False, True):
        before, keys = clock.monotonic_s(), object_keys(node)
        report = _vacuum(node, purge=purge)
        assert (report.objects_deleted, report.parts_rewritten) == (0, 0)
        assert clock.monotonic_s() == before
        assert object_keys(node) == keys


def test_a_few_dead_rows_are_left_alone_unless_they_are_to_be_erased(node: Node) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 400)
    node.compactor.compact_now(collection)
    append(node, collection, operations(Op.DELETE, [f"id-{number}" for number in range(12)]))
    assert _vacuum(node).parts_rewritten == 0
    (part,) = node.versions.parts(collection, node.logs.snapshot(collection).version)
    assert part.deleted_count == 12, "3 %"
    assert _vacuum(node, purge=True).parts_rewritten == 1
    (part,) = node.versions.parts(collection, node.logs.snapshot(collection).version)
    assert (part.deleted_count, part.manifest.rows) == (0, 388)
    append(node, collection, operations(Op.DELETE, [f"id-{number}" for number in range(12, 42)]))
    assert _vacuum(node).parts_rewritten == 1, "7 %"
    assert len(ids_of(node, collection)) == 358


def test_a_backup_keeps_what_it_reads_and_the_report_says_so(node: Node) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 200)
    node.compactor.compact_now(collection)
    begun = node.backups.begin("host/1")
    kept = _live_keys(node)
    append(node, collection, operations(Op.DELETE, ["id-3"]))
    node.backups._ttl_s = 3_600.0
    node.backups.renew(begun.id)
    report = _vacuum(node, purge=True)
    assert not report.is_complete and not report.problems
    (text,) = report.kept
    assert begun.id in text and "host/1" in text and "keeps 1 objects" in text
    assert kept <= object_keys(node)
    assert node.backups.read_catalog(begun.id, 0, 16) == b"SQLite format 3\0"
    node.backups.end(begun.id)
    report = _vacuum(node, purge=True)
    assert report.is_complete and not kept & object_keys(node)


def test_what_is_in_quarantine_is_told(node: Node) -> None:
    collection = make_collection(node)
    with node.database.write() as session:
        for start, stop in ((1, 1), (4, 6)):
            item = Quarantined(
                collection=collection,
                start=start,
                stop=stop,
                reason="a test",
                payload=b"what it was to write",
                object_key=None,
                checksum=0,
            )
            record(session, [item], 1)
    report = _vacuum(node, purge=True)
    assert not report.is_complete and not report.problems
    (text,) = report.kept
    assert collection in text and "4 operations in quarantine" in text
    for start in (1, 4):
        node.vacuums._around.quarantine.drop(collection, start)
    assert _vacuum(node, purge=True).is_complete


def test_damage_of_one_collection_is_told_and_keeps_no_other(node: Node) -> None:
    broken, whole = make_collection(node, "broken"), make_collection(node, "whole")
    for collection in (broken, whole):
        for first in (0, 300):
            add_rows(node, collection, first, 300)
            node.compactor.fold_now(collection)
        append(node, collection, operations(Op.DELETE, [f"id-{n}" for n in range(0, 600, 3)]))
    (victim,) = [
        part.manifest.objects[0].key
        for part in node.versions.parts(broken, node.logs.snapshot(broken).version)
        if part.manifest.seq_min == 1
    ]
    node.store.delete(victim)
    node.open_parts.__init__(node.store)  # type: ignore[misc]
    report = _vacuum(node, purge=True)
    assert not report.is_complete
    (problem,) = report.problems
    assert broken in problem and victim in problem
    assert all(
        part.deleted_count == 0
        for part in node.versions.parts(whole, node.logs.snapshot(whole).version)
    )
    assert len(ids_of(node, whole)) == 400


def test_metadata_keys_that_no_record_has_are_forgotten_and_come_back_with_a_record(
    node: Node,
) -> None:
    collection = make_collection(node)

    def put(name: str, **metadata: Any) -> None:
        append(
            node,
            collection,
            replace(
                operations(Op.UPSERT, [name], [[1.0, 2.0]], metadatas=[metadata]),
                key_types=frozenset(
                    (key, "string" if isinstance(value, str) else "int")
                    for key, value in metadata.items()
                ),
            ),
        )

    def keys() -> set[str]:
        info = node.namespace.get_collection_by_id(collection)
        return {key for key, _ in info.key_types}

    put("a", kept=1, secret="x")
    put("b", kept=2)
    append(node, collection, operations(Op.DELETE, ["a"]))
    _vacuum(node)
    assert keys() == {"kept", "secret"}
    _vacuum(node, purge=True)
    assert keys() == {"kept"}
    put("c", secret="y")
    assert keys() == {"kept", "secret"}, "this process knew it, and does not any more"


def test_keys_are_kept_if_something_is_written_meanwhile(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 3)
    append(node, collection, operations(Op.DELETE, ["id-0", "id-1", "id-2"]))
    with node.database.write() as session:
        node.logs.keys.insert(session, collection, 0, [("secret", "string")])
    forget = node.logs.keys.forget

    def late(*arguments: Any) -> None:
        add_rows(node, collection, node.logs.snapshot(collection).next_offset, 1)
        forget(*arguments)

    monkeypatch.setattr(node.logs.keys, "forget", late)
    report = _vacuum(node, purge=True)
    assert not report.is_complete
    assert collection in report.problems[0] and "written to" in report.problems[0]


def _ask(node: Node, method: str, path: str, query: str = "") -> tuple[int, Any]:
    request = Request(method=method, path=f"/api/v2/vacuums{path}", query_string=query)
    response = node.frontend.handle(request)
    return response.status, orjson.loads(response.body)


def test_routes(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 50)
    entered, released = threading.Event(), threading.Event()
    fold = node.compactor.compact_now

    def slowly(*arguments: Any) -> None:
        entered.set()
        assert released.wait(30)
        fold(*arguments)

    monkeypatch.setattr(node.compactor, "compact_now", slowly)
    for query in ("purge=yes", "purge=", "purge=True"):
        status, error = _ask(node, "POST", "", query)
        assert status == 400 and "purge" in error["message"]
    assert _ask(node, "GET", "/no-such")[0] == 404
    status, begun = _ask(node, "POST", "", "purge=true")
    assert (status, begun["state"], begun["purge"]) == (201, "running", True)
    assert entered.wait(30)
    assert _ask(node, "POST", "")[0] == 409, "one at a time"
    status, state = _ask(node, "GET", f"/{begun['id']}")
    assert (state["state"], state["phase"], state["total"]) == ("running", "compacting", 1)
    released.set()
    node.vacuums._thread.join(30)  # type: ignore[union-attr]
    status, state = _ask(node, "GET", f"/{begun['id']}")
    assert (status, state["state"], state["error"]) == (200, "done", None)
    assert state["report"]["complete"]
    released.clear()
    entered.clear()
    status, begun = _ask(node, "POST", "")
    assert entered.wait(30)
    assert _ask(node, "DELETE", f"/{begun['id']}")[0] == 200
    released.set()
    node.vacuums._thread.join(30)  # type: ignore[union-attr]
    status, state = _ask(node, "GET", f"/{begun['id']}")
    assert (state["state"], state["report"]) == ("cancelled", None)
    assert len(ids_of(node, collection)) == 50


def test_closing_a_node_ends_its_vacuum(tmp_path: Path) -> None:
    with running_node(str(tmp_path), inline_bytes_max=0) as node:
        collection = make_collection(node)
        add_rows(node, collection, 0, 50)
        begun = node.vacuums.start(purge=False)
        with pytest.raises(AlreadyExists):
            node.vacuums.start(purge=False)
    assert node.vacuums.state(begun.id).state == "cancelled", "it was waiting for a minute"
    with pytest.raises(NotFound):
        node.vacuums.state("another")


def test_a_failure_is_told(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[str]:
        raise RuntimeError("no")

    monkeypatch.setattr(node.namespace, "all_ids", fail)
    begun = node.vacuums.start(purge=False)
    node.vacuums._thread.join(30)  # type: ignore[union-attr]
    state: VacuumState = node.vacuums.state(begun.id)
    assert (state.state, state.error) == ("failed", "RuntimeError: no")


def test_a_directory_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no OchreDB directory"):
        vacuum(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_a_report_survives_json() -> None:
    report = VacuumReport(
        purge=True,
        collections=1,
        parts_rewritten=2,
        objects_deleted=3,
        bytes_before=4,
        bytes_after=5,
        problems=(),
        kept=("a backup",),
    )
    document = orjson.loads(orjson.dumps(report.to_json()))
    assert document["complete"] is False
    assert VacuumReport.from_json(document) == report
