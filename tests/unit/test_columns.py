"""BytesColumn: Arrow and lists in, rows and searches out, against plain Python."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochredb.errors import Corrupt, InvalidArgument
from ochredb.parts import columns
from ochredb.parts.columns import BytesColumn

TEXTS = st.lists(
    st.one_of(st.none(), st.text("ab", max_size=8), st.text("aé日本 ", max_size=8)), max_size=40
)
NEEDLES = st.one_of(st.text("ab", max_size=4), st.text("aé日本 ", min_size=1, max_size=4))
ARROW_TYPES = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()]


def encoded(texts: list[str | None]) -> list[bytes | None]:
    return [None if text is None else text.encode() for text in texts]


def expected_contains(texts: list[str | None], needle: str) -> list[bool]:
    return [text is not None and needle in text for text in texts]


@settings(deadline=None)  # A shared machine may stall at any moment.
@given(texts=TEXTS)
def test_a_list_is_read_back(texts: list[str | None]) -> None:
    column = BytesColumn.from_list(texts)
    assert len(column) == len(texts)
    assert column.take(range(len(texts))) == encoded(texts)
    assert [column.get(row) for row in range(len(texts))] == encoded(texts)
    assert column.take_text(np.arange(len(texts))) == texts
    assert column.present.tolist() == [text is not None for text in texts]
    assert column.size_bytes == sum(len(text or b"") for text in encoded(texts))


@settings(deadline=None)
@given(
    texts=TEXTS,
    kind=st.sampled_from(ARROW_TYPES),
    cut=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_an_arrow_slice_is_read_without_its_surroundings(
    texts: list[str | None], kind: pa.DataType, cut: tuple[int, int]
) -> None:
    array: Any = pa.array(encoded(texts), type=pa.large_binary()).cast(kind)
    start = min(cut[0], len(texts))
    stop = max(start, len(texts) - cut[1])
    column = BytesColumn.from_arrow(array.slice(start, stop - start))
    expected = texts[start:stop]
    assert column.take(range(len(expected))) == encoded(expected)
    assert column.present.tolist() == [text is not None for text in expected]
    for needle in ("", "a", "ab", "日"):
        assert column.contains(needle.encode()).tolist() == expected_contains(expected, needle)


def test_an_arrow_column_is_not_copied() -> None:
    array = pa.array(["one", "two"], type=pa.large_string())
    column = BytesColumn.from_arrow(array)
    buffer = array.buffers()[2]
    assert buffer is not None
    assert column.data.ctypes.data == buffer.address


def test_an_arrow_column_of_nulls_is_absent_everywhere() -> None:
    column = BytesColumn.from_arrow(pa.nulls(3))
    assert column.take([0, 1, 2]) == [None] * 3
    assert not column.contains(b"").any()


def test_bytes_under_an_absent_row_are_never_seen() -> None:
    offsets = np.array([0, 3, 6], dtype=np.int32)
    column = BytesColumn(offsets, b"abcabc", np.array([True, False]))
    assert column.get(1) is None
    assert column.contains(b"abc").tolist() == [True, False]
    assert column.contains(b"a").tolist() == [True, False]
    assert column.contains_rows(b"abc", [1, 0]).tolist() == [False, True]
    assert column.matches("b").tolist() == [True, False]
    assert column.matches_rows("b", [1, 0]).tolist() == [False, True]


@settings(deadline=None)
@given(texts=TEXTS, needle=NEEDLES)
def test_contains_is_pythons_in(texts: list[str | None], needle: str) -> None:
    column = BytesColumn.from_list(texts)
    expected = expected_contains(texts, needle)
    assert column.contains(needle.encode()).tolist() == expected
    rows = list(range(len(texts)))[::-2]
    assert column.contains_rows(needle.encode(), rows).tolist() == [expected[row] for row in rows]


@settings(deadline=None)
@given(texts=TEXTS, needle=NEEDLES)
def test_matches_of_a_literal_is_pythons_in(texts: list[str | None], needle: str) -> None:
    column = BytesColumn.from_list(texts)
    expected = expected_contains(texts, needle)
    assert column.matches(re.escape(needle)).tolist() == expected
    rows = np.arange(len(texts))[::-2]
    assert column.matches_rows(re.escape(needle), rows).tolist() == [expected[row] for row in rows]


@pytest.mark.parametrize("needle", [b"xyz", b"xy", b"x"])
@pytest.mark.parametrize("boundary", [1 << 17, 1 << 20])
def test_a_match_is_found_wherever_it_lies_around_the_end_of_a_step(
    needle: bytes, boundary: int
) -> None:
    for shift in range(-4, 5):
        before = b"-" * (boundary + shift)
        # The match is inside row 1, straddles rows 2 and 3, and is inside row 4.
        rows: list[bytes | None] = [before, needle, b"-" + needle[:-1], needle[-1:], b"-" + needle]
        column = BytesColumn.from_list(rows)
        expected = [row is not None and needle in row for row in rows]
        assert column.contains(needle).tolist() == expected, shift


def test_many_rows_are_taken_in_any_order() -> None:
    texts = [None if row % 7 == 0 else f"row {row}" for row in range(20_000)]
    column = BytesColumn.from_list(texts)
    rows = np.arange(20_000)[::-1]
    assert column.take_text(rows) == texts[::-1]
    assert column.take(rows.astype(np.int32)) == encoded(texts[::-1])
    assert column.take([]) == []


def test_a_malformed_pattern_is_the_clients_fault() -> None:
    column = BytesColumn.from_list(["a"])
    with pytest.raises(InvalidArgument, match="Regex syntax errror"):
        column.matches("(")


def test_offsets_outside_of_the_data_are_corrupt() -> None:
    with pytest.raises(Corrupt):
        BytesColumn(np.array([0, 9], dtype=np.int64), b"abc")
    with pytest.raises(Corrupt):
        BytesColumn(np.array([-1, 2], dtype=np.int64), b"abc")


def test_offsets_out_of_order_never_reach_arrow() -> None:
    column = BytesColumn(np.array([0, 900, 3], dtype=np.int64), b"abc")
    with pytest.raises(Corrupt):
        column.matches("a")


def test_text_that_is_not_utf8_is_corrupt() -> None:
    with pytest.raises(Corrupt):
        BytesColumn.from_list([b"\xff"]).take_text([0])


SEARCHED = ["a" * 40, "ab" * 30, "abc" * 25, "b", "", "aab" * 14 + "a" * 33, None, "c\x00a", "🦀"]


@pytest.mark.parametrize("copies", [1, 40, 4_000])
@pytest.mark.parametrize("compared_bytes_max", [1, 32])
@pytest.mark.parametrize(
    "needle",
    [
        "a",
        "aa",
        "ab",
        "abcab",
        "a" * 33,
        "ab" * 16,
        "ab" * 17,
        "c\x00a",
        "\x00",
        "🦀",
        "a" * 41,
        "",
    ],
)
def test_every_way_of_searching_finds_the_same(
    needle: str, compared_bytes_max: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte by byte, by `find`, all at once and row by row; rows that touch with half a needle."""
    monkeypatch.setattr(columns, "_COMPARED_BYTES_MAX", compared_bytes_max)
    texts = SEARCHED * copies
    column = BytesColumn.from_list(texts)
    expected = expected_contains(SEARCHED, needle) * copies
    assert column.contains(needle.encode()).tolist() == expected
    rows = np.arange(len(texts))[::-3]
    found = column.contains_rows(needle.encode(), rows).tolist()
    assert found == [expected[row] for row in rows.tolist()]


