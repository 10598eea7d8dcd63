"""The filter evaluator against a plain Python evaluation of the same tree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ochredb.cancel import Cancel, Cancelled
from ochredb.errors import DeadlineExceeded, InvalidArgument
from ochredb.parts.columns import BytesColumn, Check
from ochredb.parts.ids import IdIndex
from ochredb.parts.metadata import MetadataIndex
from ochredb.parts.text import TextIndex
from ochredb.plan.filter import evaluate
from ochredb.types import Bools
from ochredb.where import (
    And,
    Compare,
    ComparisonOp,
    DocumentContains,
    DocumentMatches,
    IdIn,
    ListContains,
    OneOf,
    Or,
    Scalar,
    Where,
)
from ochredb.where_parse import DEPTH_MAX


@dataclass(frozen=True)
class Record:
    id: str
    document: str | None
    metadata: dict[str, Any] | None


class MemorySegment:
    """A segment over records; `indexed` gives it a text index."""

    def __init__(self, records: Sequence[Record], *, indexed: bool) -> None:
        self.ids = BytesColumn.from_list([record.id for record in records])
        self.documents = BytesColumn.from_list([record.document for record in records])
        self.metadata = MetadataIndex.build(
            [None if r.metadata is None else orjson.dumps(r.metadata) for r in records]
        )
        self.text = TextIndex.build(self.documents) if indexed else None
        self._id_index = IdIndex.build(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def find_ids(self, ids: Sequence[str]) -> NDArray[np.int64]:
        return self._id_index.lookup(ids, self.ids)


def number(value: Any) -> bool:
    return type(value) in (int, float)


def equal(stored: Any, value: Scalar) -> bool:
    same_kind = (number(stored) and number(value)) or type(stored) is type(value)
    return same_kind and bool(stored == value)


def compares(stored: Any, op: ComparisonOp, value: Scalar) -> bool:
    if op == "$eq":
        return equal(stored, value)
    if op == "$ne":
        return not equal(stored, value)
    if not number(stored) or not number(value):
        return False
    below, above = bool(stored < value), bool(stored > value)
    return {"$gt": above, "$gte": not below, "$lt": below, "$lte": not above}[op]


def matches(where: Where, record: Record) -> bool:
    """The meaning of a filter, one record at a time."""
    metadata = record.metadata or {}
    match where:
        case And(children):
            return all(matches(child, record) for child in children)
        case Or(children):
            return any(matches(child, record) for child in children)
        case Compare(key, op, value):
            return compares(metadata.get(key), op, value)
        case OneOf(key, values, negated):
            return any(equal(metadata.get(key), value) for value in values) != negated
        case ListContains(key, value, negated):
            stored = metadata.get(key)
            items = stored if isinstance(stored, list) else []
            return any(type(item) is type(value) and item == value for item in items) != negated
        case DocumentContains(needle, negated):
            return (record.document is not None and needle in record.document) != negated
        case DocumentMatches(pattern, negated):
            # ASCII: what `\\b` and `\\d` are to RE2.
            found = (
                record.document is not None
                and re.search(pattern, record.document, re.ASCII) is not None
            )
            return found != negated
        case IdIn(ids, negated):
            return (record.id in ids) != negated


WORDS = ["tower", "bridge", "日本語", "été", "aaaa", "b", ""]
NEEDLES = ["tower", "ower b", "日本", "本", "t", "é", "aa", "aaa", "", "absent", "r日"]
PATTERNS = [
    "tow(er)?",
    "^b",
    "e$",
    "br.dge",
    "日本語?",
    "(?i)TOWER",
    "[aé]{2,}",
    "x|aaaa",
    "",
    r"\bt",
]
NUMBERS = st.sampled_from([0, 1, 2, 1.0, 0.5, 2.0, -1, 2**53 + 1, 2.0**53])
SCALARS = st.one_of(NUMBERS, st.booleans(), st.sampled_from(["x", "y", "é"]))
VALUES = st.one_of(
    SCALARS,
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
    st.lists(st.sampled_from("xy"), min_size=1, max_size=3),
)
KEYS = st.sampled_from(["a", "b", "rare"])
RECORDS = st.builds(
    Record,
    id=st.just(""),
    document=st.one_of(st.none(), st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)),
    metadata=st.one_of(st.none(), st.dictionaries(KEYS, VALUES, max_size=3)),
)
IDS = st.sampled_from([f"id{row}" for row in range(12)])
LEAVES: st.SearchStrategy[Where] = st.one_of(
    st.builds(Compare, KEYS, st.sampled_from(["$eq", "$ne"]), SCALARS),
    st.builds(Compare, KEYS, st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), NUMBERS),
    st.builds(OneOf, KEYS, st.lists(NUMBERS, min_size=1, max_size=6).map(tuple), st.booleans()),
    st.builds(OneOf, KEYS, st.just(("x", "é")), st.booleans()),
    st.builds(ListContains, KEYS, SCALARS, st.booleans()),
    st.builds(DocumentContains, st.sampled_from(NEEDLES), st.booleans()),
    st.builds(DocumentMatches, st.sampled_from(PATTERNS), st.booleans()),
    st.builds(IdIn, st.lists(IDS, max_size=4).map(tuple), st.booleans()),
)
TREES = st.recursive(
    LEAVES,
    lambda children: st.one_of(
        st.builds(And, st.lists(children, max_size=3).map(tuple)),
        st.builds(Or, st.lists(children, max_size=3).map(tuple)),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(
    drawn=st.lists(RECORDS, max_size=10),
    repeat=st.sampled_from([1, 40]),
    where=TREES,
    indexed=st.booleans(),
    live_every=st.sampled_from([None, 1, 2, 30]),
)
def test_a_tree_means_what_a_plain_evaluation_says(
    drawn: list[Record], repeat: int, where: Where, indexed: bool, live_every: int | None
) -> None:
    records = [
        Record(f"id{row}", record.document, record.metadata)
        for row, record in enumerate(drawn * repeat)
    ]
    live: Bools | None = None
    if live_every is not None:
        live = np.arange(len(records)) % live_every == 0
    segment = MemorySegment(records, indexed=indexed)
    before = None if live is None else live.copy()
    found = evaluate(where, segment, live)
    expected = [
        matches(where, record) and (live is None or bool(live[row]))
        for row, record in enumerate(records)
    ]
    assert found.dtype == np.bool_
    assert found.tolist() == expected
    assert live is None or np.array_equal(live, before)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tall() -> tuple[list[Record], MemorySegment]:
    """Rows enough that the index prunes and that verifying single rows is worth while."""
    records = [
        Record(
            f"id{row}",
            None if row % 11 == 0 else f"{'filler words ' * 40} number {row * 7919} end",
            {"parity": row % 2, "row": row},
        )
        for row in range(3_000)
    ]
    return records, MemorySegment(records, indexed=True)


@pytest.mark.parametrize(
    "where",
    [
        DocumentContains("number 7919 ", False),
        DocumentContains("number 7919 ", True),
        DocumentContains("filler", False),
        DocumentContains("7", False),
        DocumentMatches(r"number 7919\d* end", False),
        DocumentMatches(r"number 7919\d* end", True),
        DocumentMatches("er [0-9]*7 end", False),
        And((DocumentContains("number 7919", False), Compare("parity", "$eq", 1))),
        And((DocumentMatches("1 end$", False), Compare("row", "$lt", 20))),
        And((DocumentContains("filler", False), Compare("row", "$lt", 20))),
        Or((DocumentContains("number 7919 ", False), Compare("row", "$lt", 2_990))),
        Or((And(()), DocumentContains("7", False))),
        And((Or(()), DocumentContains("7", False))),
    ],
)
def test_pruned_and_scanned_answers_are_the_same(
    tall: tuple[list[Record], MemorySegment], where: Where
) -> None:
    records, segment = tall
    expected = [matches(where, record) for record in records]
    assert evaluate(where, segment, None).tolist() == expected
    scanning = MemorySegment(records, indexed=False)
    assert evaluate(where, scanning, None).tolist() == expected


def test_documents_are_not_searched_when_metadata_excludes_every_row(
    tall: tuple[list[Record], MemorySegment], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, segment = tall

    def searched(*arguments: object) -> Bools:
        raise AssertionError("a document was searched")

    for method in ("contains", "contains_rows", "matches", "matches_rows"):
        monkeypatch.setattr(BytesColumn, method, searched)
    nothing = Compare("row", "$gt", 5_000)
    text = Or((DocumentContains("filler", False), DocumentMatches("end", True)))
    assert not evaluate(And((text, nothing)), segment, None).any()
    everything = Compare("row", "$gte", 0)
    assert evaluate(Or((text, everything)), segment, None).all()


def test_only_rows_that_can_still_match_are_verified(
    tall: tuple[list[Record], MemorySegment], monkeypatch: pytest.MonkeyPatch
) -> None:
    records, segment = tall
    verified: list[int] = []
    contains_rows = BytesColumn.contains_rows

    def recording(
        column: BytesColumn, needle: bytes, rows: NDArray[np.int64], check: Check
    ) -> Bools:
        verified.extend(rows.tolist())
        return contains_rows(column, needle, rows, check)

    monkeypatch.setattr(BytesColumn, "contains_rows", recording)
    where = And((DocumentContains("number 79", False), Compare("parity", "$eq", 1)))
    live = np.arange(len(records)) < 100
    assert np.flatnonzero(evaluate(where, segment, live)).tolist() == [1]
    assert verified
    assert all(row % 2 == 1 and row < 100 for row in verified)


def test_an_empty_segment_matches_nothing() -> None:
    segment = MemorySegment([], indexed=True)
    for where in (DocumentContains("abc", True), Compare("a", "$ne", 1), And(()), IdIn((), True)):
        assert evaluate(where, segment, None).tolist() == []


def test_a_malformed_pattern_is_the_clients_fault() -> None:
    segment = MemorySegment([Record("a", "text", None)], indexed=False)
    with pytest.raises(InvalidArgument):
        evaluate(DocumentMatches("(", False), segment, None)


def test_a_needle_with_an_unpaired_surrogate_matches_nothing() -> None:
    segment = MemorySegment([Record("a", "text", None)], indexed=True)
    assert evaluate(DocumentContains("\ud800", False), segment, None).tolist() == [False]


EDGES = [
    Record("int", None, {"n": 2**53 + 1}),
    Record("int-max", None, {"n": 2**63 - 1}),
    Record("int-min", None, {"n": -(2**63)}),
    Record("zero", None, {"n": 0}),
    Record("minus-zero", None, {"n": -0.0}),
    Record("float", None, {"n": 2.0**53}),
    Record("float-beyond", None, {"n": 2.0**63}),
    Record("tiny", None, {"n": 5e-324}),
    Record("true", None, {"n": True}),
    Record("text", None, {"n": "1"}),
    Record("list", None, {"n": [0, 2**53 + 1]}),
    Record("floats", None, {"n": [0.0, 2.0**53]}),
    Record("none", None, None),
]
_INF, _NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        (Compare("n", "$eq", 2**53 + 1), "int"),
        (Compare("n", "$eq", 2.0**53), "float"),
        (Compare("n", "$eq", 2**53), "float"),
        (Compare("n", "$gt", 2.0**53), "int int-max float-beyond"),
        (Compare("n", "$gte", 2**53 + 1), "int int-max float-beyond"),
        (Compare("n", "$gte", 2.0**63), "float-beyond"),
        (Compare("n", "$gt", 2**63 - 1), "float-beyond"),
        (Compare("n", "$lt", 2.0**63), "int int-max int-min zero minus-zero float tiny"),
        (Compare("n", "$lte", -(2.0**63)), "int-min"),
        (Compare("n", "$eq", -0.0), "zero minus-zero"),
        (Compare("n", "$eq", 0), "zero minus-zero"),
        (Compare("n", "$gt", 0), "int int-max float float-beyond tiny"),
        (Compare("n", "$eq", True), "true"),
        (Compare("n", "$eq", 1), ""),
        (Compare("n", "$eq", False), ""),
        (Compare("n", "$lt", _INF), "int int-max int-min zero minus-zero float float-beyond tiny"),
        (Compare("n", "$gt", -_INF), "int int-max int-min zero minus-zero float float-beyond tiny"),
        (Compare("n", "$gte", _INF), ""),
        (Compare("n", "$lte", _NAN), ""),
        (Compare("n", "$gt", _NAN), ""),
        (OneOf("n", (2.0**53, -0.0, _NAN, _INF), False), "zero minus-zero float"),
        (OneOf("n", (2**53 + 1, 2**63 - 1), False), "int int-max"),
        (ListContains("n", 0, False), "list"),
        (ListContains("n", -0.0, False), "floats"),
        (ListContains("n", 2**53 + 1, False), "list"),
        (ListContains("n", 2**53, False), ""),
        (ListContains("n", 2.0**53, False), "floats"),
        (ListContains("n", False, False), ""),
        (ListContains("absent", 0, False), ""),
        (Compare("absent", "$gt", 0), ""),
    ],
)
def test_numbers_at_the_edges(where: Where, ids: str) -> None:
    for repeat in (1, 20):  # Sparse columns, too.
        records = EDGES + [Record(f"other{row}", None, None) for row in range(repeat)]
        segment = MemorySegment(records, indexed=False)
        found = [records[row].id for row in np.flatnonzero(evaluate(where, segment, None))]
        assert found == ids.split()
        complement: Where | None = None
        if isinstance(where, Compare) and where.op == "$eq":
            complement = Compare(where.key, "$ne", where.value)
        elif isinstance(where, OneOf):
            complement = OneOf(where.key, where.values, True)
        elif isinstance(where, ListContains):
            complement = ListContains(where.key, where.value, True)
        if complement is not None:
            missing = evaluate(complement, segment, None)
            assert missing.tolist() == [record.id not in ids.split() for record in records]


UNICODE = [
    "e\u0301te\u0301",
    "\u00e9t\u00e9",
    "a\x00b",
    "\x00",
    "🦀🦀",
    "𝔘𝔫𝔦",
    "日本語",
    "ﬁ",
    "İi",
    "",
]


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    "needle",
    [
        "e", "\u0301", "e\u0301", "\u00e9", "\x00", "a\x00", "\x00b", "🦀", "𝔫", "本", "語", "fi",
        "ﬁ", "i", "\ud800", "日\ud800", "",
    ],
)  # fmt: skip
def test_needles_are_code_points_and_nothing_is_normalised(needle: str, indexed: bool) -> None:
    records = [Record(f"{row}", text, None) for row, text in enumerate([*UNICODE, None])]
    segment = MemorySegment(records, indexed=indexed)
    expected = [record.document is not None and needle in record.document for record in records]
    assert evaluate(DocumentContains(needle, False), segment, None).tolist() == expected
    absent = evaluate(DocumentContains(needle, True), segment, None)
    assert absent.tolist() == [not item for item in expected]


def test_the_deepest_filter_that_parses_is_evaluated() -> None:
    segment = MemorySegment([Record("a", "text", {"n": row}) for row in range(9)], indexed=True)
    tree: Where = Compare("n", "$eq", 3)
    for depth in range(DEPTH_MAX):
        tree = And((tree,)) if depth % 2 else Or((tree, Compare("n", "$lt", 0)))
    assert np.flatnonzero(evaluate(tree, segment, None)).tolist() == [3]


@pytest.mark.parametrize(
    "where",
    [
        DocumentContains("no", False),
        DocumentMatches("(a+)+$", False),
        DocumentMatches("fil+er", True),
        And((Compare("parity", "$eq", 1), DocumentMatches("[aeiou]{5}", False))),
    ],
)
def test_the_deadline_ends_a_search_through_documents(
    tall: tuple[list[Record], MemorySegment], where: Where
) -> None:
    _, segment = tall
    with pytest.raises(DeadlineExceeded):
        evaluate(where, segment, None, Cancel(timeout_s=-1.0))
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(Cancelled):
        evaluate(where, segment, None, cancel)
