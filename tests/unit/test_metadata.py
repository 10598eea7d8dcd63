"""Metadata rules as observed on Chroma 1.5.9's wire, except where it drops the connection."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from ochredb.errors import InvalidArgument, OchreError, Unimplemented, Unprocessable
from ochredb.metadata import check_collection_metadata, encode_metadatas, merge_metadata

INVALID = "Validation error: metadatas: Invalid metadata at index 0"
SPARSE = {"#type": "sparse_vector", "indices": [1, 3], "values": [0.5, 1.0]}
WRONG_VARIANT = (
    "Failed to deserialize the JSON body into the target type: metadatas[0].a: "
    "data did not match any variant of untagged enum "
)


def encode(item: Any, *, update: bool = False) -> tuple[bytes | None, frozenset[tuple[str, str]]]:
    encoded, key_types = encode_metadatas([item], allow_null_values=update)
    return encoded[0], key_types


@pytest.mark.parametrize(
    ("item", "stored", "value_type"),
    [
        ({"a": "x"}, b'{"a":"x"}', "string"),
        ({"a": ""}, b'{"a":""}', "string"),
        ({"a": 1}, b'{"a":1}', "int"),
        ({"a": -(2**63)}, b'{"a":-9223372036854775808}', "int"),
        ({"a": 2**63 - 1}, b'{"a":9223372036854775807}', "int"),
        ({"a": 2**63}, b'{"a":9.223372036854775807e18}', "float"),
        ({"a": 2**64 - 1}, b'{"a":1.8446744073709552e19}', "float"),
        ({"a": -(2**63) - 1}, b'{"a":-9.223372036854775807e18}', "float"),
        ({"a": 1.0}, b'{"a":1.0}', "float"),
        ({"a": True}, b'{"a":true}', "bool"),
        ({"a": ["x", ""]}, b'{"a":["x",""]}', "string_list"),
        ({"a": [1, 2]}, b'{"a":[1,2]}', "int_list"),
        ({"a": [1, 2.5]}, b'{"a":[1.0,2.5]}', "float_list"),
        ({"a": [2.5, 1]}, b'{"a":[2.5,1.0]}', "float_list"),
        ({"a": [1, 2**63]}, b'{"a":[1.0,9.223372036854775807e18]}', "float_list"),
        ({"a": [True, False]}, b'{"a":[true,false]}', "bool_list"),
        ({"a$": 1}, b'{"a$":1}', "int"),
        ({"a\x00b": 1}, b'{"a\\u0000b":1}', "int"),
    ],
)
def test_stored_values(item: dict[str, Any], stored: bytes, value_type: str) -> None:
    for update in (False, True):
        encoded, key_types = encode(item, update=update)
        assert encoded is not None
        (got,), (expected,) = orjson.loads(encoded).values(), orjson.loads(stored).values()
        assert orjson.dumps(got) == orjson.dumps(expected)  # JSON types and all.
        assert key_types == {(next(iter(item)), value_type)}


def test_what_counts_as_no_metadata() -> None:
    assert encode(None) == encode({}) == encode({"a": []}) == (None, frozenset())
    assert encode({"a": [], "b": 1}) == (b'{"b":1}', frozenset({("b", "int")}))
    assert encode(None, update=True) == encode({}, update=True) == (None, frozenset())


def test_in_an_update_null_and_the_empty_list_remove_a_key() -> None:
    assert encode({"a": None}, update=True) == (b'{"a":null}', frozenset())
    assert encode({"a": [], "b": 1}, update=True) == (
        b'{"a":null,"b":1}',
        frozenset({("b", "int")}),
    )


@pytest.mark.parametrize(
    "value",
    [
        [1, "x"], [True, 1], [None], [[1]], [{"x": 1}], {"b": 1}, {}, {"indices": [1]},
        {"indices": [-1], "values": [1]}, {"indices": [1.5], "values": [1]},
        {"indices": [2**32], "values": [1]}, {"indices": [1], "values": ["x"]},
        {"#type": "bogus", "indices": [1], "values": [1]}, {"#type": "sparse_vector"},
    ],
)  # fmt: skip
def test_wrong_shapes(value: Any) -> None:
    with pytest.raises(Unprocessable) as refusal:
        encode({"a": value})
    assert str(refusal.value) == WRONG_VARIANT + "MetadataValue"
    with pytest.raises(Unprocessable) as refusal:
        encode({"a": value}, update=True)
    assert str(refusal.value) == WRONG_VARIANT + "UpdateMetadataValue"


def test_null_values_are_for_updates() -> None:
    with pytest.raises(Unprocessable) as refusal:
        encode({"a": None})
    assert str(refusal.value) == WRONG_VARIANT + "MetadataValue"


@pytest.mark.parametrize(
    ("item", "words"), [("x", 'string "x"'), (1, "integer `1`"), ([], "sequence")]
)
def test_items_that_are_no_objects(item: Any, words: str) -> None:
    with pytest.raises(Unprocessable) as refusal:
        encode(item)
    assert str(refusal.value) == (
        "Failed to deserialize the JSON body into the target type: metadatas[0]: "
        f"invalid type: {words}, expected a map"
    )


@pytest.mark.parametrize(
    "item",
    [
        {"": 1},
        {"#a": 1},
        {"$a": 1},
        {"#": 1},
        {"a": 1, "#b": 1},
        {"a": {"indices": [3, 1], "values": [0.5, 1]}},
        {"a": {"indices": [1, 1], "values": [0.5, 1]}},
        {"a": {"indices": [1], "values": [0.5, 1]}},
        {"a": {**SPARSE, "tokens": ["x"]}},
        {"a": SPARSE, "#b": 1},
    ],
)
def test_invalid_metadata(item: dict[str, Any]) -> None:
    for update in (False, True):
        with pytest.raises(InvalidArgument) as refusal:
            encode(item, update=update)
        assert str(refusal.value) == INVALID


def test_null_does_not_excuse_a_reserved_key() -> None:
    for key in ("", "#a", "$a"):
        with pytest.raises(InvalidArgument, match="index 0"):
            encode({key: None}, update=True)


def test_the_index_is_that_of_the_first_invalid_item() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        encode_metadatas([{"a": 1}, None, {"#a": 1}, {"$b": 2}], allow_null_values=False)
    assert str(refusal.value) == "Validation error: metadatas: Invalid metadata at index 2"


def test_a_wrong_shape_anywhere_goes_first() -> None:
    with pytest.raises(Unprocessable):
        encode_metadatas([{"#a": 1}, {"a": SPARSE}, {"a": [1, "x"]}], allow_null_values=False)


@pytest.mark.parametrize(
    "value", [SPARSE, {"indices": [1], "values": [1]}, {"indices": [], "values": []}]
)
def test_sparse_vectors_are_not_offered_yet(value: dict[str, Any]) -> None:
    for update in (False, True):
        with pytest.raises(Unimplemented) as refusal:
            encode({"a": value}, update=update)
        assert str(refusal.value) == (
            "Unimplemented: Sparse vector is not supported for local chroma: a"
        )


def test_the_document_key_is_reserved() -> None:
    with pytest.raises(InvalidArgument, match="index 0: the key 'chroma:document' is reserved"):
        encode({"chroma:document": "x"})


def test_records_of_one_shape_are_each_checked() -> None:
    """The first record of a shape is checked in full; the others must not slip through."""
    encoded, key_types = encode_metadatas(
        [{"a": 1, "b": "x"}, {"a": 2**63, "b": "y"}, {"a": 2, "b": "z"}, {"a": True, "b": "w"}],
        allow_null_values=False,
    )
    assert [orjson.loads(item or b"") for item in encoded] == [
        {"a": 1, "b": "x"},
        {"a": float(2**63), "b": "y"},
        {"a": 2, "b": "z"},
        {"a": True, "b": "w"},
    ]
    assert key_types == {("a", "int"), ("a", "float"), ("a", "bool"), ("b", "string")}


def test_a_shape_that_was_converted_is_not_taken_for_checked() -> None:
    _, key_types = encode_metadatas([{"a": 2**63}, {"a": 1}], allow_null_values=False)
    assert key_types == {("a", "int"), ("a", "float")}
    encoded, _ = encode_metadatas([{"a": [1, 2.5]}, {"a": [1, 2]}], allow_null_values=False)
    assert encoded == [b'{"a":[1.0,2.5]}', b'{"a":[1,2]}']
    with pytest.raises(Unprocessable):
        encode_metadatas([{"a": [1]}, {"a": [1, "x"]}], allow_null_values=False)
    with pytest.raises(Unprocessable):
        encode_metadatas([{"a": 1, "b": []}, {"a": 1, "b": {}}], allow_null_values=False)


@pytest.mark.parametrize(
    ("base", "change", "merged"),
    [
        (None, None, None),
        (None, b'{"a":1}', b'{"a":1}'),
        (b'{"a":1}', None, b'{"a":1}'),
        (b'{"a":1,"b":2}', b'{"a":null}', b'{"b":2}'),
        (b'{"a":1}', b'{"a":null}', None),
        (None, b'{"a":null}', None),
        (None, b'{"a":1,"b":null}', b'{"a":1}'),
        (None, b'{"a":"null"}', b'{"a":"null"}'),
        (b'{"a":[1]}', b'{"a":2}', b'{"a":2}'),
        (b'{"a":1}', b'{"a":1.0}', b'{"a":1.0}'),
        (b'{"a":[1,2]}', b'{"a":[3],"b":true}', b'{"a":[3],"b":true}'),
    ],
)
def test_merge(base: bytes | None, change: bytes | None, merged: bytes | None) -> None:
    assert merge_metadata(base, change) == merged


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({}, InvalidArgument, "Validation error: metadata: Metadata cannot be empty"),
        ({"": 1}, InvalidArgument, "Validation error: metadata: Metadata key cannot be empty"),
        (
            {"#a": 1},
            InvalidArgument,
            "Validation error: metadata: Metadata key cannot start with '#' or '$': #a",
        ),
        (
            {"a": {"indices": [2, 1], "values": [1, 2]}},
            InvalidArgument,
            "Validation error: metadata: Invalid sparse vector: Sparse vector indices must be "
            "sorted in strictly ascending order (no duplicates)",
        ),
        (
            {"a": None},
            Unprocessable,
            "Failed to deserialize the JSON body into the target type: metadata.a: "
            "data did not match any variant of untagged enum MetadataValue",
        ),
        (
            [],
            Unprocessable,
            "Failed to deserialize the JSON body into the target type: metadata: "
            "invalid type: sequence, expected a map",
        ),
    ],
)
def test_refused_collection_metadata(metadata: Any, error: type[OchreError], message: str) -> None:
    with pytest.raises(error) as refusal:
        check_collection_metadata(metadata)
    assert type(refusal.value) is error
    assert str(refusal.value) == message


@pytest.mark.parametrize("value", [[1], [], ["x"], SPARSE])
def test_collection_metadata_is_scalar(value: Any) -> None:
    """Chroma's server drops the connection here."""
    with pytest.raises(InvalidArgument, match=r"^Validation error: metadata: .*: a$"):
        check_collection_metadata({"a": value})


def test_accepted_collection_metadata() -> None:
    assert check_collection_metadata(None) is None
    given = {"a": "x", "b": 1.0, "c": True, "hnsw:space": "l2", "chroma:document": "x"}
    assert check_collection_metadata(given) == given
    assert repr(check_collection_metadata({"a": 2**63})) == repr({"a": float(2**63)})


def test_null_in_new_metadata_is_dropped() -> None:
    assert check_collection_metadata({"a": None, "b": 1}, "new_metadata") == {"b": 1}
    assert check_collection_metadata({"a": None}, "new_metadata") == {}
    with pytest.raises(InvalidArgument, match="new_metadata: Metadata cannot be empty"):
        check_collection_metadata({}, "new_metadata")