def test_rows_are_gathered_in_the_order_asked_for() -> None:
    texts = ["x", None, "yy", "", "日本"]
    rows = [4, 0, 1, 4, 3]
    gathered = BytesColumn.from_list(texts).gathered(rows)
    assert gathered.take_text(range(5)) == [texts[row] for row in rows]
    assert len(BytesColumn.from_list(texts).gathered([])) == 0


@pytest.mark.parametrize("size", [3, 40, 2_000])
@pytest.mark.parametrize("count", [3, 100])
def test_rows_are_compared_with_keys(count: int, size: int) -> None:
    """Few and many, short and long, all equal and not."""
    keys = [f"{row:0{size}d}".encode() for row in range(count)]
    column = BytesColumn.from_list(keys)
    rows = np.arange(count)
    assert column.equal_rows(keys, rows).all()
    for other in (b"", keys[1], keys[0] + b"0", keys[0][:-1] + b"x"):
        assert column.equal_rows([other, *keys[1:]], rows).tolist() == [False] + [True] * (
            count - 1
        )
    with_hole = BytesColumn(column.offsets, column.data, rows != 2)
    assert with_hole.equal_rows(keys, rows).tolist() == [row != 2 for row in range(count)]


class Stopped(Exception):
    """The check says so."""


@pytest.mark.parametrize("search", ["contains", "contains_rows", "matches", "matches_rows"])
@pytest.mark.parametrize("text", ["needle in text " * 64, "aaa" * 320])
def test_a_long_search_can_be_stopped_between_steps(search: str, text: str) -> None:
    """4 MB: the check is called about once per MiB, and what it raises ends the search."""
    column = BytesColumn.from_list([text] * 4_200)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stopped

    sought: Any = "a{2,}|text" if search.startswith("matches") else b"aaaa"
    arguments = (sought, np.arange(len(column))) if search.endswith("rows") else (sought,)
    with pytest.raises(Stopped):
        getattr(column, search)(*arguments, check)
    assert calls == 3
