"""The filter language: what parses to what, what is refused, and what the reference says it means.

Refusals and matches are those observed on Chroma 1.5.9's wire, but for numbers that it rounds.
"""

from __future__ import annotations

from typing import Any

import pytest

from ochredb.errors import InvalidArgument
from ochredb.testing.reference import ReferenceRecord, matches
from ochredb.where import (
    And,
    Compare,
    DocumentContains,
    DocumentMatches,
    IdIn,
    ListContains,
    OneOf,
    Or,
    Where,
)
from ochredb.where_parse import (
    DEPTH_MAX,
    NODES_MAX,
    PATTERN_BYTES_MAX,
    combine,
    parse_where,
    parse_where_document,
)


@pytest.mark.parametrize(
    ("where", "tree"),
    [
        ({"a": "x"}, Compare("a", "$eq", "x")),
        ({"": "x"}, Compare("", "$eq", "x")),
        ({"a": {"$eq": 1.0}}, Compare("a", "$eq", 1.0)),
        ({"a": {"$ne": True}}, Compare("a", "$ne", True)),
        ({"a": {"$gt": 1}}, Compare("a", "$gt", 1)),
        ({"a": {"$gte": 1.5}}, Compare("a", "$gte", 1.5)),
        ({"a": {"$lt": 2**63 - 1}}, Compare("a", "$lt", 2**63 - 1)),
        ({"a": {"$lte": 2**63}}, Compare("a", "$lte", float(2**63))),
        ({"a": -(2**63) - 1}, Compare("a", "$eq", -float(2**63))),
        ({"a": {"$in": ["x"]}}, OneOf("a", ("x",), negated=False)),
        ({"a": {"$nin": [True, False]}}, OneOf("a", (True, False), negated=True)),
        ({"a": {"$in": [2.5, 1]}}, OneOf("a", (2.5, 1.0), negated=False)),
        ({"a": {"$in": [2**63]}}, OneOf("a", (float(2**63),), negated=False)),
        (
            {"a": {"$in": [2.5, 1, 2**53 + 1]}},
            Or((OneOf("a", (2.5, 1.0), False), OneOf("a", (2**53 + 1,), False))),
        ),
        (
            {"a": {"$nin": [2.5, 2**63 - 1, 2**63]}},
            And((OneOf("a", (2.5, 2.0**63), True), OneOf("a", (2**63 - 1,), True))),
        ),
        (
            {"a": {"$in": [1, 2**63]}},
            Or((OneOf("a", (1,), negated=False), OneOf("a", (float(2**63),), negated=False))),
        ),
        (
            {"a": {"$nin": [1, 2**63]}},
            And((OneOf("a", (1,), negated=True), OneOf("a", (float(2**63),), negated=True))),
        ),
        ({"a": {"$contains": 1}}, ListContains("a", 1, negated=False)),
        ({"a": {"$not_contains": ""}}, ListContains("a", "", negated=True)),
        ({"$and": []}, And(())),
        ({"$or": []}, Or(())),
        ({"$or": [{"a": 1}]}, Or((Compare("a", "$eq", 1),))),
        (
            {"$and": [{"a": 1}, {"$or": [{"#document": {"$contains": "x"}}]}]},
            And((Compare("a", "$eq", 1), Or((DocumentContains("x", negated=False),)))),
        ),
        ({"#document": {"$contains": ""}}, DocumentContains("", negated=False)),
        ({"#document": {"$not_contains": "x"}}, DocumentContains("x", negated=True)),
        ({"#document": {"$regex": "x+"}}, DocumentMatches("x+", negated=False)),
        ({"#document": {"$not_regex": "x+"}}, DocumentMatches("x+", negated=True)),
        ({"#document": "x"}, Compare("#document", "$eq", "x")),
        ({"#id": "x"}, IdIn(("x",), negated=False)),
        ({"#id": {"$ne": "x"}}, IdIn(("x",), negated=True)),
        ({"#id": {"$in": ["x", "y"]}}, IdIn(("x", "y"), negated=False)),
        ({"#id": {"$nin": ["x"]}}, IdIn(("x",), negated=True)),
        ({"#id": 1}, Compare("#id", "$eq", 1)),
        ({"#id": {"$in": [1]}}, OneOf("#id", (1,), negated=False)),
    ],
)
def test_trees(where: Any, tree: Where) -> None:
    # repr, because 1, 1.0 and True are equal in Python.
    assert repr(parse_where(where)) == repr(tree)


