"""Schemas of collections, as observed on Chroma 1.5.9's wire."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ochredb.collection_schema import check_filterable, default_schema, schema_with_keys
from ochredb.errors import InvalidArgument, OchreError, Unprocessable
from ochredb.where_parse import parse_where, parse_where_document

from .schemas import (
    CONFLICT,
    DEFAULT_FUNCTION,
    EMPTY,
    HNSW,
    KNOWN,
    LEGACY,
    OFF,
    ON,
    SCHEMA,
    SHAPE,
    on_embedding,
    resolved,
    vector_configs,
    with_keys,
)


def test_default_schema_is_new_each_time() -> None:
    first = default_schema(2)
    assert first == SCHEMA
    first["keys"]["x"] = {}
    assert default_schema(2) == SCHEMA


@pytest.mark.parametrize(
    ("schema", "embedding", "defaults"),
    [
        (on_embedding(), {}, {}),
        (on_embedding(source_key=None, space=None), {}, {}),
        (on_embedding(space="cosine"), {"space": "cosine"}, {}),
        (on_embedding(enabled=False, space="ip"), {"space": "ip"}, {}),
        (on_embedding(hnsw={"ef_search": 7}), {"hnsw": {**HNSW, "ef_search": 7}}, {}),
        (on_embedding(space="ip", spann={"search_nprobe": 3}), {"space": "ip"}, {}),
        (on_embedding(hnsw={}, spann={"ef_search": 200}), {}, {}),
        (on_embedding(embedding_function=LEGACY), {"embedding_function": LEGACY}, {}),
        # Says no more than the default does, so that the configuration (silent here) decides.
        (on_embedding(embedding_function=DEFAULT_FUNCTION), {}, {}),
        (
            {
                "defaults": {"float_list": {"vector_index": {
                    "enabled": False, "config": {"space": "cosine", "hnsw": {"ef_search": 5}}}}},
                "keys": on_embedding(space="ip")["keys"],
            },
            {"space": "ip"},
            {"space": "cosine", "hnsw": {**HNSW, "ef_search": 5}},
        ),
    ],
)  # fmt: skip
def test_a_schema_configures_the_vector_index(
    schema: Any, embedding: dict[str, Any], defaults: dict[str, Any]
) -> None:
    shown, got = resolved(None, schema)
    expected = [{**config, **change} for config, change in
                zip(vector_configs(SCHEMA), (embedding, defaults), strict=True)]  # fmt: skip
    assert list(vector_configs(got)) == expected
    assert shown["hnsw"]["space"] == expected[0]["space"]
    assert shown["hnsw"]["ef_search"] == expected[0]["hnsw"]["ef_search"]
    assert shown["embedding_function"] == expected[0].get("embedding_function")
    index = got["keys"]["#embedding"]["float_list"]["vector_index"]
    given = schema["keys"]["#embedding"]["float_list"]["vector_index"]
    assert index["enabled"] is given["enabled"]


@pytest.mark.parametrize(
    ("types", "stored"),
    [
        ({}, {}),
        ({"bogus": {}, "int": None}, {}),
        ({"string": {"string_inverted_index": OFF}}, {"string": {"string_inverted_index": OFF}}),
        ({"#string": {"$string_inverted_index": OFF}}, {"string": {"string_inverted_index": OFF}}),
        ({"string": {"fts_index": {**OFF, "x": 1}}}, {"string": {"fts_index": OFF}}),
        (
            {"float_list": {"vector_index": {"enabled": False, "config": {"hnsw": {"ef_search": 3},
                                                                          "space": None}}}},
            {"float_list": {"vector_index": {"enabled": False,
                                             "config": {"hnsw": {"ef_search": 3}}}}},
        ),
        (
            {"sparse_vector": {"sparse_vector_index": {"enabled": False, "config": {
                "bm25": True, "source_key": "b", "algorithm": "wand"}}}},
            {"sparse_vector": {"sparse_vector_index": {"enabled": False, "config": {
                "bm25": True, "source_key": "b"}}}},
        ),
    ],
)  # fmt: skip
def test_keys_of_a_schema(types: Any, stored: Any) -> None:
    _, schema = resolved(None, with_keys(a=types))
    assert schema == {**SCHEMA, "keys": {**SCHEMA["keys"], "a": stored}}
    with pytest.raises(InvalidArgument) as refusal:
        resolved({"hnsw": {"space": "ip"}}, with_keys(a=types))
    assert str(refusal.value) == CONFLICT


@pytest.mark.parametrize(
    ("schema", "conflicts"),
    [
        (EMPTY, False),
        (SCHEMA, False),
        (on_embedding(), True),  # No source_key: not what the default says.
        (on_embedding(source_key="#document"), False),
        (on_embedding(source_key="#document", hnsw={"num_threads": 9}), False),
        (on_embedding(source_key="#document", hnsw={"batch_size": 9}), True),
        (on_embedding(source_key="#document", spann={}), False),
        (on_embedding(source_key="#document", embedding_function={"type": "unknown"}), False),
        (on_embedding(source_key="#document", embedding_function=DEFAULT_FUNCTION), False),
        (on_embedding(source_key="#document", embedding_function=LEGACY), True),
        (on_embedding(source_key="#document", space="cosine"), True),
        (with_keys(**{"#document": {"string": {"fts_index": OFF}}}), True),
        ({"defaults": {"int": {"int_inverted_index": OFF}}, "keys": {}}, True),
        ({**EMPTY, "cmek": {"gcp": "projects/p/locations/l/keyRings/k/cryptoKeys/c"}}, True),
    ],
)
def test_schema_and_configuration(schema: Any, conflicts: bool) -> None:
    for configuration, metadata in (
        ({"hnsw": {"space": "ip"}}, None),
        ({"embedding_function": KNOWN}, None),
        (None, {"hnsw:space": "ip"}),
    ):
        if conflicts:
            with pytest.raises(InvalidArgument) as refusal:
                resolved(configuration, schema, metadata)
            assert str(refusal.value) == CONFLICT
        else:
            assert resolved(configuration, schema, metadata) == resolved(
                configuration, None, metadata
            )
    # A configuration that says nothing of its own gives way to the schema.
    assert resolved({"embedding_function": {"type": "unknown"}, "hnsw": {}}, with_keys(a={})) == (
        resolved(None, with_keys(a={}))
    )


@pytest.mark.parametrize(
    ("schema", "error", "message"),
    [
        ({}, Unprocessable, SHAPE + "schema: missing field `defaults`"),
        ({"defaults": {}}, Unprocessable, SHAPE + "schema: missing field `keys`"),
        (
            {"defaults": None, "keys": {}},
            Unprocessable,
            SHAPE + "schema.defaults: invalid type: null, expected struct ValueTypes",
        ),
        (
            {"defaults": {"string": {"string_inverted_index": {"enabled": False}}}, "keys": {}},
            Unprocessable,
            SHAPE + "schema.defaults.string.string_inverted_index: missing field `config`",
        ),
        (
            with_keys(a={"int": {"int_inverted_index": {"enabled": 1, "config": {}}}}),
            Unprocessable,
            SHAPE + "schema.keys.a.int.int_inverted_index.enabled: invalid type: integer `1`, "
            "expected a boolean",
        ),
        (
            with_keys(a={"int": {"int_inverted_index": {"enabled": True, "config": {"x": 1}}}}),
            Unprocessable,
            SHAPE + "schema.keys.a.int.int_inverted_index.config.x: unknown field `x`, "
            "there are no fields",
        ),
        (
            on_embedding(hnsw={"space": "l2"}),
            Unprocessable,
            SHAPE + "schema.keys.#embedding.float_list.vector_index.config.hnsw.space: unknown "
            "field `space`, expected one of `ef_construction`, `max_neighbors`, `ef_search`, "
            "`num_threads`, `batch_size`, `sync_threshold`, `resize_factor`",
        ),
        (
            {"defaults": {"string": {"fts_index": ON}}, "keys": {}},
            InvalidArgument,
            "Validation error: schema: Full text search / regular expression index cannot be "
            "enabled by default. It can only be enabled on #document field.",
        ),
        (
            {"defaults": {"float_list": {"vector_index": ON}}, "keys": {}},
            InvalidArgument,
            "Validation error: schema: Vector index cannot be enabled by default. It can only be "
            "enabled on #embedding field.",
        ),
        (
            with_keys(a={"string": {"fts_index": ON}}),
            InvalidArgument,
            "Validation error: schema: Full text search / regular expression index can only be "
            "enabled on #document field: a",
        ),
        (
            with_keys(a={"float_list": {"vector_index": ON}}),
            InvalidArgument,
            "Validation error: schema: Vector index can only be enabled on #embedding field: a",
        ),
        (
            with_keys(**{"#document": {"string": {"string_inverted_index": ON}}}),
            InvalidArgument,
            "Validation error: schema: String inverted index can not be enabled on #document key: "
            "#document",
        ),
        (
            with_keys(**{"#document": {"int": {}}}),
            InvalidArgument,
            "Validation error: schema: Document field cannot have any value types other than "
            "string: #document",
        ),
        (
            with_keys(**{"#embedding": {"string": {}}}),
            InvalidArgument,
            "Validation error: schema: Embedding field cannot have any value types other than "
            "float_list: #embedding",
        ),
        (
            on_embedding(source_key="a"),
            InvalidArgument,
            "Validation error: schema: Vector index can only source from #document",
        ),
        (
            with_keys(**{"#id": {}}),
            InvalidArgument,
            "Validation error: schema: key cannot begin with '#'. Keys starting with '#' are "
            "reserved for system use: #id",
        ),
        (
            {"defaults": {"sparse_vector": {"sparse_vector_index": ON}}, "keys": {}},
            InvalidArgument,
            "Validation error: schema: Sparse vector index cannot be enabled by default. Please "
            "enable sparse vector index on specific keys. At most one sparse vector index is "
            "allowed for the collection.",
        ),
        (
            with_keys(a={"sparse_vector": {"sparse_vector_index": ON}}),
            InvalidArgument,
            "Failed to reconcile schema: Invalid schema input: Sparse vector indexing is not "
            "enabled in local",
        ),
        (
            with_keys(
                a={"sparse_vector": {"sparse_vector_index": ON}},
                b={"sparse_vector": {"sparse_vector_index": ON}},
            ),
            InvalidArgument,
            "Validation error: schema: At most one sparse vector index is allowed for the "
            'collection: ["a", "b"]',
        ),
        (
            {**EMPTY, "source_attached_function_id": "x"},
            InvalidArgument,
            "Validation error: schema: Cannot set source_attached_function_id. This field is "
            "reserved for system use.",
        ),
        (
            {**EMPTY, "cmek": {"gcp": "x"}},
            InvalidArgument,
            'Validation error: schema: CMEK does not match expected pattern: Gcp("x")',
        ),
        (
            on_embedding(hnsw={"batch_size": 1}),
            InvalidArgument,
            "Failed to reconcile schema: Invalid HNSW configuration: batch_size: Validation error: "
            'range [{"min": Number(2), "value": Number(1)}]',
        ),
    ],
)
def test_refused_schemas(schema: Any, error: type[OchreError], message: str) -> None:
    with pytest.raises(error) as refusal:
        resolved(None, schema)
    assert type(refusal.value) is error
    assert str(refusal.value) == message


def test_resolving_does_not_change_its_arguments() -> None:
    schema = on_embedding(space="ip", spann={}, hnsw={"ef_search": 3})
    before = copy.deepcopy(schema)
    resolved({"hnsw": {}}, schema, {"x": 1})
    assert schema == before


def test_discovered_keys() -> None:
    pairs = {
        ("s", "string"), ("i", "int"), ("f", "float"), ("b", "bool"), ("ls", "string_list"),
        ("li", "int_list"), ("mix", "int"), ("mix", "string_list"), ("mix", "float"),
    }  # fmt: skip
    text = {"fts_index": OFF, "string_inverted_index": ON}
    integer, number = {"int_inverted_index": ON}, {"float_inverted_index": ON}
    before = copy.deepcopy(SCHEMA)
    assert schema_with_keys(SCHEMA, frozenset(pairs)) == {
        **SCHEMA,
        "keys": {
            **SCHEMA["keys"],
            "s": {"string": text},
            "i": {"int": integer},
            "f": {"float": number},
            "b": {"bool": {"bool_inverted_index": ON}},
            "ls": {"string": text},
            "li": {"int": integer},
            "mix": {"int": integer, "string": text, "float": number},
        },
    }
    assert before == SCHEMA


def test_discovered_keys_follow_the_defaults_and_yield_to_the_schema() -> None:
    off = {"string_inverted_index": OFF}
    _, schema = resolved(
        None, {"defaults": {"int": {"int_inverted_index": OFF}}, "keys": {"s": {"string": off}}}
    )
    found = frozenset({("s", "string"), ("s", "int"), ("i", "int")})
    keys = schema_with_keys(schema, found)["keys"]
    assert keys["s"] == {"string": off, "int": {"int_inverted_index": OFF}}
    assert keys["i"] == {"int": {"int_inverted_index": OFF}}


@pytest.mark.parametrize(
    ("where", "key_and_type"),
    [
        ({"s": "x"}, ("s", "Str")),
        ({"i": 1}, ("i", "Int")),
        ({"f": {"$gt": 1.5}}, ("f", "Float")),
        ({"b": {"$ne": True}}, ("b", "Bool")),
        ({"i": {"$in": [1]}}, ("i", "Int")),
        ({"s": {"$nin": ["x"]}}, ("s", "Str")),
        ({"l": {"$contains": "x"}}, ("l", "Str")),
        ({"l": {"$not_contains": True}}, ("l", "Bool")),
        ({"$or": [{"$and": []}, {"$and": [{"zz": 1}]}]}, ("zz", "Int")),
        ({"#document": {"$eq": "x"}}, ("#document", "Str")),
        ({"#document": {"$gt": 1}}, ("#document", "Int")),
        ({"$or": []}, None),
        ({"#id": {"$in": ["x"]}}, None),
        ({"#document": {"$contains": "x"}}, None),
    ],
)
def test_filters_that_need_a_disabled_index(
    where: Any, key_and_type: tuple[str, str] | None
) -> None:
    defaults = {
        name: {f"{name}_inverted_index": OFF} for name in ("string", "int", "float", "bool")
    }
    _, schema = resolved(None, {"defaults": defaults, "keys": {}})
    if key_and_type is None:
        check_filterable(schema, parse_where(where))
        return
    key, type_name = key_and_type
    with pytest.raises(InvalidArgument) as refusal:
        check_filterable(schema, parse_where(where))
    assert str(refusal.value) == (
        f"Cannot filter using metadata key '{key}' with type '{type_name}' because indexing is "
        "disabled"
    )


def test_a_disabled_index_of_one_key_and_type() -> None:
    _, schema = resolved(None, with_keys(s={"string": {"string_inverted_index": OFF}}, t={}))
    for where in (None, {"s": 1}, {"t": "x"}, {"u": "x"}):
        check_filterable(schema, parse_where(where))
    with pytest.raises(InvalidArgument, match="metadata key 's' with type 'Str'"):
        check_filterable(schema, parse_where({"s": "x"}))
    with pytest.raises(InvalidArgument, match="metadata key '#document' with type 'Str'"):
        check_filterable(SCHEMA, parse_where({"#document": "x"}))
    check_filterable(SCHEMA, parse_where({"#document": 1}))


def test_disabled_full_text_search() -> None:
    _, schema = resolved(None, with_keys(**{"#document": {"string": {"fts_index": OFF}}}))
    for operator in ("$contains", "$not_contains", "$regex", "$not_regex"):
        for where in (
            parse_where_document({operator: "x"}),
            parse_where({"#document": {operator: "x"}}),
        ):
            check_filterable(SCHEMA, where)
            with pytest.raises(InvalidArgument) as refusal:
                check_filterable(schema, where)
            assert str(refusal.value) == (
                "Cannot filter using full-text search because FTS indexing is disabled"
            )
