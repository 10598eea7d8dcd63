"""The schema JSON of a collection: which index each metadata key and type has.

A schema has `defaults` (by value type) and `keys` (overrides by metadata key, then value type; also
the built-in `#document` and `#embedding`). A value type has indexes; an index has `enabled` and
`config`. It is stored and returned as JSON, so it is handled here as parsed JSON: `parse_schema`
admits only known fields and leaves out nulls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ochredb.errors import InvalidArgument
from ochredb.json_shape import describe, expect_map, wrong_shape
from ochredb.where import (
    And,
    Compare,
    DocumentContains,
    DocumentMatches,
    ListContains,
    OneOf,
    Or,
    Scalar,
    Where,
)

DOCUMENT, EMBEDDING = "#document", "#embedding"

Json = dict[str, Any]
Parser = Callable[[Any, str], Any]  # (parsed JSON value, its path in the request) -> value


# Fields --------------------------------------------------------------------------------------


def parse_fields(value: Any, path: str, struct: str, fields: Mapping[str, Parser]) -> Json:
    """An object with these optional fields and no others; nulls are left out."""
    given: Json = {}
    for key, item in expect_map(value, path, f"struct {struct}").items():
        parse = fields.get(key)
        if parse is None:
            raise wrong_shape(f"{path}.{key}", f"unknown field `{key}`, {_expected(fields)}")
        if item is not None:
            given[key] = parse(item, f"{path}.{key}")
    return given


def _expected(names: Mapping[str, Parser]) -> str:
    quoted = [f"`{name}`" for name in names]
    if not quoted:
        return "there are no fields"
    if len(quoted) <= 2:
        return "expected " + " or ".join(quoted)
    return "expected one of " + ", ".join(quoted)


def _natural(value: Any, path: str) -> int:
    if type(value) is not int or value >= 2**64:
        raise wrong_shape(path, f"invalid type: {describe(value)}, expected usize")
    if value < 0:
        raise wrong_shape(path, f"invalid value: {describe(value)}, expected usize")
    return value


def _float(value: Any, path: str) -> float:
    if type(value) not in (int, float):
        raise wrong_shape(path, f"invalid type: {describe(value)}, expected f64")
    return float(value)


def _boolean(value: Any, path: str) -> bool:
    if type(value) is not bool:
        raise wrong_shape(path, f"invalid type: {describe(value)}, expected a boolean")
    return value


def _string(value: Any, path: str) -> str:
    if type(value) is not str:
        raise wrong_shape(path, f"invalid type: {describe(value)}, expected a string")
    return value


def _one_of(*variants: str) -> Parser:
    expected = _expected(dict.fromkeys(variants, _string))

    def parse(value: Any, path: str) -> str:
        if type(value) is not str:
            problem = f"Failed to parse the request body as JSON: {path}: expected value"
            raise InvalidArgument(problem)
        if value not in variants:
            raise wrong_shape(path, f"unknown variant `{value}`, {expected}")
        return value

    return parse


parse_space = _one_of("l2", "cosine", "ip")


def parse_embedding_function(value: Any, path: str) -> Json:
    """What a client says about its embedding function. It is data: nothing is built from it."""
    if not isinstance(value, dict):
        raise wrong_shape(
            path,
            f"invalid type: {describe(value)}, expected internally tagged enum "
            "EmbeddingFunctionConfiguration",
        )
    if "type" not in value:
        raise wrong_shape(path, "missing field `type`")
    kind = value["type"]
    if type(kind) is not str:
        problem = f"invalid type: {describe(kind)}, expected variant identifier"
        raise wrong_shape(f"{path}.type", problem)
    if kind in ("legacy", "unknown"):
        return {"type": kind}
    if kind != "known":
        raise wrong_shape(
            f"{path}.type",
            f"unknown variant `{kind}`, expected one of `legacy`, `known`, `unknown`",
        )
    for name in ("name", "config"):
        if name not in value:
            raise wrong_shape(path, f"missing field `{name}`")
    return {"type": kind, "name": _string(value["name"], path), "config": value["config"]}


def is_default_embedding_function(function: Json | None) -> bool:
    """Whether a stated embedding function counts as "none stated" when schemas are compared."""
    return function is None or function["type"] == "unknown" or function.get("name") == "default"


HNSW_FIELDS: dict[str, Parser] = {
    "ef_construction": _natural,
    "max_neighbors": _natural,
    "ef_search": _natural,
    "num_threads": _natural,
    "batch_size": _natural,
    "sync_threshold": _natural,
    "resize_factor": _float,
}
SPANN_DEFAULTS: Json = {
    "search_nprobe": 64,
    "search_rng_factor": 1.0,
    "search_rng_epsilon": 10.0,
    "nreplica_count": 8,
    "write_rng_factor": 1.0,
    "write_rng_epsilon": 5.0,
    "split_threshold": 50,
    "num_samples_kmeans": 1000,
    "initial_lambda": 100.0,
    "reassign_neighbor_count": 64,
    "merge_threshold": 25,
    "num_centers_to_merge_to": 8,
    "write_nprobe": 32,
    "ef_construction": 200,
    "ef_search": 200,
    "max_neighbors": 64,
}
SPANN_FIELDS: dict[str, Parser] = {
    name: _natural if type(default) is int else _float for name, default in SPANN_DEFAULTS.items()
}


def _hnsw(value: Any, path: str) -> Json:
    return parse_fields(value, path, "HnswIndexConfig", HNSW_FIELDS)


def _spann(value: Any, path: str) -> Json:
    return parse_fields(value, path, "SpannIndexConfig", SPANN_FIELDS)


def hnsw_defaults(num_threads: int) -> Json:
    """Chroma's parameters of an HNSW graph."""
    return {
        "ef_construction": 100,
        "max_neighbors": 16,
        "ef_search": 100,
        "num_threads": num_threads,
        "batch_size": 100,
        "sync_threshold": 1000,
        "resize_factor": 1.2,
    }


