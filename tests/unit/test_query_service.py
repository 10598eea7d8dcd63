"""Reads: strong from every process, right while everything changes, damage told apart (I4, I12)."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ochredb.cancel import Cancel, Cancelled
from ochredb.errors import Corrupt, DeadlineExceeded, Gone, InvalidArgument, NotFound
from ochredb.peers import GetRequest, QueryRequest
from ochredb.types import Field, Op, QueryAnswer, Records
from ochredb.where import Compare
from ochredb_node.node import Node
from ochredb_query.config import QueryConfig

from .kernel import (
    ALL_FIELDS,
    ROOT,
    ManualClock,
    add_rows,
    all_rows,
    append,
    forget_recent,
    ids_of,
    make_collection,
    object_keys,
    operations,
    rows_of,
    running_node,
)


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node(clock=ManualClock()) as node:
        yield node


def _nearest(node: Node, collection: str, vector: list[float], count: int, **more: Any) -> Any:
    request = QueryRequest(
        embeddings=np.array([vector], np.float32), n_results=count, fields=ALL_FIELDS, **more
    )
    return node.query.query(collection, request, cancel=Cancel())


def test_a_second_node_on_the_directory_reads_each_write_at_once(tmp_path: Path) -> None:
    """I4 between two nodes of one process, through appends, folds, merges and deletes."""
    with running_node(str(tmp_path)) as one, running_node(str(tmp_path)) as two:
        collection = make_collection(one)
        for number in range(8):
            writer, reader = (one, two) if number % 2 else (two, one)
            add_rows(writer, collection, 10 * number, 10)
            assert len(ids_of(reader, collection)) == 9 * number + 10
            append(writer, collection, operations(Op.DELETE, [f"id-{10 * number}"]))
            assert len(ids_of(reader, collection)) == 9 * number + 9
            if number % 3 == 0:
                writer.compactor.compact_now(collection)
                assert reader.query.count(collection, cancel=Cancel()) == 9 * number + 9
            assert all_rows(one, collection) == all_rows(two, collection)


_WRITER = """
    import sys
    from ochredb.types import Op
    from tests.unit.kernel import append, ids_of, operations, running_node

    with running_node(sys.argv[1]) as node:
        print("ready", flush=True)
        for line in sys.stdin:
            verb, name = line.split()
            if verb == "add":
                append(node, sys.argv[2], operations(Op.ADD, [name], [[1.0, 2.0]]))
            elif verb == "delete":
                append(node, sys.argv[2], operations(Op.DELETE, [name]))
            elif verb == "compact":
                node.compactor.compact_now(sys.argv[2])
            print(",".join(ids_of(node, sys.argv[2])), flush=True)
"""


def test_another_process_s_writes_are_read_at_once(tmp_path: Path) -> None:
    with running_node(str(tmp_path)) as node:
        collection = make_collection(node)
        other = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_WRITER), str(tmp_path), collection],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert other.stdin is not None
        assert other.stdout is not None

        def ask(command: str) -> list[str]:
            assert other.stdin is not None
            assert other.stdout is not None
            print(command, file=other.stdin, flush=True)
            return other.stdout.readline().strip().split(",")

        with other:
            assert other.stdout.readline() == "ready\n"
            expected: list[str] = []
            for number in range(12):
                if number % 2:
                    append(node, collection, operations(Op.ADD, [f"m{number}"], [[0.0, 1.0]]))
                    expected.append(f"m{number}")
                    assert ask("look nothing") == expected
                else:
                    expected.append(f"t{number}")
                    assert ask(f"add t{number}") == expected
                    assert ids_of(node, collection) == expected
                if number == 5:
                    assert ask("compact now") == expected
                    assert node.logs.snapshot(collection).version > 0
                    assert ids_of(node, collection) == expected
                if number == 8:
                    expected.remove("m3")
                    assert ask("delete m3") == expected
                    assert ids_of(node, collection) == expected
            other.stdin.close()
        assert other.returncode == 0


def test_reads_are_right_while_another_node_writes_and_compacts(tmp_path: Path) -> None:
    """Requests are whole, order is kept, and replanning is silent."""
    with running_node(str(tmp_path), inline_bytes_max=0) as one, running_node(str(tmp_path)) as two:
        collection = make_collection(one)
        stop = threading.Event()
        errors: list[BaseException] = []
        acknowledged = [0]

        def write() -> None:
            try:
                for number in range(40):
                    add_rows(one, collection, 5 * number, 5)
                    acknowledged[0] = 5 * number + 5
                    if number % 4 == 0:
                        one.compactor.compact_now(collection)
            except BaseException as error:
                errors.append(error)
            finally:
                stop.set()

        writer = threading.Thread(target=write)
        writer.start()
        reads = 0
        while not stop.is_set():
            before = acknowledged[0]
            ids = ids_of(two, collection)
            assert len(ids) >= before
            assert len(ids) % 5 == 0
            assert ids == [f"id-{i}" for i in range(len(ids))]
            reads += 1
        writer.join()
        assert errors == []
        assert reads > 0


def test_a_snapshot_that_is_gone_is_planned_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the snapshot and the fragments, a compaction trims the log."""
    collection = make_collection(node)
    add_rows(node, collection, 0, 5)
    forget_recent(node)
    fragments, raced = node.logs.fragments, [False]

    def race(*arguments: Any) -> Any:
        if not raced[0]:
            raced[0] = True
            node.compactor.compact_now(collection)
        return fragments(*arguments)

    monkeypatch.setattr(node.logs, "fragments", race)
    assert ids_of(node, collection) == [f"id-{i}" for i in range(5)]
    assert raced == [True]


