"""MetadataIndex: every predicate against a plain Python evaluation, before and after storing."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any, cast

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochredb.errors import Corrupt, NewerFormat
from ochredb.parts.arrays import ArrayReader
from ochredb.parts.columns import BytesColumn
from ochredb.parts.metadata import MetadataIndex
from ochredb.parts.typed import Order
from ochredb.where import Scalar

from .sections import as_bytes, section_source

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": operator.eq,
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
EDGES = [
    0,
    1,
    -1,
    127,
    128,
    -128,
    -129,
    255,
    256,
    32767,
    32768,
    2**31,
    2**53,
    2**53 + 1,
    2**63 - 1,
    -(2**63),
]
INTS = st.one_of(st.sampled_from(EDGES), st.integers(-5, 5), st.integers(-(2**63), 2**63 - 1))
FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.5, 2.0**53, 2.0**63, -(2.0**63), 1e300, -1e300]),
    st.floats(allow_nan=False, allow_infinity=False),
)
SCALARS = st.one_of(INTS, FLOATS, st.booleans(), st.text("aé日", max_size=2))
LISTS = st.one_of(
    st.lists(INTS, max_size=3),
    st.lists(FLOATS, max_size=3),
    st.lists(st.booleans(), max_size=3),
    st.lists(st.text("ab", max_size=1), max_size=3),
)
OBJECTS = st.one_of(
    st.none(), st.dictionaries(st.sampled_from("abc"), st.one_of(SCALARS, LISTS), max_size=3)
)
Object = dict[str, Any] | None


def built(objects: list[Object]) -> MetadataIndex:
    return MetadataIndex.build([None if item is None else orjson.dumps(item) for item in objects])


def reopened(index: MetadataIndex) -> MetadataIndex:
    return MetadataIndex.open(section_source(index.sections()))


def comparable(stored: Any, value: Scalar) -> bool:
    """Numbers with numbers, bools with bools, strings with strings."""

    def family(item: Any) -> str:
        return "number" if type(item) in (int, float) else type(item).__name__

    return family(stored) == family(value)


def stands(stored: Any, op: str, value: Scalar) -> bool:
    return comparable(stored, value) and OPERATORS[op](stored, value)


def values_of(objects: list[Object], key: str) -> list[Any]:
    return [None if item is None else item.get(key) for item in objects]


def check_all(index: MetadataIndex, objects: list[Object], values: list[Scalar]) -> None:
    for key in "abc":
        stored = values_of(objects, key)
        for value in values:
            ordered = type(value) in (int, float)
            for op in OPERATORS if ordered else ["$eq"]:
                expected = [stands(item, op, value) for item in stored]
                assert index.compare(key, cast(Order, op), value).tolist() == expected, (op, value)
            expected = [
                isinstance(item, list) and any(type(e) is type(value) and e == value for e in item)
                for item in stored
            ]
            assert index.list_contains(key, value).tolist() == expected, value
        for kind in (str, bool, int, float):
            group = [value for value in values if type(value) is kind]
            expected = [any(stands(item, "$eq", value) for value in group) for item in stored]
            assert index.one_of(key, group).tolist() == expected, group


@settings(deadline=None)  # A shared machine may stall at any moment.
@given(
    objects=st.lists(OBJECTS, max_size=30),
    values=st.lists(SCALARS, max_size=4),
    absent=st.sampled_from([0, 100]),
)
def test_predicates_equal_a_plain_evaluation(
    objects: list[Object], values: list[Scalar], absent: int
) -> None:
    """Many absent rows make the columns sparse; values that occur are asked for too."""
    objects = objects + [None] * absent
    for item in objects[:4]:
        for stored in (item or {}).values():
            values = values + (stored if isinstance(stored, list) else [stored])
    index = built(objects)
    check_all(index, objects, values)
    check_all(reopened(index), objects, values)
    assert as_bytes(reopened(index).sections()) == as_bytes(index.sections())


@settings(deadline=None)
@given(
    stored=st.lists(st.one_of(INTS, FLOATS), min_size=1, max_size=60),
    extra=st.lists(st.one_of(INTS, FLOATS), max_size=20),
)
def test_one_of_many_numbers_is_exact(stored: list[Scalar], extra: list[Scalar]) -> None:
    objects: list[Object] = [{"a": value} for value in stored]
    index = built(objects)
    wanted = stored[::2] + extra
    expected = [any(item == value for value in wanted) for item in stored]
    assert index.one_of("a", wanted).tolist() == expected


@pytest.mark.parametrize(
    "value", [2**53 + 1, 2**53 + 3, 2**63, -(2**63) - 1, 10**400, -(10**400), 0.5]
)
@pytest.mark.parametrize("op", list(OPERATORS))
def test_numbers_are_never_rounded(op: str, value: int | float) -> None:
    stored: list[Any] = [2**53, 2**53 + 1, 2**53 + 4, 2**63 - 1, -(2**63), 0]
    stored += [2.0**53, 2.0**53 + 2, 2.0**53 + 4, 2.0**63, -1e308]
    index = built([{"a": item} for item in stored])
    expected = [OPERATORS[op](item, value) for item in stored]
    assert index.compare("a", cast(Order, op), value).tolist() == expected


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("op", list(OPERATORS))
def test_operands_that_are_not_finite_compare_as_in_python(op: str, value: float) -> None:
    stored: list[Any] = [1, -5, 2.5, 1e300]
    index = built([{"a": item} for item in stored])
    expected = [OPERATORS[op](item, value) for item in stored]
    assert index.compare("a", cast(Order, op), value).tolist() == expected


def test_an_integer_beyond_int64_is_a_float() -> None:
    index = built([{"a": 2**64 - 1}, {"a": 3}, {"a": [2**64 - 1, 4]}])
    assert index.key_types == {("a", "float"), ("a", "int"), ("a", "float_list"), ("a", "int_list")}
    assert index.compare("a", "$eq", 2.0**64).tolist() == [True, False, False]
    assert index.compare("a", "$eq", 3).tolist() == [False, True, False]
    assert index.list_contains("a", 2.0**64).tolist() == [False, False, True]


def test_nulls_objects_and_empty_lists_are_as_if_absent() -> None:
    index = built([{"a": None, "b": {"x": 1}, "c": []}, {}])
    assert index.key_types == frozenset()
    assert not index.compare("a", "$eq", 0).any()


def test_many_rows_and_many_keys() -> None:
    """Several steps of rows; one key in all, one in few, 300 in very few."""
    objects: list[Object] = []
    for row in range(5_000):
        item: dict[str, Any] = {"row": row, f"k{row % 300}": row % 7, "name": f"n{row % 400}"}
        if row % 10 == 0:
            item["rare"] = row / 2
        objects.append(item)
    for index in (built(objects), reopened(built(objects))):
        assert index.compare("row", "$gte", 4_990).nonzero()[0].tolist() == list(
            range(4_990, 5_000)
        )
        wanted: list[Scalar] = [f"n{number}" for number in range(0, 400, 2)]
        assert index.one_of("name", wanted).tolist() == [row % 2 == 0 for row in range(5_000)]
        assert index.compare("rare", "$eq", 5).nonzero()[0].tolist() == [10]
        expected = [row for row in range(5_000) if row % 300 == 17 and row % 7 == 3]
        assert index.compare("k17", "$eq", 3).nonzero()[0].tolist() == expected


def test_the_rows_of_a_sparse_column_ascend() -> None:
    """Also where integers too big to be ints join the floats late."""
    objects: list[Object] = [None] * 40
    objects[30], objects[10], objects[20] = {"a": 0.5}, {"a": 2**64 - 1}, {"a": 1.5}
    sections = as_bytes(built(objects).sections())
    (entry,) = orjson.loads(sections["metadata/directory"])["columns"]
    reader = ArrayReader(memoryview(sections["metadata/arrays"]), "metadata")
    assert reader.get(entry["rows"]).tolist() == [10, 20, 30]
    assert reader.get(entry["values"]).tolist() == [2.0**64, 1.5, 0.5]


def test_a_column_of_objects_is_indexed_like_a_list() -> None:
    rows = [b'{"a":1}', None, b'{"a":"x"}'] * 3
    sections = MetadataIndex.build(BytesColumn.from_list(rows)).sections()
    assert as_bytes(sections) == as_bytes(MetadataIndex.build(rows).sections())


def test_the_bytes_on_disk_are_those_of_format_1() -> None:
    objects: list[Object] = [{"a": 1, "t": ["q", "p"]}, {"a": -300}, {"f": 1.5}, *6 * [None]]
    sections = as_bytes(built(objects).sections())
    assert sections["metadata/directory"] == (
        b'{"format":1,"count":9,"columns":['
        b'{"key":"a","type":"int","values":[0,"<i2",9],"present":[24,"|b1",9]},'
        b'{"key":"f","type":"float","values":[40,"<f8",1],"rows":[48,"<i4",1]},'
        b'{"key":"t","type":"string_list","values":[56,"|u1",2],"rows":[64,"<i4",2],'
        b'"offsets":[72,"<i8",3],"strings":[96,"|u1",2],'
        b'"hashes":[104,"<u8",2],"codes":[120,"<u4",2]}]}'
    )
    assert sections["metadata/arrays"] == bytes.fromhex(
        "0100d4fe" + 20 * "00"  # a: 1, -300, and seven absent
        + "0101" + 14 * "00" +  # present
        "000000000000f83f" "0200000000000000"  # f: 1.5 in row 2
        "0001000000000000" "0000000000000000"  # t: codes 0 and 1, both in row 0
        "000000000000000001000000000000000200000000000000" "7170000000000000"  # "q", "p"
        "879b441d19e520be96b3f0cf706638f2" "0100000000000000"  # their hashes, p's first
    )  # fmt: skip


def test_damaged_directories_are_corrupt() -> None:
    objects: list[Object] = [{"a": 1, "b": "x"}, {"a": 2, "c": ["y"]}] + [None] * 10
    sections = as_bytes(built(objects).sections())
    directory = orjson.loads(sections["metadata/directory"])
    columns = {(entry["key"], entry["type"]): entry for entry in directory["columns"]}
    bad_entries = [
        {**columns["a", "int"], "type": "date"},
        {**columns["a", "int"], "values": [0, "<f8", 2]},
        {**columns["a", "int"], "values": [0, "|i1", 1 << 40]},
        {**columns["a", "int"], "values": None},
        {**columns["a", "int"], "rows": [0, "<i4", 1]},
        {key: value for key, value in columns["b", "string"].items() if key != "codes"},
        {key: value for key, value in columns["b", "string"].items() if key != "offsets"},
        {key: value for key, value in columns["c", "string_list"].items() if key != "rows"},
        {key: value for key, value in columns["a", "int"].items() if key != "key"},
        7,
    ]
    for entry in bad_entries:
        damaged = orjson.dumps({**directory, "columns": [entry]})
        with pytest.raises(Corrupt):
            MetadataIndex.open(section_source({**sections, "metadata/directory": damaged}))
    for damaged in (b"", b"{", b"{}", orjson.dumps({**directory, "columns": 1})):
        with pytest.raises(Corrupt):
            MetadataIndex.open(section_source({**sections, "metadata/directory": damaged}))
    short = sections["metadata/arrays"][:-1]
    with pytest.raises(Corrupt):
        MetadataIndex.open(section_source({**sections, "metadata/arrays": short}))


@settings(deadline=None)
@given(
    section=st.sampled_from(["metadata/directory", "metadata/arrays"]),
    place=st.integers(0, 400),
    byte=st.integers(0, 255),
)
def test_a_damaged_byte_never_crashes(section: str, place: int, byte: int) -> None:
    """Checksums find damage; should they not, the index is Corrupt or wrong, but nothing breaks."""
    objects: list[Object] = [{"a": 1, "b": "x"}, {"a": 2.5, "c": ["y", "z"]}] + [None] * 10
    sections = as_bytes(built(objects).sections())
    damaged = bytearray(sections[section])
    damaged[place % len(damaged)] = byte
    with contextlib.suppress(Corrupt, NewerFormat):
        index = MetadataIndex.open(section_source({**sections, section: bytes(damaged)}))
        for key in "abc":
            index.compare(key, "$gt", 1)
            index.one_of(key, ["x", "y", "z", "u", "v", "w"])
            index.list_contains(key, "y")
