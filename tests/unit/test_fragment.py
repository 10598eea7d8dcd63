"""Fragments: every request survives the bytes, and other bytes are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ochredb.errors import Corrupt, InvalidArgument, NewerFormat
from ochredb.fragment import check, decode, encode
from ochredb.types import Op, Operations

from .kernel import operations

_text = st.text(st.characters(codec="utf-8"), max_size=12)


@st.composite
def _requests(draw: st.DrawFn) -> Operations:
    count = draw(st.integers(1, 6))

    def column(items: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | st.lists(st.none() | items, min_size=count, max_size=count))

    op = draw(st.sampled_from(list(Op)))
    needs_embeddings = op in (Op.ADD, Op.UPSERT)
    embeddings = embedded = None
    if needs_embeddings or draw(st.booleans()):
        floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
        embeddings = draw(
            arrays.arrays(np.float32, (count, draw(st.integers(1, 5))), elements=floats)
        )
        if not needs_embeddings and draw(st.booleans()):
            embedded = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    return Operations(
        op=op,
        ids=draw(st.lists(_text, min_size=count, max_size=count)),
        embeddings=embeddings,
        embedded=embedded,
        documents=column(_text),
        uris=column(_text),
        metadatas=column(st.dictionaries(_text, _text, max_size=3).map(orjson.dumps)),
    )


@settings(deadline=None)
@given(request=_requests())
def test_a_request_survives(request: Operations) -> None:
    again = decode(encode(request))
    assert again.op is request.op
    assert again.ids == request.ids
    assert again.documents == request.documents
    assert again.uris == request.uris
    assert again.metadatas == request.metadatas
    if request.embeddings is None or (request.embedded is not None and not request.embedded.any()):
        assert again.embeddings is None
        return
    assert again.embeddings is not None
    assert again.embeddings.shape == request.embeddings.shape
    mask = np.ones(len(request), np.bool_) if request.embedded is None else request.embedded
    assert again.embeddings[mask].tobytes() == request.embeddings[mask].tobytes()
    found = np.ones(len(request), np.bool_) if again.embedded is None else again.embedded
    assert found.tolist() == mask.tolist()


def test_vectors_are_views_of_the_bytes() -> None:
    data = encode(operations(Op.ADD, ["a"], [[1.0, 2.0]]))
    embeddings = decode(data).embeddings
    assert embeddings is not None
    assert not embeddings.flags.owndata
    start = data.address
    assert start <= embeddings.ctypes.data < start + data.size
    assert embeddings.flags.c_contiguous


@pytest.mark.parametrize("step", [1, 7])
def test_cut_bytes_are_refused(step: int) -> None:
    data = encode(operations(Op.ADD, ["a", "b"], [[1.0], [2.0]], documents=["x", None]))
    whole = data.to_pybytes()
    for length in range(0, len(whole) - 16, 8 * step):
        with pytest.raises(Corrupt):
            decode(whole[:length])


def test_other_bytes_are_refused() -> None:
    for data in (b"", b"nonsense", bytes(100)):
        with pytest.raises(Corrupt, match="not a fragment"):
            decode(data)
    schema = pa.schema([pa.field("id", pa.string())])
    for facts in (
        None,
        {b"op": b"1"},
        {b"ochredb.fragment": b"1"},
        {b"ochredb.fragment": b"1", b"op": b"99"},
        {b"ochredb.fragment": b"one", b"op": b"1"},
    ):
        with pytest.raises(Corrupt):
            decode(_stream(schema.with_metadata(facts)))
    with pytest.raises(NewerFormat, match="format version 2; this OchreDB reads up to 1: install"):
        decode(_stream(schema.with_metadata({b"ochredb.fragment": b"2", b"op": b"1"})))


def _stream(schema: Any) -> Any:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(["a"])], schema=schema))
    return sink.getvalue()


def test_an_empty_request_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        encode(operations(Op.DELETE, []))


def test_what_could_never_be_folded_is_refused() -> None:
    check(operations(Op.UPDATE, ["a"]))
    check(operations(Op.DELETE, ["a"]))
    check(operations(Op.UPDATE, ["a", "b"], [[1.0], [2.0]], embedded=[True, False]))
    check(operations(Op.ADD, ["a"], [[1.0]], embedded=[True]))
    for request in (
        operations(Op.ADD, ["a"]),
        operations(Op.UPSERT, ["a", "b"], [[1.0], [2.0]], embedded=[True, False]),
        operations(Op.UPDATE, ["a"], np.zeros((1, 0))),
    ):
        with pytest.raises(InvalidArgument):
            check(request)