# Schema --------------------------------------------------------------------------------------

# Value type -> index -> fields of its configuration.
_INDEXES: dict[str, dict[str, dict[str, Parser]]] = {
    "string": {"fts_index": {}, "string_inverted_index": {}},
    "float_list": {
        "vector_index": {
            "space": parse_space,
            "embedding_function": parse_embedding_function,
            "source_key": _string,
            "hnsw": _hnsw,
            "spann": _spann,
        }
    },
    "sparse_vector": {
        "sparse_vector_index": {
            "embedding_function": parse_embedding_function,
            "source_key": _string,
            "bm25": _boolean,
            "algorithm": _one_of("wand", "max_score"),
        }
    },
    "int": {"int_inverted_index": {}},
    "float": {"float_inverted_index": {}},
    "bool": {"bool_inverted_index": {}},
}
_CMEK_PATTERN = re.compile(r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+")


def default_schema(num_threads: int) -> Json:
    """The schema of a collection about which nothing was said."""

    def index(enabled: bool, **config: Any) -> Json:
        return {"enabled": enabled, "config": config}

    return {
        "defaults": {
            "string": {"fts_index": index(False), "string_inverted_index": index(True)},
            "float_list": {
                "vector_index": index(False, space="l2", hnsw=hnsw_defaults(num_threads))
            },
            "sparse_vector": {
                "sparse_vector_index": index(
                    False, embedding_function={"type": "unknown"}, bm25=False
                )
            },
            "int": {"int_inverted_index": index(True)},
            "float": {"float_inverted_index": index(True)},
            "bool": {"bool_inverted_index": index(True)},
        },
        "keys": {
            DOCUMENT: {"string": {"fts_index": index(True), "string_inverted_index": index(False)}},
            EMBEDDING: {
                "float_list": {
                    "vector_index": index(
                        True, space="l2", source_key=DOCUMENT, hnsw=hnsw_defaults(num_threads)
                    )
                }
            },
        },
    }


def parse_schema(value: Any, path: str = "schema") -> Json:
    """The known parts of a schema sent by a client. Raises Unprocessable."""
    given = expect_map(value, path, "struct Schema")
    for name in ("defaults", "keys"):
        if name not in given:
            raise wrong_shape(path, f"missing field `{name}`")
    schema: Json = {
        "defaults": _parse_value_types(given["defaults"], f"{path}.defaults"),
        "keys": {
            key: _parse_value_types(types, f"{path}.keys.{key}")
            for key, types in expect_map(given["keys"], f"{path}.keys").items()
        },
    }
    if (cmek := given.get("cmek")) is not None:
        schema["cmek"] = parse_fields(cmek, f"{path}.cmek", "Cmek", {"gcp": _string})
    if (function_id := given.get("source_attached_function_id")) is not None:
        schema["source_attached_function_id"] = function_id
    return schema


def _parse_value_types(value: Any, path: str) -> Json:
    types: Json = {}
    for alias, given in expect_map(value, path, "struct ValueTypes").items():
        name = alias.removeprefix("#")  # Chroma's first schemas had prefixes here.
        if name in _INDEXES and given is not None:
            types[name] = _parse_indexes(given, f"{path}.{name}", name)
    return types


def _parse_indexes(value: Any, path: str, value_type: str) -> Json:
    indexes: Json = {}
    given = expect_map(value, path, f"struct {_camel(value_type)}ValueType")
    for alias, index in given.items():
        name = alias.removeprefix("$")
        if (fields := _INDEXES[value_type].get(name)) is None or index is None:
            continue
        struct, place = _camel(name), f"{path}.{name}"
        expect_map(index, place, f"struct {struct}Type")
        for required in ("enabled", "config"):
            if required not in index:
                raise wrong_shape(place, f"missing field `{required}`")
        enabled = _boolean(index["enabled"], f"{place}.enabled")
        config = parse_fields(index["config"], f"{place}.config", f"{struct}Config", fields)
        if config.get("algorithm") == "wand":
            del config["algorithm"]  # The default is not shown.
        indexes[name] = {"enabled": enabled, "config": config}
    return indexes


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _enabled(types: Json, value_type: str, index: str) -> bool:
    return bool(types.get(value_type, {}).get(index, {}).get("enabled", False))


def schema_problem(schema: Json) -> str | None:
    """Why a parsed schema breaks the rules of rest-contract section 4, or None."""
    if "source_attached_function_id" in schema:
        return "Cannot set source_attached_function_id. This field is reserved for system use."
    defaults, keys = schema["defaults"], schema["keys"]
    if _enabled(defaults, "float_list", "vector_index"):
        return (
            "Vector index cannot be enabled by default. It can only be enabled on #embedding field."
        )
    default_index = defaults.get("float_list", {}).get("vector_index", {}).get("config", {})
    if "hnsw" in default_index and "spann" in default_index:
        return "Both spann and hnsw config cannot be present at the same time."
    if _enabled(defaults, "string", "fts_index"):
        return (
            "Full text search / regular expression index cannot be enabled by default. "
            "It can only be enabled on #document field."
        )
    if _enabled(defaults, "sparse_vector", "sparse_vector_index"):
        return (
            "Sparse vector index cannot be enabled by default. Please enable sparse vector index "
            "on specific keys. At most one sparse vector index is allowed for the collection."
        )
    for key, types in keys.items():
        if (problem := _key_problem(key, types)) is not None:
            return problem
    sparse = [key for key in keys if _enabled(keys[key], "sparse_vector", "sparse_vector_index")]
    if len(sparse) > 1:
        listed = ", ".join(f'"{key}"' for key in sparse)
        return f"At most one sparse vector index is allowed for the collection: [{listed}]"
    cmek = schema.get("cmek", {}).get("gcp")
    if cmek is not None and _CMEK_PATTERN.fullmatch(cmek) is None:
        return f'CMEK does not match expected pattern: Gcp("{cmek}")'
    return None


def _key_problem(key: str, types: Json) -> str | None:
    if key == DOCUMENT:
        if types.keys() - {"string"}:
            return f"Document field cannot have any value types other than string: {key}"
        if _enabled(types, "string", "string_inverted_index"):
            return f"String inverted index can not be enabled on #document key: {key}"
    elif key == EMBEDDING:
        if types.keys() - {"float_list"}:
            return f"Embedding field cannot have any value types other than float_list: {key}"
    elif key.startswith("#"):
        return (
            f"key cannot begin with '#'. Keys starting with '#' are reserved for system use: {key}"
        )
    if key != EMBEDDING and _enabled(types, "float_list", "vector_index"):
        return f"Vector index can only be enabled on #embedding field: {key}"
    if key != DOCUMENT and _enabled(types, "string", "fts_index"):
        return (
            "Full text search / regular expression index can only be enabled on #document field: "
            f"{key}"
        )
    vector = types.get("float_list", {}).get("vector_index", {}).get("config", {})
    if vector.get("source_key", DOCUMENT) != DOCUMENT:
        return "Vector index can only source from #document"
    sparse = types.get("sparse_vector", {}).get("sparse_vector_index", {}).get("config", {})
    if (
        _enabled(types, "sparse_vector", "sparse_vector_index")
        and "source_key" in sparse
        and "embedding_function" not in sparse
    ):
        return (
            "If source_key is provided then embedding_function must also be provided since there "
            "is no default embedding function."
        )
    source_key = sparse.get("source_key", DOCUMENT)
    if source_key.startswith("#") and source_key != DOCUMENT:
        return (
            "source_key cannot begin with '#'. The only valid key starting with '#' is "
            "Key.DOCUMENT or '#document'."
        )
    return None


def vector_index(schema: Json, *, default: bool = False) -> Json:
    """The configuration of the vector index: on `#embedding`, or the one in the defaults."""
    types = schema["defaults"] if default else schema["keys"][EMBEDDING]
    config: Json = types["float_list"]["vector_index"]["config"]
    return config


# What follows a write, and what precedes a read ----------------------------------------------


def schema_with_keys(schema_json: Json, key_types: frozenset[tuple[str, str]]) -> Json:
    """The schema with metadata keys that writes have brought, each indexed as the defaults say.

    key_types: (key, type) pairs; a list is indexed as its elements are. What the schema already
    says about a key and type stays. `schema_json` is not changed.
    """
    keys = dict(schema_json["keys"])
    for key, value_type in sorted(key_types):
        element_type = value_type.removesuffix("_list")
        types = keys.get(key, {})
        if element_type not in types:
            keys[key] = {**types, element_type: schema_json["defaults"][element_type]}
    return {**schema_json, "keys": keys}


_FILTER_TYPES = {
    str: ("string", "Str"),
    int: ("int", "Int"),
    float: ("float", "Float"),
    bool: ("bool", "Bool"),
}


def check_filterable(schema_json: Json, where: Where | None) -> None:
    """Raise InvalidArgument if a filter needs an index that the schema has disabled."""
    match where:
        case And(children) | Or(children):
            for child in children:
                check_filterable(schema_json, child)
        case Compare(key, _, value) | ListContains(key, value, _):
            _check_key(schema_json, key, value)
        case OneOf(key, values, _):
            for value in values:
                _check_key(schema_json, key, value)
        case DocumentContains() | DocumentMatches():
            if not schema_json["keys"][DOCUMENT]["string"]["fts_index"]["enabled"]:
                raise InvalidArgument(
                    "Cannot filter using full-text search because FTS indexing is disabled"
                )


def _check_key(schema_json: Json, key: str, value: Scalar) -> None:
    value_type, type_name = _FILTER_TYPES[type(value)]
    defaults = schema_json["defaults"]
    indexes = schema_json["keys"].get(key, defaults).get(value_type, defaults[value_type])
    # A key may have the type without saying anything about this index: then the default holds.
    name = f"{value_type}_inverted_index"
    if not indexes.get(name, defaults[value_type][name])["enabled"]:
        raise InvalidArgument(
            f"Cannot filter using metadata key '{key}' with type '{type_name}' "
            "because indexing is disabled"
        )
