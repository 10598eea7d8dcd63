"""TextIndex: it never loses a row that contains the needle, and it does prune."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochredb.errors import Corrupt, InvalidArgument, NewerFormat
from ochredb.parts.columns import BytesColumn
from ochredb.parts.text import BLOCK_ROWS, TextIndex
from ochredb.plan.literals import literal_of

from .sections import as_bytes, section_source

WORDS = ["tower", "bridge", "日本語", "été", "x", "", "aaaa", "naïve café"]


def some_documents(count: int, seed: int) -> list[str | None]:
    """Words that many rows share and numbers that few do; some rows are empty or absent."""
    rng = random.Random(seed)
    documents: list[str | None] = []
    for row in range(count):
        words = [*rng.choices(WORDS, k=rng.randint(0, 3)), f"#{rng.randrange(count)}", f"row{row}"]
        documents.append(rng.choice([" ".join(words)] * 8 + ["", None]))
    return documents


def check_superset(index: TextIndex, documents: list[str | None], needle: str) -> None:
    rows = index.candidates(needle.encode())
    if rows is None:
        return
    assert rows.dtype == np.int32
    assert np.all(rows[1:] > rows[:-1])
    true = [row for row, text in enumerate(documents) if text is not None and needle in text]
    assert set(true) <= set(rows.tolist())


@settings(deadline=None)
@given(
    count=st.sampled_from([0, 1, 40, 255, 256, 257, 900]),
    seed=st.integers(0, 3),
    needles=st.lists(
        st.one_of(st.sampled_from(WORDS), st.text("row#0123", min_size=1)), max_size=5
    ),
)
def test_candidates_hold_every_match(count: int, seed: int, needles: list[str]) -> None:
    documents = some_documents(count, seed)
    index = TextIndex.build(BytesColumn.from_list(documents))
    sections = index.sections()
    reopened = TextIndex.open(section_source(sections))
    assert len(reopened) == count
    assert as_bytes(reopened.sections()) == as_bytes(sections)
    for needle in [*needles, f"row{count // 2}", "w7 #", "本"]:
        check_superset(index, documents, needle)
        check_superset(reopened, documents, needle)


def test_a_rare_needle_has_few_candidates_and_an_unknown_one_none() -> None:
    documents = some_documents(3_000, seed=7)
    index = TextIndex.build(BytesColumn.from_list(documents))
    row = next(row for row, text in enumerate(documents) if text and text.endswith("row2345"))
    rows = index.candidates(b"row2345")
    assert rows is not None
    assert row in rows
    assert len(rows) < 60
    nothing = index.candidates("never seen Ω".encode())
    assert nothing is not None
    assert len(nothing) == 0


def test_short_and_common_needles_cannot_prune() -> None:
    documents = some_documents(3_000, seed=7)
    index = TextIndex.build(BytesColumn.from_list(documents))
    assert index.candidates(b"") is None
    assert index.candidates(b"ro") is None
    assert index.candidates(b"tower") is None


def test_one_cjk_character_prunes() -> None:
    documents: list[str | None] = [f"文書 {row}" for row in range(1_000)]
    documents[600] = "漢字"
    rows = TextIndex.build(BytesColumn.from_list(documents)).candidates("漢".encode())
    assert rows is not None
    assert rows.tolist() == [600]


def test_rows_beyond_one_block() -> None:
    count = BLOCK_ROWS + 5_000
    documents: list[str | None] = [f"{row:07d}" for row in range(count)]
    documents[-1] = "needle at the end"
    documents[3] = "needle at the start"
    index = TextIndex.build(BytesColumn.from_list(documents))
    reopened = TextIndex.open(section_source(index.sections()))
    for one in (index, reopened):
        rows = one.candidates(b"needle at")
        assert rows is not None
        assert rows.tolist() == [3, count - 1]


def test_frequent_grams_are_found_by_sampling_a_large_block() -> None:
    """Above 4,096 rows the sample decides early; the answer must not depend on it."""
    documents: list[str | None] = [f"common words and {row * 7919}" for row in range(6_000)]
    index = TextIndex.build(BytesColumn.from_list(documents))
    assert index.candidates(b"common words") is None
    for needle in ("7919", "47506081", "and 791"):
        check_superset(index, documents, needle)


def test_very_long_documents() -> None:
    """A document longer than a step is indexed alone, piece by piece."""
    piece = 1 << 20
    documents: list[str | None] = ["short"] * 100 + [None] + ["short", "needless"] * 50
    for cut in (100, piece - 3, piece - 2, piece - 1, piece, 2 * piece + 7):
        documents[100] = "ab" * (cut // 2) + "a" * (cut % 2) + "<=>" + "ab" * piece
        rows = TextIndex.build(BytesColumn.from_list(documents)).candidates(b"<=>")
        assert rows is not None
        assert rows.tolist() == [100], cut


def test_the_bytes_on_disk_are_those_of_format_1() -> None:
    index = TextIndex.build(BytesColumn.from_list(["abcd", "bcd", None]))
    assert as_bytes(index.sections()) == {
        "text/directory": (
            b'{"format":1,"count":3,"blocks":[{"count":3,"grams":[0,"<u2",3],'
            b'"offsets":[8,"<u4",4],"postings":[24,"<u2",3],"frequent":[32,"<u2",1]}]}'
        ),
        "text/arrays": bytes.fromhex(
            "b4190d3fbf700000"  # "dbc", "abc", "cdb": two of them across the documents
            "00000000010000000200000003000000"
            "0000000000000000"
            "708e"  # "bcd" is in two rows of three: frequent
        ),
    }


def test_damaged_sections_are_corrupt() -> None:
    documents = some_documents(300, seed=1)
    sections = as_bytes(TextIndex.build(BytesColumn.from_list(documents)).sections())
    directory = orjson.loads(sections["text/directory"])
    block = directory["blocks"][0]
    arrays = bytearray(sections["text/arrays"])
    arrays[block["postings"][0] : block["postings"][0] + 2] = b"\xff\xff"
    bad_directories = [
        {**directory, "format": 0},
        {**directory, "count": 70_000},
        {**directory, "count": 200},
        {**directory, "blocks": [None]},
        {**directory, "blocks": []},
        {**directory, "blocks": [{**block, "grams": block["offsets"]}]},
        {**directory, "blocks": [{**block, "postings": [0, "<u2", 1]}]},
        {**directory, "blocks": [{**block, "postings": [0, "<u2", -1]}]},
    ]
    damaged = [{**sections, "text/directory": orjson.dumps(bad)} for bad in bad_directories]
    damaged.append({**sections, "text/arrays": bytes(arrays)})
    damaged.append({**sections, "text/arrays": sections["text/arrays"][:-9]})
    for case in damaged:
        with pytest.raises(Corrupt):
            TextIndex.open(section_source(case))


@settings(deadline=None)
@given(
    section=st.sampled_from(["text/directory", "text/arrays"]),
    place=st.integers(0, 5_000),
    byte=st.integers(0, 255),
)
def test_a_damaged_byte_never_crashes(section: str, place: int, byte: int) -> None:
    documents = some_documents(100, seed=1)
    sections = as_bytes(TextIndex.build(BytesColumn.from_list(documents)).sections())
    damaged = bytearray(sections[section])
    damaged[place % len(damaged)] = byte
    with contextlib.suppress(Corrupt, NewerFormat):
        index = TextIndex.open(section_source({**sections, section: bytes(damaged)}))
        for needle in (b"row50", b"tower", b"#12"):
            rows = index.candidates(needle)
            assert rows is None or not len(rows) or int(rows.max()) < 100


@pytest.mark.parametrize(
    ("pattern", "literal"),
    [
        ("needle", "needle"),
        ("^needle$", "needle"),
        (r"\bneedle\b", "needle"),
        (r"a\.b\*c", "a.b*c"),
        ("abc.*defgh", "defgh"),
        ("abcd+ef", "abcd"),
        ("abcd*ef", "abc"),
        ("abcd?e", "abc"),
        ("abcd{0,2}xyz", "abc"),
        ("abcd{2}+?xyzw", "xyzw"),
        ("abc{,3}", None),
        ("ab{x|yz}tower", None),
        ("日本?", "日"),
        ("(abc)+defg", "defg"),
        ("(a(b|c)[)]d)efg", "efg"),
        (r"(\)abc)efg", "efg"),
        ("(?:abc)def", "def"),
        ("(?P<name>abc)def", "def"),
        ("[]abc]def", "def"),
        ("[^]abc]def", "def"),
        ("[[:alpha:]xyz]def", "def"),
        (r"[\]abc]def", "def"),
        ("abc|def", None),
        ("(?i)needle", None),
        ("(?i:needle)needle", None),
        (r"\Qa.b.c\E", None),
        (r"\x41bcdef", None),
        (r"\pNabc", None),
        (r"\d\d\d", None),
        ("ab", None),
        ("", None),
        ("(", None),
        ("[", None),
        ("abc\\", None),
    ],
)
def test_literals_of_patterns(pattern: str, literal: str | None) -> None:
    found = literal_of(pattern)
    assert found == (None if literal is None else literal.encode())


@settings(deadline=None, max_examples=300)
@given(
    pattern=st.text("abc.+*?()[]{}|^$\\d1,2-:", max_size=14), text=st.text("abc12,{}-", max_size=14)
)
def test_whatever_matches_contains_the_literal(pattern: str, text: str) -> None:
    literal = literal_of("abc" + pattern)
    texts = [text, "abc" + text, f"xabc{text}abc"]
    try:
        matches = BytesColumn.from_list(texts).matches("abc" + pattern)
    except InvalidArgument:
        return
    for candidate, matched in zip(texts, matches.tolist(), strict=True):
        assert not matched or literal is None or literal in candidate.encode()
