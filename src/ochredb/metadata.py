"""Metadata of collections and of records: what is allowed, how it is stored, how updates merge.

A record's metadata is stored as one JSON object in bytes (None: no metadata). Its values are
strings, int64, float64, booleans, or lists of one of them. Integers beyond int64 become floats; a
list that mixes integers and floats becomes floats; an empty list is the absence of its key.
Refusals are rest-contract's: 422 for a wrong shape, 400 for a wrong key, 501 for sparse vectors.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import orjson

from ochredb.errors import InvalidArgument, Unimplemented
from ochredb.json_shape import expect_map, wrong_shape

DOCUMENT_KEY = "chroma:document"  # Chroma's own name for the document inside metadata: reserved.
SPARSE_VECTOR = "sparse_vector"  # The type name of sparse vectors, in values and in schemas.

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
UINT32_MAX = 2**32 - 1

_SCALARS: dict[type, str] = {str: "string", int: "int", float: "float", bool: "bool"}


def encode_metadatas(
    items: list[Any], *, allow_null_values: bool
) -> tuple[list[bytes | None], frozenset[tuple[str, str]]]:
    """Check and encode the metadatas of one request.

    items: n parsed JSON values, each an object or None.
    allow_null_values: update and upsert, where a null (or an empty list) removes its key.

    Returns n JSON objects as bytes (None: nothing given) and the (key, type) pairs in them, types
    as in `METADATA_TYPES`.
    Raises Unprocessable (wrong shape), InvalidArgument (wrong key, malformed sparse vector),
    Unimplemented (sparse vector); the whole request is looked at before the latter two.
    Cost: about 0.4 µs per record of three scalars that has the keys and types of an earlier one.
    """
    encoder = _Encoder(allow_null_values)
    # Records of one request are mostly of one shape: the same keys with the same types of scalars.
    # A shape is checked once; after that only the range of its integers can be wrong.
    integer_keys_of: dict[tuple[Any, ...], tuple[str, ...]] = {}
    integer_keys_get, int_min, int_max = integer_keys_of.get, INT64_MIN, INT64_MAX
    outgoing = list(items)
    absent = False
    for index, item in enumerate(items):
        if type(item) is dict:
            shape = (*item, *map(type, item.values()))
            if (integer_keys := integer_keys_get(shape)) is not None:
                for key in integer_keys:
                    if not int_min <= item[key] <= int_max:
                        break
                else:
                    continue
        checked = None if item is None else encoder.check(item, index)
        outgoing[index] = checked or None
        if not checked:
            absent = True
        elif tuple(map(type, checked.values())) == shape[len(item) :] and _SCALARS.keys() >= set(
            shape[len(item) :]
        ):
            integer_keys_of[shape] = tuple(key for key, value in item.items() if type(value) is int)
    encoder.raise_refusals()
    encoded: list[bytes | None]
    if absent:
        encoded = [None if item is None else orjson.dumps(item) for item in outgoing]
    else:
        encoded = list(map(orjson.dumps, outgoing))
    return encoded, frozenset(encoder.key_types)


class _Encoder:
    """Checks one object at a time; remembers the types seen and the first refusal of each kind."""

    def __init__(self, allow_null_values: bool) -> None:
        self._allow_null_values = allow_null_values
        self._invalid: str | None = None
        self._sparse_key: str | None = None
        self.key_types: set[tuple[str, str]] = set()

    def check(self, item: Any, index: int) -> dict[str, Any]:
        """The object to store. Raises Unprocessable at once; other refusals wait."""
        checked: dict[str, Any] = {}
        for key, value in expect_map(item, f"metadatas[{index}]").items():
            if key_problem(key) is not None:
                self._refuse(f"Invalid metadata at index {index}")
            elif key == DOCUMENT_KEY:
                self._refuse(f"Invalid metadata at index {index}: the key '{key}' is reserved")
            value_type, value = self._value(value, key, index)
            if value_type is not None:
                self.key_types.add((key, value_type))
            if value is not None or self._allow_null_values:
                checked[key] = value
        return checked

    def _value(self, value: Any, key: str, index: int) -> tuple[str | None, Any]:
        """Its type and the value as stored; (None, None) for what means "no value"."""
        if type(value) in _SCALARS:
            scalar = to_int64_or_float(value)
            return _SCALARS[type(scalar)], scalar
        if value is None and self._allow_null_values:
            return None, None
        if type(value) is list:
            if not value:
                return None, None
            if (checked := _homogeneous(value)) is not None:
                return f"{_SCALARS[type(checked[0])]}_list", checked
        if type(value) is dict and is_sparse_vector(value):
            if sparse_vector_problem(value) is not None:
                self._refuse(f"Invalid metadata at index {index}")
            elif self._sparse_key is None:
                self._sparse_key = key
            return None, None
        enum = "UpdateMetadataValue" if self._allow_null_values else "MetadataValue"
        raise wrong_shape(
            f"metadatas[{index}].{key}", f"data did not match any variant of untagged enum {enum}"
        )

    def _refuse(self, problem: str) -> None:
        if self._invalid is None:
            self._invalid = problem

    def raise_refusals(self) -> None:
        if self._invalid is not None:
            raise InvalidArgument(f"Validation error: metadatas: {self._invalid}")
        if self._sparse_key is not None:
            raise Unimplemented(
                "Unimplemented: Sparse vector is not supported for local chroma: "
                f"{self._sparse_key}"
            )


def merge_metadata(base: bytes | None, change: bytes | None) -> bytes | None:
    """`base` with the keys of `change` put over it; a null removes its key.

    Both are JSON objects as bytes, as `encode_metadatas` makes them; None: no metadata, or no
    change. Returns None if nothing is left.
    Cost: about 1 µs for small objects; none where one side is absent and `change` holds no null.
    """
    if change is None:
        return base
    if base is None and b"null" not in change:
        return change
    merged: dict[str, Any] = {} if base is None else orjson.loads(base)
    for key, value in orjson.loads(change).items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return orjson.dumps(merged) if merged else None


def check_collection_metadata(metadata: Any, field: str = "metadata") -> dict[str, Any] | None:
    """The metadata of a collection as stored, from a create or modify request.

    field: `metadata`, or `new_metadata`, in which null values are dropped, so that the result may
        be empty: then the collection has no metadata from now on.
    Returns None if none was given.

    Raises Unprocessable (not an object, a nested object, a null in `metadata`) and InvalidArgument
    (empty, a key that is empty or starts with # or $, a list or sparse vector as value).
    """
    if metadata is None:
        return None
    checked: dict[str, Any] = {}
    problem = None if expect_map(metadata, field) else "Metadata cannot be empty"
    for key, value in metadata.items():
        problem = problem or key_problem(key)
        if type(value) in _SCALARS:
            checked[key] = to_int64_or_float(value)
        elif type(value) is list and (not value or _homogeneous(value) is not None):
            problem = problem or f"Lists are not supported in the metadata of collections: {key}"
        elif type(value) is dict and is_sparse_vector(value):
            problem = problem or sparse_vector_problem(value)
            problem = problem or f"Sparse vectors are not supported as collection metadata: {key}"
        elif value is not None or field == "metadata":
            raise wrong_shape(
                f"{field}.{key}", "data did not match any variant of untagged enum MetadataValue"
            )
    if problem is not None:
        raise InvalidArgument(f"Validation error: {field}: {problem}")
    return checked


def key_problem(key: str) -> str | None:
    """Why a metadata key is refused, or None."""
    if key == "":
        return "Metadata key cannot be empty"
    if key[0] in "#$":
        return f"Metadata key cannot start with '#' or '$': {key}"
    return None


def to_int64_or_float(value: Any) -> Any:
    """A scalar as stored: an integer beyond int64 becomes the nearest float."""
    if type(value) is int and not INT64_MIN <= value <= INT64_MAX:
        return float(value)
    return value


def _homogeneous(values: list[Any]) -> list[Any] | None:
    """A non-empty list with elements of one scalar type, integers widened if needed; else None."""
    converted = [to_int64_or_float(value) for value in values]
    types = set(map(type, converted))
    if types == {int, float}:
        return [float(value) for value in converted]
    return converted if len(types) == 1 and types <= _SCALARS.keys() else None


def is_sparse_vector(value: dict[str, Any]) -> bool:
    """Whether an object has the shape of a sparse vector, well formed or not."""
    indices, values, tokens = value.get("indices"), value.get("values"), value.get("tokens")
    return (
        value.get("#type", SPARSE_VECTOR) == SPARSE_VECTOR
        and isinstance(indices, list)
        and isinstance(values, list)
        and all(type(index) is int and 0 <= index <= UINT32_MAX for index in indices)
        and all(type(number) in (int, float) for number in values)
        and (tokens is None or isinstance(tokens, list))
        and all(type(token) is str for token in tokens or ())
    )


def sparse_vector_problem(value: dict[str, Any]) -> str | None:
    """Why an object of a sparse vector's shape is not a sparse vector, or None."""
    indices, values, tokens = value["indices"], value["values"], value.get("tokens")
    if len(indices) != len(values) or (tokens is not None and len(tokens) != len(indices)):
        return "Invalid sparse vector: indices, values and tokens must have equal lengths"
    if any(later <= earlier for earlier, later in pairwise(indices)):
        return (
            "Invalid sparse vector: Sparse vector indices must be sorted in strictly ascending "
            "order (no duplicates)"
        )
    return None