def test_a_version_that_is_dropped_while_it_is_opened_is_planned_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 5)
    node.compactor.compact_now(collection)
    parts, raced = node.versions.parts, [False]

    def race(*arguments: Any) -> Any:
        if not raced[0]:
            raced[0] = True
            for number in (5, 10):
                add_rows(node, collection, number, 5)
                node.compactor.compact_now(collection)
        return parts(*arguments)

    monkeypatch.setattr(node.versions, "parts", race)
    assert len(ids_of(node, collection)) == 15
    assert raced == [True]


def test_an_object_collected_before_its_first_use_is_planned_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that held its view longer than the grace period gets the next version's answer."""
    collection = make_collection(node)
    add_rows(node, collection, 0, 5)
    node.compactor.compact_now(collection)
    node.query._loaded.clear()
    view_of, raced = node.query._view, [False]

    def late(*arguments: Any) -> Any:
        found = view_of(*arguments)
        if not raced[0]:
            raced[0] = True
            node.open_parts._parts.clear()  # As if another process compacted.
            append(node, collection, operations(Op.DELETE, [f"id-{i}" for i in range(5)]))
            for number in (5, 10):
                add_rows(node, collection, number, 5)
                node.compactor.compact_now(collection)
            node.compactor._world.clock.sleep(3_600)
            node.compactor.collect_now(sweep_orphans=False)
        return found

    monkeypatch.setattr(node.query, "_view", late)
    before = object_keys(node)
    assert ids_of(node, collection) == [f"id-{i}" for i in range(5, 15)]
    assert not before & object_keys(node)


def test_a_missing_object_of_the_newest_version_is_damage(node: Node) -> None:
    """Not staleness, and not "no such collection" either."""
    collection = make_collection(node)
    add_rows(node, collection, 0, 5)
    node.compactor.compact_now(collection)
    (key,) = object_keys(node)
    node.store.delete(key)
    node.query._loaded.clear()
    for read in (
        lambda: ids_of(node, collection),
        lambda: _nearest(node, collection, [0, 0, 0, 0], 3),
        lambda: node.query.match(collection, GetRequest(ids=["id-1"]), cancel=Cancel()),
    ):
        with pytest.raises(Corrupt, match=key):
            read()


def test_a_hole_in_the_log_is_damage_only_if_a_new_snapshot_has_it_too(node: Node) -> None:
    collection = make_collection(node)
    for number in range(3):
        add_rows(node, collection, number, 1)
    with node.database.write() as session:
        connection = session.connection  # type: ignore[attr-defined]
        connection.execute("DELETE FROM fragments WHERE start = 2")
    forget_recent(node)
    with pytest.raises(Corrupt, match="offset 2"):
        ids_of(node, collection)
    snapshot = node.logs.snapshot(collection)
    loaded = node.query._load(collection, snapshot)
    with pytest.raises(Gone):
        loaded.refresh(snapshot)


def test_a_damaged_inline_fragment_is_not_served(node: Node) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 1)
    with node.database.write() as session:
        connection = session.connection  # type: ignore[attr-defined]
        (payload,) = connection.execute("SELECT payload FROM fragments").fetchone()
        damaged = payload[:-20] + bytes([payload[-20] ^ 1]) + payload[-19:]
        connection.execute("UPDATE fragments SET payload = ?", (damaged,))
    forget_recent(node)
    with pytest.raises(Corrupt, match="checksum"):
        ids_of(node, collection)


