"""What goes through the wire comes back equal, to the type and the last bit."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochredb.errors import InvalidArgument, Unavailable
from ochredb.explain import PlanStep
from ochredb.peers import GetRequest, PartsAnswer, PartsRequest, QueryRequest
from ochredb.proto.v1 import compactor_pb2, log_pb2, query_pb2
from ochredb.rpc import filters, operations, reads
from ochredb.rpc.columns import (
    answers_of,
    columns_of,
    names_from_bytes,
    strings_from_bytes,
    strings_to_bytes,
)
from ochredb.testing import strategies
from ochredb.types import Field, Op, Operations, QueryAnswer, Records, Snapshot
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
from ochredb.where_parse import DEPTH_MAX, combine, parse_where

from .kernel import ROOT

_characters = st.characters(exclude_categories=["Cs"])
_text = st.text(_characters, max_size=8)
_integers = st.one_of(st.integers(-(2**63), 2**63 - 1), strategies.integers)
_floats = st.one_of(st.floats(allow_nan=False), strategies.floats)
_scalars = st.one_of(_text, _integers, _floats, st.booleans())
_orderings = st.sampled_from(["$eq", "$ne", "$gt", "$gte", "$lt", "$lte"])
_leaves: st.SearchStrategy[Where] = st.one_of(
    st.builds(Compare, _text, _orderings, _scalars),
    st.builds(
        OneOf,
        _text,
        st.one_of(
            *(
                st.lists(kind, min_size=1, max_size=5).map(tuple)
                for kind in (_text, _integers, _floats, st.booleans())
            )
        ),
        st.booleans(),
    ),
    st.builds(ListContains, _text, _scalars, st.booleans()),
    st.builds(DocumentContains, _text, st.booleans()),
    st.builds(DocumentMatches, _text, st.booleans()),
    st.builds(IdIn, st.lists(_text, max_size=5).map(tuple), st.booleans()),
)
_wheres: st.SearchStrategy[Where] = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.builds(And, st.lists(inner, max_size=4).map(tuple)),
        st.builds(Or, st.lists(inner, max_size=4).map(tuple)),
    ),
    max_leaves=12,
)


def _through(where: Where) -> Where:
    message = filters.encode(where)
    assert message is not None
    return filters.decode(query_pb2.Filter.FromString(message.SerializeToString()))


@settings(max_examples=200, deadline=None)
@given(_wheres)
def test_any_filter_comes_back_equal(where: Where) -> None:
    back = _through(where)
    assert back == where
    assert repr(back) == repr(where), "1, 1.0, True and -0.0 are different values"


def test_numbers_keep_their_type_and_their_bits() -> None:
    for value in (0, 1, True, False, -(2**63), 2**63 - 1, 2**53 + 1, 0.0, -0.0, 5e-324, 1e308):
        back = _through(Compare("k", "$eq", value))
        assert isinstance(back, Compare)
        assert type(back.value) is type(value)
        if isinstance(value, float):
            assert struct.pack("<d", back.value) == struct.pack("<d", value)
    for infinite in (math.inf, -math.inf):
        assert _through(OneOf("k", (infinite,), False)) == OneOf("k", (infinite,), False)


def test_filters_as_deep_and_as_long_as_they_may_be() -> None:
    deep: Any = {"k": 1}
    for _ in range(DEPTH_MAX):
        deep = {"$and": [deep, {"j": {"$ne": 2}}]}
    parsed = parse_where(deep)
    assert parsed is not None
    # Two filters that were combined are deeper than one may be.
    both = combine(parsed, parsed)
    assert both is not None
    assert _through(both) == both
    long = OneOf("k", tuple(range(100_000)), negated=True)
    assert _through(long) == long
    ids = IdIn(tuple(f"id-{number}" for number in range(100_000)), negated=False)
    assert _through(ids) == ids


def test_filters_that_are_none() -> None:
    assert filters.encode(None) is None
    node = query_pb2.FilterNode(all_of=2)
    leaf = query_pb2.FilterNode(document_contains=query_pb2.Pattern(text="x"))
    for nodes in ([], [node], [node, leaf], [leaf, leaf], [query_pb2.FilterNode()]):
        with pytest.raises(InvalidArgument):
            filters.decode(query_pb2.Filter(nodes=nodes))
    unknown = query_pb2.Compare(key="k", op="$like", value=query_pb2.Scalar(text="x"))
    with pytest.raises(InvalidArgument, match=r"\$like"):
        filters.decode(query_pb2.Filter(nodes=[query_pb2.FilterNode(compare=unknown)]))


# -- columns


@given(st.lists(st.one_of(st.none(), st.text(_characters))))
def test_strings_come_back(values: list[str | None]) -> None:
    assert strings_from_bytes(*strings_to_bytes(values)) == values


def test_columns_that_do_not_fit_are_refused() -> None:
    lengths, joined = strings_to_bytes(["one", "two", "größe"])
    for damaged in (joined[:-1], joined + b"x", joined.replace(b"\xc3\xb6", b"oo") + b"x"):
        with pytest.raises(Unavailable, match="damaged"):
            strings_from_bytes(lengths, damaged)
    with pytest.raises(Unavailable, match="gaps"):
        names_from_bytes(*strings_to_bytes(["a", None]))
    with pytest.raises(Unavailable, match="cut"):
        columns_of([])


_columns = st.dictionaries(
    st.sampled_from(["ids", "documents", "embeddings", "splits", "plan_json"]),
    st.binary(max_size=40),
)


@given(_columns, st.integers(1, 50), st.integers(0, 5))
def test_pieces_are_put_together(columns: dict[str, bytes], chunk_bytes: int, number: int) -> None:
    given_columns: dict[str, Any] = dict(columns)
    if number:
        given_columns["last_offset"] = number
    messages = [
        query_pb2.Answer.FromString(each.SerializeToString())
        for each in answers_of(dict(given_columns), chunk_bytes)
    ]
    assert columns_of(messages) == given_columns
    sizes = [sum(len(v) for _, v in m.ListFields() if isinstance(v, bytes)) for m in messages]
    assert all(size <= chunk_bytes for size in sizes)


# -- requests and answers

_optional_ids = st.one_of(st.none(), st.lists(_text, max_size=3))
_fields = st.integers(0, 15).map(Field)


@given(
    st.builds(
        GetRequest,
        ids=_optional_ids,
        where=st.one_of(st.none(), _wheres),
        limit=st.one_of(st.none(), st.integers(0, 2**40)),
        offset=st.integers(0, 2**40),
        fields=_fields,
        explain=st.booleans(),
    )
)
@settings(deadline=None)
def test_gets_come_back(request: GetRequest) -> None:
    message = reads.encode_get("c", request)
    assert reads.decode_get(query_pb2.GetRequest.FromString(message.SerializeToString())) == request
    assert message.collection_id == "c"


def _query(**more: Any) -> QueryRequest:
    vectors = np.array([[1.5, -0.0, np.inf], [np.nan, 3e38, 1e-45]], np.float32)
    return QueryRequest(embeddings=vectors, **more)


@pytest.mark.parametrize(
    "request_",
    [
        _query(),
        _query(n_results=0, ids=[], fields=Field.NONE),
        _query(ids=["a", "ä"], exact=True, explain=True, target_recall=0.0),
        _query(where=Compare("k", "$gt", 1), target_recall=0.123456789),
        QueryRequest(embeddings=np.empty((0, 5), np.float32)),
    ],
)
def test_queries_come_back(request_: QueryRequest) -> None:
    _assert_same_query(_query_through(request_), request_)


def _query_through(request: QueryRequest) -> QueryRequest:
    message = reads.encode_query("c", request).SerializeToString()
    return reads.decode_query(query_pb2.QueryRequest.FromString(message))


def _assert_same_query(back: QueryRequest, request: QueryRequest) -> None:
    assert back.embeddings.dtype == np.float32
    assert back.embeddings.shape == request.embeddings.shape
    assert back.embeddings.tobytes() == request.embeddings.tobytes()
    for name in ("n_results", "ids", "where", "fields", "exact", "explain", "target_recall"):
        assert getattr(back, name) == getattr(request, name)


@pytest.mark.parametrize("dimension", [None, 3])
def test_shares_come_back(dimension: int | None) -> None:
    snapshot = Snapshot(
        collection_id="c", state="live", revision=3, dimension=dimension, version=2**40,
        indexed_offset=5, next_offset=9, floor_offset=1,
    )  # fmt: skip
    for inner in (GetRequest(limit=3, where=Or(())), _query()):
        request = PartsRequest(
            snapshot=snapshot, part_ids=("p1", "p2"), request=inner, keys_only=True
        )
        message = reads.encode_parts("c", request).SerializeToString()
        collection, back = reads.decode_parts(query_pb2.SearchPartsRequest.FromString(message))
        assert (collection, back.snapshot, back.part_ids) == ("c", snapshot, ("p1", "p2"))
        assert back.keys_only
        if isinstance(inner, GetRequest):
            assert back.request == inner
        else:
            assert isinstance(back.request, QueryRequest)
            _assert_same_query(back.request, inner)


def _records() -> Records:
    return Records(
        ids=["a", "b", "ç"],
        documents=["x", None, ""],
        metadatas=[None, b"{}", b'{"k":1.0}'],
        embeddings=np.arange(6, dtype=np.float32).reshape(3, 2),
    )


def _answer_through(columns: dict[str, Any]) -> dict[str, Any]:
    messages = [each.SerializeToString() for each in answers_of(columns, 11)]
    return columns_of(query_pb2.Answer.FromString(each) for each in messages)


@pytest.mark.parametrize("distances", [True, False])
def test_answers_of_shares_come_back(distances: bool) -> None:
    numbers = np.array([np.inf, np.nan, -0.0], np.float32) if distances else None
    plan = PlanStep("Share", {"rows": 3, "cached": None}, 1.5, [PlanStep("Scan")])
    answer = PartsAnswer(_records(), [0, 1, 3], np.array([1, 2**62, 3]), numbers, True, plan)
    back = reads.decode_parts_answer(_answer_through(reads.encode_parts_answer(answer)))
    assert (back.splits, back.any_lives, back.plan) == ([0, 1, 3], True, plan)
    assert back.seqs.tolist() == [1, 2**62, 3]
    assert (back.distances is None) == (numbers is None)
    if back.distances is not None and numbers is not None:
        assert back.distances.tobytes() == numbers.tobytes()
    _assert_same_records(back.records, answer.records)
    empty = PartsAnswer(Records(), [0], np.empty(0, np.int64))
    back = reads.decode_parts_answer(_answer_through(reads.encode_parts_answer(empty)))
    assert (back.splits, back.seqs.tolist(), back.distances) == ([0], [], None)
    assert (back.any_lives, back.plan, back.records.ids) == (False, None, [])


def _assert_same_records(back: Records, records: Records) -> None:
    for name in ("ids", "documents", "uris", "metadatas", "plan"):
        assert getattr(back, name) == getattr(records, name)
    assert (back.embeddings is None) == (records.embeddings is None)
    if back.embeddings is not None and records.embeddings is not None:
        assert back.embeddings.shape == records.embeddings.shape
        assert back.embeddings.tobytes() == records.embeddings.tobytes()


def test_answers_of_several_vectors_come_back() -> None:
    first, second = _records(), _records()
    second.ids = ["d", "e", "f"]
    none = Records(ids=[], documents=[], metadatas=[], embeddings=np.empty((0, 2), np.float32))
    numbers = [np.array(each, np.float32) for each in ([1, 2, 3], [], [4, 5, np.nan])]
    for records, distances in (
        ([first, none, second], numbers),
        ([first], numbers[:1]),
        ([none], numbers[1:2]),
        ([], []),
    ):
        answer = QueryAnswer(records, distances, PlanStep("Query"))
        back = reads.decode_answer(_answer_through(reads.encode_answer(answer)))
        assert len(back.records) == len(records)
        for got, wanted in zip(back.records, records, strict=True):
            _assert_same_records(got, wanted)
        assert [each.tobytes() for each in back.distances] == [d.tobytes() for d in distances]
        assert back.plan == PlanStep("Query")


def test_operations_come_back() -> None:
    request = Operations(
        op=Op.UPDATE,
        ids=["a", "ä"],
        embeddings=np.array([[1, 2], [3, 4]], np.float32),
        embedded=np.array([True, False]),
        documents=["x", None],
        uris=[None, "u"],
        metadatas=[b'{"k":null}', None],
        key_types=frozenset({("k", "int"), ("k", "float"), ("größe", "string_list")}),
    )
    message = operations.encode(request).SerializeToString()
    back = operations.decode(log_pb2.Operations.FromString(message))
    assert back is not None
    for name in ("op", "ids", "documents", "uris", "metadatas", "key_types"):
        assert getattr(back, name) == getattr(request, name)
    assert back.embedded is not None
    assert back.embedded.tolist() == [True, False]
    again = operations.encode(back)
    assert again.fragment == log_pb2.Operations.FromString(message).fragment
    nothing = operations.encode(Operations(op=Op.DELETE, ids=[]))
    assert operations.decode(nothing) is None


# -- two releases


def _wire() -> list[str]:
    """Every method and field, as another release knows them."""
    lines = []
    for module in (log_pb2, query_pb2, compactor_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            lines += [
                f"{service.name}.{method.name}: {method.client_streaming:d}"
                f"{method.server_streaming:d} {method.input_type.name} {method.output_type.name}"
                for method in service.methods
            ]
        for message in module.DESCRIPTOR.message_types_by_name.values():
            lines += [
                f"{message.name}.{field.name} = {field.number}: {field.type}"
                f"{' repeated' if field.is_repeated else ''}"
                for field in message.fields
            ]
    return sorted(lines)


def test_what_another_release_says_is_still_understood() -> None:
    """tests/golden/rpc-1.txt: methods and fields of version 1. Lines are added, never changed."""
    known = (ROOT / "tests" / "golden" / "rpc-1.txt").read_text().splitlines()
    missing = sorted(set(known) - set(_wire()))
    assert not missing, f"renamed, renumbered or retyped: {missing}"
    added = sorted(set(_wire()) - set(known))
    assert not added, f"add to tests/golden/rpc-1.txt: {added}"