@pytest.mark.parametrize(
    "where",
    [
        {}, [], "x", 1, True, {"a": 1, "b": 2}, {"$foo": "x"}, {"$eq": 1}, {"$not": {"a": 1}},
        {"a": None}, {"a": []}, {"a": ["x"]}, {"a": {}}, {"a": {"$eq": None}},
        {"a": {"$ne": None}}, {"a": {"$eq": ["x"]}}, {"a": {"$eq": {}}}, {"a": {"$foo": 1}},
        {"a": {"eq": 1}}, {"a": {"$gt": "x"}}, {"a": {"$gt": True}}, {"a": {"$gt": 1, "$lt": 3}},
        {"a": {"$and": [1]}}, {"a": {"$in": []}}, {"a": {"$in": "x"}}, {"a": {"$in": [1, 2.5]}},
        {"a": {"$in": ["x", 1]}}, {"a": {"$in": [True, 1]}}, {"a": {"$in": [1, True]}},
        {"a": {"$in": [1.5, True]}}, {"a": {"$in": [None]}}, {"a": {"$in": [[1]]}},
        {"a": {"$contains": [1]}}, {"a": {"$contains": None}}, {"a": {"$regex": "x"}},
        {"a": {"$not_regex": "x"}}, {"$and": {}}, {"$and": [{}]}, {"$and": ["x"]},
        {"$and": [None]}, {"$and": [{"a": 1}], "a": 1}, {"#document": ["x"]},
        {"#document": {"$contains": 1}}, {"#document": {"$contains": ["x"]}},
        {"#document": {"$foo": "x"}}, {"#id": {"$regex": "x"}}, {"#id": {"$in": []}},
    ],
)  # fmt: skip
def test_refused_where(where: Any) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        parse_where(where)
    assert str(refusal.value) == "Invalid where clause"


@pytest.mark.parametrize(
    "where_document",
    [
        {}, [], "x", {"a": 1}, {"$contains": "x", "$not_contains": "y"}, {"$contains": 1},
        {"$contains": None}, {"$regex": 1}, {"$and": "x"}, {"$foo": "x"}, {"$eq": "x"},
        {"$and": [{"a": "x"}]}, {"#document": {"$contains": "x"}},
    ],
)  # fmt: skip
def test_refused_where_document(where_document: Any) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        parse_where_document(where_document)
    assert str(refusal.value) == "Invalid where document clause"


def test_null_is_no_filter() -> None:
    assert parse_where(None) is None
    assert parse_where_document(None) is None


def test_combine() -> None:
    first, second = Compare("a", "$eq", 1), DocumentContains("x", negated=False)
    assert combine(None, None) is None
    assert combine(first, None) is first
    assert combine(None, second) is second
    assert combine(first, second) == And((first, second))


@pytest.mark.parametrize(
    "pattern",
    ["(", "[", "\\", "(?=a)", r"(a)\1", "a**", "a{100000}", "x" * (PATTERN_BYTES_MAX + 1)],
)
def test_bad_patterns(pattern: str) -> None:
    for operator in ("$regex", "$not_regex"):
        with pytest.raises(InvalidArgument, match=r"^Regex syntax errror: "):
            parse_where_document({operator: pattern})
        with pytest.raises(InvalidArgument, match=r"^Regex syntax errror: "):
            parse_where({"#document": {operator: pattern}})


def test_a_pattern_with_half_a_character_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^Regex syntax errror: "):
        parse_where_document({"$regex": "\ud800"})