class TestQuick:
    """What an event loop may answer by itself: the same answer, and never a first touch."""

    def _quick(self, node: Node, collection: str, request: Any) -> Any:
        read = node.query.quick(collection, request)
        return None if read is None else read.run(Cancel())

    def test_the_same_answer_as_the_long_way(self, node: Node) -> None:
        collection = make_collection(node)
        add_rows(node, collection, 0, 50)
        node.compactor.compact_now(collection)
        add_rows(node, collection, 50, 10)
        vectors = np.array([[1, 2, 3, 4], [50, 0, 0, 9]], np.float32)
        query = QueryRequest(embeddings=vectors, n_results=7, fields=ALL_FIELDS)
        page = GetRequest(limit=5, offset=48, fields=ALL_FIELDS)
        named = GetRequest(ids=["id-3", "id-55", "none", "id-3"], fields=ALL_FIELDS)
        slow_query = node.query.query(collection, query, cancel=Cancel())
        slow_gets = [node.query.get(collection, r, cancel=Cancel()) for r in (page, named)]
        quick_query = self._quick(node, collection, query)
        assert isinstance(quick_query, QueryAnswer)
        for mine, theirs in zip(quick_query.records, slow_query.records, strict=True):
            assert rows_of(mine) == rows_of(theirs)
        for distances, others in zip(quick_query.distances, slow_query.distances, strict=True):
            assert distances.tobytes() == others.tobytes()
        for request, slow in zip((page, named), slow_gets, strict=True):
            quick = self._quick(node, collection, request)
            assert isinstance(quick, Records)
            assert rows_of(quick) == rows_of(slow)
        assert self._quick(node, collection, None) == 60

    def test_a_catalog_on_another_machine_is_not_asked_on_an_event_loop(
        self, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        collection = make_collection(node)
        add_rows(node, collection, 0, 3)
        assert node.query.count(collection, cancel=Cancel()) == 3
        assert node.query.quick(collection, None) is not None
        monkeypatch.setattr(node.sqlite, "is_local", False)
        assert node.query.quick(collection, None) is None

    def test_nothing_that_is_not_loaded_current_and_open(self, node: Node) -> None:
        collection = make_collection(node)
        add_rows(node, collection, 0, 20)
        request = GetRequest(limit=5)
        query = QueryRequest(embeddings=np.zeros((1, 4), np.float32))
        assert self._quick(node, collection, None) is None, "not loaded"
        node.query.count(collection, cancel=Cancel())
        assert self._quick(node, collection, None) == 20
        append(node, collection, operations(Op.DELETE, ["id-1"]))
        assert self._quick(node, collection, None) == 19, "a few writes are caught up with"
        append(node, collection, operations(Op.DELETE, ["id-2"]))
        forget_recent(node)
        assert self._quick(node, collection, None) is None, "an older state"
        node.compactor.compact_now(collection)
        assert node.query.count(collection, cancel=Cancel()) == 18
        assert self._quick(node, collection, None) == 18
        node.query._loaded.clear()
        node.query.count(collection, cancel=Cancel())
        assert self._quick(node, collection, request) is None, "the records were never opened"
        assert self._quick(node, collection, query) is None, "the vectors were never opened"
        node.query.get(collection, request, cancel=Cancel())
        assert len(self._quick(node, collection, request).ids) == 5
        node.query.query(collection, query, cancel=Cancel())
        assert self._quick(node, collection, query) is not None

    def test_long_work_is_refused(self, node: Node) -> None:
        collection = make_collection(node)
        add_rows(node, collection, 0, 10)
        node.query.get(collection, GetRequest(), cancel=Cancel())
        where = Compare("number", "$eq", 3)
        vectors = np.zeros((5, 4), np.float32)
        for request in (
            GetRequest(),
            GetRequest(limit=10_000),
            GetRequest(where=where, limit=3),
            QueryRequest(embeddings=vectors),
            QueryRequest(embeddings=vectors[:1], where=where),
            QueryRequest(embeddings=vectors[:1], n_results=10_000),
        ):
            assert self._quick(node, collection, request) is None


def test_filters_pages_and_order_over_parts_and_tail(node: Node) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 10)
    node.compactor.compact_now(collection)
    append(node, collection, operations(Op.DELETE, ["id-2"]))
    change = operations(Op.UPDATE, ["id-7"], metadatas=[{"number": 3}])
    append(node, collection, change)
    add_rows(node, collection, 2, 1)
    order = [f"id-{i}" for i in (0, 1, 3, 4, 5, 6, 7, 8, 9, 2)]
    assert ids_of(node, collection) == order

    def get(**more: Any) -> list[str]:
        request = GetRequest(fields=Field.NONE, **more)
        return node.query.get(collection, request, cancel=Cancel()).ids

    assert get(limit=3, offset=5) == order[5:8]
    assert get(limit=0) == []
    assert get(offset=9, limit=9) == ["id-2"]
    assert get(offset=99, limit=9) == []
    assert get(where=Compare("number", "$eq", 3)) == ["id-3", "id-7"]
    assert get(ids=["id-2", "id-9", "x", "id-2"]) == ["id-9", "id-2"]
    assert get(ids=["id-3", "id-8"], where=Compare("number", "$ne", 3)) == ["id-8"]
    matched, last = node.query.match(
        collection, GetRequest(where=Compare("number", "$lt", 3), limit=2), cancel=Cancel()
    )
    assert (matched, last) == (["id-0", "id-1"], 13)


