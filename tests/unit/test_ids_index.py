"""IdIndex: every id finds its row, whatever its hash; damage is told, not served."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochredb.errors import Corrupt
from ochredb.parts.columns import BytesColumn
from ochredb.parts.ids import IdIndex

from .sections import as_bytes, section_source

ID_LISTS = st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=60)


def expected_rows(ids: list[str], wanted: list[str]) -> list[int]:
    return [ids.index(item) if item in ids else -1 for item in wanted]


@settings(deadline=None)  # A shared machine may stall at any moment.
@given(ids=ID_LISTS, others=ID_LISTS)
def test_lookup_finds_each_id_and_nothing_else(ids: list[str], others: list[str]) -> None:
    column = BytesColumn.from_list(ids)
    index = IdIndex.build(column)
    wanted = ids[::-1] + others
    assert index.lookup(wanted, column).tolist() == expected_rows(ids, wanted)
    few = wanted[:3]
    assert index.lookup(few, column).tolist() == expected_rows(ids, few)
    as_utf8 = [item.encode() for item in few]
    assert index.lookup(as_utf8, column).tolist() == expected_rows(ids, few)


@settings(deadline=None)
@given(ids=ID_LISTS, others=ID_LISTS, hashes=st.integers(1, 3))
def test_colliding_hashes_are_told_apart(ids: list[str], others: list[str], hashes: int) -> None:
    column = BytesColumn.from_list(ids)
    index = IdIndex.build(column, hash_of=lambda value: len(value) % hashes)
    wanted = others + ids
    assert index.lookup(wanted, column).tolist() == expected_rows(ids, wanted)
    assert index.lookup(wanted[:2], column).tolist() == expected_rows(ids, wanted[:2])


@settings(deadline=None)
@given(ids=ID_LISTS)
def test_sections_are_read_back(ids: list[str]) -> None:
    column = BytesColumn.from_list(ids)
    sections = IdIndex.build(column).sections()
    index = IdIndex.open(section_source(sections))
    assert len(index) == len(ids)
    assert index.lookup(ids, column).tolist() == list(range(len(ids)))
    assert as_bytes(index.sections()) == as_bytes(sections)


def test_a_list_of_bytes_is_indexed_like_a_column() -> None:
    ids = [b"one", b"two", b"three"]
    assert as_bytes(IdIndex.build(ids).sections()) == as_bytes(
        IdIndex.build(BytesColumn.from_list(ids)).sections()
    )


def test_the_bytes_on_disk_are_those_of_format_1() -> None:
    assert as_bytes(IdIndex.build([b"one", b"two"]).sections()) == {
        "ids/directory": (
            b'{"format":1,"hash":"xxh3-64","count":2,"hashes":[0,"<u8",2],"rows":[16,"<u4",2]}'
        ),
        "ids/arrays": bytes.fromhex("8b9929cbbd60056ca0e11f32a7ab1f910100000000000000"),
    }


def test_an_id_with_an_unpaired_surrogate_is_not_found() -> None:
    column = BytesColumn.from_list(["a"])
    assert IdIndex.build(column).lookup(["\ud800"], column).tolist() == [-1]


def test_damaged_sections_are_corrupt() -> None:
    sections = as_bytes(IdIndex.build([b"one", b"two"]).sections())
    directory = orjson.loads(sections["ids/directory"])
    rows_start = directory["rows"][0]
    arrays = bytearray(sections["ids/arrays"])
    arrays[rows_start] = 200
    damaged: list[dict[str, bytes]] = [
        {},
        {**sections, "ids/directory": b"{"},
        {**sections, "ids/directory": b"[]"},
        {**sections, "ids/directory": orjson.dumps({**directory, "format": 0})},
        {**sections, "ids/directory": orjson.dumps({**directory, "hash": "md5"})},
        {**sections, "ids/directory": orjson.dumps({**directory, "count": 3})},
        {**sections, "ids/directory": orjson.dumps({**directory, "count": -1})},
        {**sections, "ids/directory": orjson.dumps({**directory, "rows": [8, "<u4", 2, 1]})},
        {**sections, "ids/directory": orjson.dumps({**directory, "rows": [4, "<u4", 2]})},
        {**sections, "ids/directory": orjson.dumps({**directory, "rows": [-8, "<u4", 2]})},
        {**sections, "ids/directory": orjson.dumps({**directory, "hashes": [0, "<i8", 2]})},
        {**sections, "ids/arrays": sections["ids/arrays"][:-1]},
        {**sections, "ids/arrays": bytes(arrays)},
        {"ids/directory": sections["ids/directory"]},
    ]
    for case in damaged:
        with pytest.raises(Corrupt):
            IdIndex.open(section_source(case))


@pytest.mark.parametrize("count", [1, 3, 4, 10, 64, 65, 400])
@pytest.mark.parametrize("size", [4, 500])
def test_lookup_of_few_and_many_short_and_long_ids(count: int, size: int) -> None:
    ids = [f"{row:0{size}d}" for row in range(500)]
    column = BytesColumn.from_list(ids)
    index = IdIndex.build(column)
    wanted = ids[: 2 * count : 2][::-1]
    assert index.lookup(wanted, column).tolist() == expected_rows(ids, wanted)
    keys = [item.encode() for item in wanted]
    assert index.lookup(keys, column).tolist() == expected_rows(ids, wanted)
    for strange in ("absent", "\ud800", ""):
        mixed = [*wanted, strange, ids[1]]
        assert index.lookup(mixed, column).tolist() == expected_rows(ids, mixed)