def test_the_longest_pattern() -> None:
    parse_where_document({"$regex": "x" * PATTERN_BYTES_MAX})
    with pytest.raises(InvalidArgument, match="longer than"):
        parse_where_document({"$regex": "é" * (PATTERN_BYTES_MAX // 2 + 1)})


def nested(depth: int, leaf: Any) -> Any:
    for _ in range(depth):
        leaf = {"$and": [leaf]}
    return leaf


def test_depth() -> None:
    leaves = {parse_where: {"a": 1}, parse_where_document: {"$contains": "x"}}
    for parse, leaf in leaves.items():
        assert parse(nested(DEPTH_MAX, leaf)) is not None
        for depth in (DEPTH_MAX + 1, 100_000):
            with pytest.raises(InvalidArgument, match=r"^Invalid where .*clause: it is nested"):
                parse(nested(depth, leaf))


def test_number_of_conditions() -> None:
    assert parse_where({"$or": [{"a": 1}] * (NODES_MAX - 1)}) is not None
    with pytest.raises(InvalidArgument, match=r"^Invalid where clause: it has more than"):
        parse_where({"$or": [{"a": 1}] * NODES_MAX})
    assert parse_where({"a": {"$in": list(range(100_000))}}) is not None


RECORDS = [
    ReferenceRecord(
        id="1",
        document="hello",
        metadata={"s": "x", "i": 1, "f": 1.0, "b": True, "l": [1, 2], "ls": ["a"], "lf": [1.0]},
    ),
    ReferenceRecord(id="2", document="a+b", metadata={"i": 2}),
    ReferenceRecord(id="3"),
    ReferenceRecord(id="4", document="x.y\nz", metadata={"s": "y", "i": 2**53 + 1}),
]


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        ({"": "x"}, ""),
        ({"s": "x"}, "1"),
        ({"s": {"$ne": "x"}}, "234"),
        ({"s": {"$contains": "x"}}, ""),
        ({"i": {"$eq": 1.0}}, "1"),
        ({"f": 1}, "1"),
        ({"i": {"$eq": True}}, ""),
        ({"b": 1}, ""),
        ({"b": True}, "1"),
        ({"b": {"$ne": 1}}, "1234"),
        ({"i": {"$ne": 1}}, "234"),
        ({"i": {"$nin": [1.0]}}, "234"),
        ({"i": {"$in": [1, 2]}}, "12"),
        ({"i": {"$in": [2**63, 1]}}, "1"),
        ({"i": {"$nin": [2**63, 1]}}, "234"),
        ({"i": {"$in": [1.5, 2**53 + 1]}}, "4"),
        ({"i": {"$nin": [1.0, 2**53 + 1]}}, "23"),
        ({"i": {"$lt": 2**64}}, "124"),
        ({"i": {"$gt": -(2**63) - 1}}, "124"),
        ({"i": {"$gte": 9007199254740992.0}}, "4"),
        # Exact, where Chroma rounds the operand or the value.
        ({"i": 9007199254740992.0}, ""),
        ({"i": 2.5}, ""),
        ({"i": {"$lt": 2.5}}, "12"),
        ({"i": {"$lte": 2.1}}, "12"),
        ({"i": {"$gt": 1.5}}, "24"),
        ({"l": 1}, ""),
        ({"l": {"$ne": 1}}, "1234"),
        ({"l": {"$gt": 0}}, ""),
        ({"l": {"$in": [1]}}, ""),
        ({"l": {"$contains": 1}}, "1"),
        ({"l": {"$contains": 1.0}}, ""),
        ({"lf": {"$contains": 1.0}}, "1"),
        ({"lf": {"$contains": 1}}, ""),
        ({"l": {"$contains": True}}, ""),
        ({"l": {"$not_contains": 1}}, "234"),
        ({"ls": {"$contains": ""}}, ""),
        ({"ls": {"$contains": "a"}}, "1"),
        ({"$and": []}, "1234"),
        ({"$or": []}, ""),
        ({"$or": [{"i": 1}, {"$and": [{"i": 2}, {"s": "y"}]}]}, "1"),
        ({"#id": {"$in": ["3", "1", "zz"]}}, "13"),
        ({"#id": {"$ne": "3"}}, "124"),
        ({"#id": 3}, ""),
        ({"#document": {"$not_contains": "h"}}, "234"),
        ({"$and": [{"#document": {"$contains": "h"}}, {"i": 1}]}, "1"),
        ({"#document": 1}, ""),
    ],
)
def test_meaning_of_where(where: Any, ids: str) -> None:
    tree = parse_where(where)
    assert "".join(record.id for record in RECORDS if matches(tree, record)) == ids


@pytest.mark.parametrize(
    ("where_document", "ids"),
    [
        (None, "1234"),
        ({"$contains": ""}, "124"),
        ({"$not_contains": ""}, "3"),
        ({"$contains": "H"}, ""),
        ({"$contains": "+"}, "2"),
        ({"$regex": ""}, "124"),
        ({"$not_regex": ""}, "3"),
        ({"$regex": "h.*o"}, "1"),
        ({"$regex": "^hello$"}, "1"),
        ({"$regex": "x.y.z"}, ""),
        ({"$regex": "(?s)x.y.z"}, "4"),
        ({"$regex": "(?i)HELLO"}, "1"),
        ({"$regex": "[[:alpha:]]+"}, "124"),
        ({"$regex": r"\bhello\b"}, "1"),
        ({"$not_regex": "h"}, "234"),
        ({"$and": [{"$contains": "h"}, {"$contains": "o"}]}, "1"),
        ({"$or": [{"$contains": "h"}, {"$regex": "z$"}]}, "14"),
    ],
)
def test_meaning_of_where_document(where_document: Any, ids: str) -> None:
    tree = parse_where_document(where_document)
    assert "".join(record.id for record in RECORDS if matches(tree, record)) == ids