def test_a_query_is_never_short_and_breaks_ties_by_age(node: Node) -> None:
    collection = make_collection(node)
    for start in (0, 4, 8):
        names = [f"n{i}" for i in range(start, start + 4)]
        append(node, collection, operations(Op.ADD, names, [[1.0, 0.0]] * 4))
        if start < 8:
            node.compactor.fold_now(collection)
    append(node, collection, operations(Op.UPSERT, ["n0"], [[1.0, 0.0]]))
    answer = _nearest(node, collection, [1.0, 0.0], 50)
    assert answer.records[0].ids == [f"n{i}" for i in range(12)]
    assert _nearest(node, collection, [1.0, 0.0], 5).records[0].ids == [f"n{i}" for i in range(5)]
    assert answer.distances[0].tolist() == [0.0] * 12
    assert _nearest(node, collection, [1.0, 0.0], 0).records[0].ids == []
    nothing = _nearest(node, collection, [float("nan"), 0.0], 2)
    assert nothing.records[0].ids == ["n0", "n1"]
    assert np.isnan(nothing.distances[0]).all()
    with pytest.raises(InvalidArgument, match="dimension of 2, got 3"):
        _nearest(node, collection, [1.0, 0.0, 0.0], 2)


def test_an_empty_collection_answers(node: Node) -> None:
    collection = make_collection(node)
    assert ids_of(node, collection) == []
    assert node.query.count(collection, cancel=Cancel()) == 0
    assert _nearest(node, collection, [1.0], 5).records[0].ids == []
    status = node.query.indexing_status(collection, cancel=Cancel())
    assert (status.total_ops, status.progress) == (0, 1.0)


def test_a_dropped_collection_is_not_found_and_is_forgotten(node: Node) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 3)
    ids_of(node, collection)
    node.namespace.delete_collection("default_tenant", "default_database", "records")
    with pytest.raises(NotFound, match=collection):
        ids_of(node, collection)
    assert collection not in node.query._loaded


def test_a_cancelled_or_late_read_stops(node: Node) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 3)
    gone = Cancel()
    gone.cancel()
    with pytest.raises(Cancelled):
        node.query.get(collection, GetRequest(), cancel=gone)
    clock = ManualClock()
    late = Cancel(1.0, clock)
    clock.advance(2.0)
    with pytest.raises(DeadlineExceeded):
        node.query.get(collection, GetRequest(), cancel=late)


def test_indexing_status_counts_operations_until_parts_are_settled(node: Node) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 10)
    assert node.query.indexing_status(collection, cancel=Cancel()).num_unindexed_ops == 10
    node.compactor.compact_now(collection)
    status = node.query.indexing_status(collection, cancel=Cancel())
    assert (status.num_indexed_ops, status.num_unindexed_ops) == (10, 0)


def test_the_budget_drops_whole_collections_least_recently_used_first(node: Node) -> None:
    collections = [make_collection(node, name) for name in ("one", "two", "three")]
    for collection in collections:
        add_rows(node, collection, 0, 400)
        ids_of(node, collection)
    node.query.quick(collections[0], None)
    each = node.query._loaded[collections[0]].memory_bytes
    node.query._config = QueryConfig(memory_bytes=max(1 << 20, int(2.5 * each)))
    assert each > 400_000
    node.query.trim()
    assert list(node.query._loaded) == [collections[2], collections[0]]
    node.query._config = QueryConfig(memory_bytes=1 << 20)
    add_rows(node, collections[0], 400, 1_000)
    ids_of(node, collections[0])
    node.query.trim()
    assert list(node.query._loaded) == [collections[0]], "the last used one stays, however large"
    node.namespace.delete_collection("default_tenant", "default_database", "one")
    node.query.trim()
    assert list(node.query._loaded) == []
    assert len(ids_of(node, collections[1])) == 400


def test_a_writer_folds_what_it_wrote_for_those_who_read(node: Node) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 500)
    assert node.query.quick(collection, None) is None, "nobody has read it"
    assert node.query.count(collection, cancel=Cancel()) == 500
    assert node.query._loaded[collection].is_read
    add_rows(node, collection, 500, 500)
    view = node.query._loaded[collection].view
    assert view is not None
    assert view.count == 1_000
    for _ in range(2):  # Two seconds later.
        node.query.trim()
    assert not node.query._loaded[collection].is_read
    add_rows(node, collection, 1_000, 500)
    assert node.query._loaded[collection].view is view
    assert node.query.count(collection, cancel=Cancel()) == 1_500
