"""Operations that cannot be folded are skipped by readers and compactor alike, and are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochredb.cancel import Cancel
from ochredb.errors import Corrupt, NewerFormat
from ochredb.fragment import decode, encode, encode_batch
from ochredb.parts.arrays import read_directory
from ochredb.parts.manifest import Manifest
from ochredb.parts.metadata import MetadataIndex
from ochredb.peers import GetRequest, QueryRequest
from ochredb.poison import Poison, admitted
from ochredb.types import Field, Op
from ochredb.where import Compare
from ochredb_node.node import Node, NodeConfig

from .kernel import (
    ManualClock,
    all_rows,
    append,
    forget_recent,
    ids_of,
    make_collection,
    object_keys,
    operations,
    running_node,
    sql,
)
from .poisoned import adds, append_bytes, bad_offsets, batch, not_utf8, stream, vectors

GOOD = b'{"n":1}'
DEEP = b'{"a":' * 300 + b"1" + b"}" * 300


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node() as node:
        yield node


def _ids(*names: Any) -> pa.Array:
    return pa.array(list(names), pa.string())


_TWO = vectors([[1.0, 2.0], [3.0, 4.0]], 2)
# Bytes of two operations, and what is wrong with which of them; None: with the whole request.
CASES: dict[str, tuple[bytes, list[int] | None, str]] = {
    "no JSON": (adds(["a", "b"], [b"{", GOOD]), [0], "unexpected end"),
    "no object": (adds(["a", "b"], [GOOD, b"[1]"]), [1], "not a JSON object"),
    "two objects": (adds(["a", "b"], [b'{"a":1},{"b":2}', GOOD]), [0], ""),
    "objects that complete one another": (adds(["a", "b"], [b'{"a":[1', b"2]},{}"]), [0, 1], ""),
    "empty metadata": (adds(["a", "b"], [b"", GOOD]), [0], ""),
    "metadata that is not UTF-8": (adds(["a", "b"], [b'{"a":"\xff"}', GOOD]), [0], "utf-8"),
    "nested too deeply": (adds(["a", "b"], [GOOD, DEEP]), [1], "written again"),
    "an id that is missing": (adds([None, "b"], [GOOD, GOOD]), [0], "an id is missing"),
    "an id that is not UTF-8": (
        adds(["a", "b"], [GOOD, GOOD], id=not_utf8([b"a\xff", b"b"])), [0], "UTF8",
    ),
    "a document that is not UTF-8": (
        adds(["a", "b"], [GOOD, GOOD], document=not_utf8([b"a", b"\xc3"])), [1], "UTF8",
    ),
    "a uri that is not UTF-8": (
        adds(["a", "b"], [GOOD, GOOD], uri=not_utf8([None, b"\xed\xa0\x80"])), [1], "UTF8",
    ),
    "an add without an embedding": (
        adds(["a", "b"], [GOOD, GOOD], embedding=vectors([None, [1.0, 2.0]], 2)), [0],
        "embedding is missing",
    ),
    "not a number": (
        adds(["a", "b"], [GOOD, GOOD], embedding=vectors([[1.0, 2.0], [np.nan, 1.0]], 2)), [1],
        "not finite",
    ),
    "a component that is missing": (
        adds(["a", "b"], [GOOD, GOOD], embedding=vectors([[1.0, None], [1.0, 2.0]], 2)),
        [0], "not finite",
    ),
    "another dimension": (
        adds(["a", "b"], [GOOD, GOOD], embedding=vectors([[1.0] * 3] * 2, 3)), [0, 1],
        "dimension 3, its collection 2",
    ),
    "no embeddings at all": (
        encode_batch(Op.UPSERT, batch(id=_ids("a", "b"))), [0, 1], "embedding is missing",
    ),
    "an update to another dimension": (
        encode_batch(Op.UPDATE, batch(id=_ids("x", "y"), embedding=vectors([None, [1.0]], 1))), [1],
        "dimension 1",
    ),
    "offsets outside of the buffer": (
        adds(["a", "b"], [GOOD, GOOD], document=bad_offsets()), None, "not a fragment",
    ),
    "a column of another type": (
        encode_batch(Op.DELETE, batch(id=pa.array([1, 2]))), None, "column id is of type int64",
    ),
    "double precision": (
        encode_batch(
            Op.ADD,
            batch(id=_ids("a", "b"), embedding=pa.array([[1.0]] * 2, pa.list_(pa.float64(), 1))),
        ), None, "column embedding",
    ),
    "no ids": (encode_batch(Op.ADD, batch(embedding=_TWO)), None, "no column id"),
    "no dimension": (
        encode_batch(Op.ADD, batch(id=_ids("a", "b"), embedding=vectors([[], []], 0))), None,
        "column embedding",
    ),
    "too few": (adds(["a"], [GOOD]), None, "1 operations have 2 offsets"),
    "none": (encode_batch(Op.DELETE, batch(id=_ids())), None, "0 operations have 2 offsets"),
    "no Arrow": (b"no such thing", None, "not a fragment"),
    "no bytes": (b"", None, "not a fragment"),
    "cut short": (adds(["a", "b"], [GOOD, GOOD])[:-40], None, "not a fragment"),
    "an unknown kind": (
        stream({"ochredb.fragment": "1", "op": "9"}, batch(id=_ids("a", "b"))),
        None, "9 is not a valid Op",
    ),
}  # fmt: skip


def _answers(node: Node, collection: str) -> dict[str, Any]:
    """What reads of every kind say."""
    forget_recent(node)

    def matching(key: str) -> list[str]:
        request = GetRequest(where=Compare(key, "$gte", 0), fields=Field.NONE)
        return node.query.get(collection, request, cancel=Cancel()).ids

    request = QueryRequest(embeddings=np.ones((1, 2), np.float32), n_results=9)
    nearest = node.query.query(collection, request, cancel=Cancel())
    return {
        "rows": all_rows(node, collection),
        "count": node.query.count(collection, cancel=Cancel()),
        "n": matching("n"),
        "nearest": nearest.records[0].ids,
        "distances": nearest.distances[0].tolist(),
    }


@pytest.mark.parametrize("in_object", [False, True], ids=["inline", "object"])
@pytest.mark.parametrize("name", CASES)
def test_the_rest_goes_on_and_answers_stay_the_same(
    node: Node, name: str, in_object: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """I5, I9: before the compaction has recorded anything a read gives the same as after."""
    data, bad, reason = CASES[name]
    collection = make_collection(node)
    append(node, collection, operations(Op.ADD, ["x", "y"], [[5.0, 5.0], [6.0, 6.0]]))
    first = append_bytes(node, collection, data, 2, in_object=in_object)
    append(node, collection, operations(Op.UPDATE, ["x", "b"], metadatas=[{"n": 2}, {"n": 3}]))
    append(node, collection, operations(Op.ADD, ["z"], [[7.0, 7.0]]))
    before = _answers(node, collection)
    assert "cannot be folded and are skipped" in caplog.text
    if bad is not None and name != "an update to another dimension":
        kept = [other for i, other in enumerate(["a", "b"]) if i not in bad]
        assert before["nearest"] == [*kept[::-1], "x", "y", "z"] or kept == []
        assert [row["id"] for row in before["rows"]] == ["x", "y", *kept, "z"]
    else:
        assert [row["id"] for row in before["rows"]] == ["x", "y", "z"]
    assert node.query.indexing_status(collection, cancel=Cancel()).num_quarantined_ops == 0
    node.compactor.compact_now(collection)
    assert _answers(node, collection) == before
    rows = node.quarantine.table.list()
    skipped = [first, first + 1] if bad is None else [first + i for i in bad]
    assert [o for row in rows for o in range(row.start, row.stop + 1)] == skipped
    assert reason.lower() in rows[0].reason.lower()
    assert node.query.indexing_status(collection, cancel=Cancel()).num_quarantined_ops == len(
        skipped
    )
    assert node.query.indexing_status(collection, cancel=Cancel()).progress == 1.0
    if bad is None:
        assert rows[0].payload == data
    else:
        assert rows[0].payload is not None
        found: list[Poison] = []
        admitted(rows[0].start, rows[0].stop, rows[0].payload, 2, found.append)
        assert [item.reason for item in found] == [rows[0].reason]
    append(node, collection, operations(Op.UPSERT, ["a", "b"], [[1.0, 1.0], [2.0, 2.0]]))
    node.compactor.compact_now(collection)
    assert set(ids_of(node, collection)) == {"a", "b", "x", "y", "z"}
    assert node.quarantine.table.list() == rows


def test_a_merge_leaves_out_what_was_skipped(node: Node) -> None:
    collection = make_collection(node)
    for number in range(6):
        append(node, collection, operations(Op.ADD, [f"r{number}"], [[1.0, 2.0]]))
        append_bytes(node, collection, adds([f"{number}", "bad"], [GOOD, b"{"]), 2)
        node.compactor.compact_now(collection)
    version = node.logs.snapshot(collection).version
    assert len(node.versions.parts(collection, version)) < 6
    assert ids_of(node, collection) == [name for i in range(6) for name in (f"r{i}", f"{i}")]
    places = [(row.start, row.stop) for row in node.quarantine.table.list()]
    assert places == [(3 * i, 3 * i) for i in range(1, 7)]


def test_many_bytes_become_an_object_that_lives_until_it_is_dropped(tmp_path: Path) -> None:
    clock = ManualClock()
    data = b"\xff" * 100_000
    with running_node(str(tmp_path / "s"), clock=clock) as node:
        collection = make_collection(node)
        append(node, collection, operations(Op.ADD, ["x"], [[1.0]]))
        start = append_bytes(node, collection, data, 3, in_object=True)
        node.compactor.compact_now(collection)
        row = node.quarantine.table.get(collection, start)
        assert row.object_key is not None
        assert row.payload is None
        for _ in range(2):
            clock.advance(3_600)
            node.compactor.collect_now(sweep_orphans=True)
        assert node.store.get(row.object_key) == data
        node.quarantine.table.drop(collection, start)
        clock.advance(3_600)
        node.compactor.collect_now(sweep_orphans=True)
        assert row.object_key not in object_keys(node)
        assert ids_of(node, collection) == ["x"]


def test_a_compaction_that_takes_a_part_of_the_log_ends_with_a_whole_fragment(
    tmp_path: Path,
) -> None:
    """Runs of one fragment are not torn apart: the log begins with a whole one (I2)."""
    from ochredb_compactor.config import CompactorConfig

    config = NodeConfig(path=str(tmp_path / "s"), compactor=CompactorConfig(fold_rows_max=1))
    node = Node(config)
    node.start(background=False)
    collection = make_collection(node)
    append(node, collection, operations(Op.ADD, ["x"], [[1.0, 1.0]]))
    append_bytes(node, collection, adds(["a", "b", "c", "d"], [GOOD, b"{", GOOD, b"["]), 4)
    append_bytes(node, collection, adds(["e", "f"], [b"{", GOOD]), 2)
    before = _answers(node, collection)
    node.compactor.fold_now(collection)
    assert node.logs.snapshot(collection).indexed_offset == 7
    assert _answers(node, collection) == before
    assert [row["id"] for row in before["rows"]] == ["x", "a", "c", "f"]
    assert [(row.start, row.stop) for row in node.quarantine.table.list()] == [
        (3, 3),
        (5, 5),
        (6, 6),
    ]
    node.close()


def test_a_fragment_of_a_newer_release_is_no_poison(node: Node) -> None:
    """It is refused until that release runs; nothing is recorded, nothing is lost."""
    collection = make_collection(node)
    append(node, collection, operations(Op.ADD, ["x"], [[1.0, 1.0]]))
    data = adds(["a"], [GOOD])
    newer = stream({"ochredb.fragment": "2", "op": "1"}, pa.ipc.open_stream(data).read_next_batch())
    append_bytes(node, collection, newer, 1)
    for _ in range(2):
        with pytest.raises(NewerFormat, match="format version 2; this OchreDB reads up to 1"):
            ids_of(node, collection)
        with pytest.raises(NewerFormat):
            node.compactor.compact_now(collection)
    assert node.quarantine.table.list() == []
    assert node.logs.snapshot(collection).indexed_offset == 0


def test_wrong_checksums_and_exhausted_memory_are_no_poison(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = make_collection(node)
    append(node, collection, operations(Op.ADD, ["x"], [[1.0, 1.0]]))
    append_bytes(node, collection, adds(["a"], [b"{"]), 1)

    def no_memory(*_: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 9")

    monkeypatch.setattr(orjson, "loads", no_memory)
    forget_recent(node)
    for _ in range(2):
        with pytest.raises(MemoryError):
            ids_of(node, collection)
        with pytest.raises(MemoryError):
            node.compactor.compact_now(collection)
    monkeypatch.undo()
    assert node.quarantine.table.list() == []
    with node.database.write() as session:
        session.run(sql("UPDATE fragments SET checksum = 0"))
    for _ in range(2):
        with pytest.raises(Corrupt, match="fails its checksum"):
            node.compactor.compact_now(collection)
    assert node.quarantine.table.list() == []


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_whatever_the_bytes_are_every_offset_is_kept(data: st.DataObject) -> None:
    """Flipped, cut and spliced fragments: each operation is admitted or poison, and stays so."""
    whole = bytearray(adds(["a", "b", "c"], [GOOD, None, b'{"k":[1,2]}']))
    for _ in range(data.draw(st.integers(0, 3))):
        where = data.draw(st.integers(0, len(whole) - 1))
        whole[where] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(whole)))
    damaged = bytes(whole[:cut])
    found: list[Poison] = []
    try:
        runs = admitted(5, 7, damaged, 2, found.append)
    except NewerFormat:
        return
    ends = [first + len(run) for first, run in runs]
    assert [first for first, _ in runs] == [5, *ends[:-1]]
    assert sum(len(operations) for _, operations in runs) == 3
    skipped = [o for item in found for o in range(item.start, item.stop + 1)]
    noops = [first + i for first, run in runs if run.op is Op.NOOP for i in range(len(run))]
    assert set(skipped) <= set(noops)
    again: list[Poison] = []
    admitted(5, 7, damaged, 2, again.append)
    assert again == found
    for _, run in runs:
        if run.op is not Op.NOOP:
            assert decode(encode(run)).ids == run.ids


def test_no_memory_is_no_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """orjson tells it as a wrong document: the operation would have been skipped for ever."""

    class NoMemory:
        JSONDecodeError = orjson.JSONDecodeError

        @staticmethod
        def loads(_text: bytes) -> None:
            text = "Not enough memory to allocate buffer for parsing"
            raise orjson.JSONDecodeError(text, "", 0)

    one = operations(Op.ADD, ["a"], [[1.0]], metadatas=[{"k": 1}])
    data = encode(one)
    monkeypatch.setattr("ochredb.json_text.orjson", NoMemory)
    with pytest.raises(MemoryError):
        decode(data)
    with pytest.raises(MemoryError):
        Manifest.from_json("{}")
    with pytest.raises(MemoryError):
        read_directory(lambda _name: memoryview(b"{}"), "metadata", 1)


def test_an_index_that_cannot_be_built_makes_nothing_poison(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a bug of this release: the log keeps everything until a release without it folds it."""
    collection = make_collection(node)
    append(node, collection, operations(Op.ADD, ["x"], [[1.0, 1.0]], metadatas=[{"n": 1}]))
    before = _answers(node, collection)

    def failing(_metadatas: object) -> MetadataIndex:
        raise TypeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(MetadataIndex, "build", failing)
        for _ in range(2):
            with pytest.raises(TypeError, match="a bug"):
                node.compactor.compact_now(collection)
        assert [row["id"] for row in all_rows(node, collection)] == ["x"]
    snapshot = node.logs.snapshot(collection)
    assert (snapshot.indexed_offset, snapshot.floor_offset) == (0, 0)
    assert node.quarantine.table.list() == []
    node.compactor.compact_now(collection)
    assert _answers(node, collection) == before
