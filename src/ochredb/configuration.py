"""What a collection is configured with: create and update requests in, stored JSON out.

A client may configure by `configuration` (hnsw or spann parameters, embedding function), by
`schema`, or by legacy `hnsw:*` keys in the metadata. The outcome is one schema, of which
`configuration_json` is a view; both are stored and returned as rest-contract section 4 shows.

    configuration_json, schema_json = resolve(None, {"hnsw": {"space": "ip"}}, None, num_threads=2)
    index_settings(configuration_json).space   # "ip"
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

from ochredb.collection_schema import (
    DOCUMENT,
    EMBEDDING,
    HNSW_FIELDS,
    SPANN_DEFAULTS,
    SPANN_FIELDS,
    Json,
    check_filterable,
    default_schema,
    hnsw_defaults,
    is_default_embedding_function,
    parse_embedding_function,
    parse_fields,
    parse_schema,
    parse_space,
    schema_problem,
    schema_with_keys,
    vector_index,
)
from ochredb.errors import InvalidArgument
from ochredb.json_shape import expect_map

Space = Literal["l2", "cosine", "ip"]

_CREATE_HNSW = {"space": parse_space} | {
    name: HNSW_FIELDS[name]
    for name in (
        "ef_construction", "ef_search", "max_neighbors", "num_threads", "resize_factor",
        "sync_threshold", "batch_size",
    )
}  # fmt: skip
_CREATE_SPANN = {
    "search_nprobe": SPANN_FIELDS["search_nprobe"],
    "write_nprobe": SPANN_FIELDS["write_nprobe"],
    "space": parse_space,
} | {
    name: SPANN_FIELDS[name]
    for name in (
        "ef_construction", "ef_search", "max_neighbors", "reassign_neighbor_count",
        "split_threshold", "merge_threshold",
    )
}  # fmt: skip
_UPDATE_HNSW = {
    name: HNSW_FIELDS[name]
    for name in (
        "ef_search", "max_neighbors", "num_threads", "resize_factor", "sync_threshold",
        "batch_size",
    )
}  # fmt: skip
_UPDATE_SPANN = {name: SPANN_FIELDS[name] for name in ("search_nprobe", "ef_search")}

_LEGACY_PREFIX = "hnsw:"
_LEGACY_KEYS = {
    "hnsw:construction_ef": "ef_construction",
    "hnsw:search_ef": "ef_search",
    "hnsw:M": "max_neighbors",
    "hnsw:num_threads": "num_threads",
    "hnsw:resize_factor": "resize_factor",
    "hnsw:batch_size": "batch_size",
    "hnsw:sync_threshold": "sync_threshold",
}
# Of a stored configuration: which parameters somebody chose. Not shown to clients.
_ASKED, _EF_SEARCH = "asked", "ef_search"
_FLUSHED_MIN = 2  # The least batch_size and sync_threshold in legacy metadata and schemas.


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSettings:
    """What the vector index is built and searched with, within what the graph library bears.

    ef_construction, ef_search: candidates kept while inserting and while searching.
    max_neighbors: links per node (M). ef_search_is_asked: somebody chose it; the default that
        stands for nothing better known is not.
    """

    space: Space = "l2"
    ef_construction: int = 100
    ef_search: int = 100
    max_neighbors: int = 16
    ef_search_is_asked: bool = False


_DEFAULT = IndexSettings()
# Clients may store any natural number; a graph has to be buildable with what is used of it.
_EF_MAX = 10_000
_NEIGHBORS_MIN, _NEIGHBORS_MAX = 2, 512


def index_settings(configuration_json: Json) -> IndexSettings:
    """The settings in a stored configuration, clamped to ef 1..10,000 and M 2..512."""
    hnsw = configuration_json["hnsw"]
    return IndexSettings(
        space=hnsw["space"],
        ef_construction=min(max(hnsw["ef_construction"], 1), _EF_MAX),
        ef_search=min(max(hnsw["ef_search"], 1), _EF_MAX),
        max_neighbors=min(max(hnsw["max_neighbors"], _NEIGHBORS_MIN), _NEIGHBORS_MAX),
        # The default in a schema may be one that was read from a collection.
        ef_search_is_asked=_EF_SEARCH in configuration_json.get(_ASKED, ())
        or hnsw["ef_search"] != _DEFAULT.ef_search,
    )


def resolve(
    metadata: Json | None, configuration: Any, schema: Any, *, num_threads: int
) -> tuple[Json, Json]:
    """configuration_json and schema_json of a new collection.

    metadata: as `check_collection_metadata` returned it; `hnsw:*` keys configure the index unless
        `configuration` does. configuration, schema: parsed JSON from the request, or None.
    num_threads: the default to show; the number of processors.

    Raises Unprocessable (shape) and InvalidArgument (both hnsw and spann, a schema that breaks the
    rules, both schema and configuration saying something, a bad `hnsw:*` value).
    """
    config, is_spann = _parse_configuration(configuration, num_threads)
    user_schema = None if schema is None else parse_schema(schema)
    if config is None:
        raise InvalidArgument("Multiple vector index configurations provided")
    default = {"space": "l2"} | hnsw_defaults(num_threads)
    given = (configuration or {}).get("hnsw") or {}
    is_asked = given.get(_EF_SEARCH) is not None
    if metadata and not is_spann:
        legacy = _parse_legacy(metadata)
        if config["hnsw"] == default:
            config["hnsw"] = default | legacy
            is_asked = is_asked or _EF_SEARCH in legacy
    if user_schema is not None and (problem := schema_problem(user_schema)) is not None:
        raise InvalidArgument(f"Validation error: schema: {problem}")
    config_is_default = config["hnsw"] == default and is_default_embedding_function(
        config["embedding_function"]
    )
    resolved = _reconcile(user_schema, config, config_is_default, num_threads)
    return _with_asked(configuration_of(resolved), is_asked), resolved


def update(configuration_json: Json, schema_json: Json, changes: Any) -> tuple[Json, Json]:
    """Both JSON objects with `changes` (a request's `new_configuration`) applied to both.

    Raises Unprocessable (shape; a field that cannot change) and InvalidArgument (hnsw and spann).
    The arguments are not changed.
    """
    if changes is None:
        return configuration_json, schema_json
    path = "new_configuration"
    given = expect_map(changes, path, "struct UpdateCollectionConfiguration")
    hnsw = spann = function = None
    if given.get("hnsw") is not None:
        hnsw = parse_fields(given["hnsw"], f"{path}.hnsw", "UpdateHnswConfiguration", _UPDATE_HNSW)
    if given.get("spann") is not None:  # Accepted, but nothing here is a SPANN index.
        spann = parse_fields(
            given["spann"], f"{path}.spann", "UpdateSpannConfiguration", _UPDATE_SPANN
        )
    if given.get("embedding_function") is not None:
        function = parse_embedding_function(
            given["embedding_function"], f"{path}.embedding_function"
        )
    if hnsw is not None and spann is not None:
        raise InvalidArgument("Multiple vector index configurations provided")
    updated = copy.deepcopy(schema_json)
    for index in (vector_index(updated), vector_index(updated, default=True)):
        index["hnsw"].update(hnsw or {})
        if function is not None:
            index["embedding_function"] = function
    is_asked = _EF_SEARCH in (hnsw or {}) or _EF_SEARCH in configuration_json.get(_ASKED, ())
    return _with_asked(configuration_of(updated), is_asked), updated


def shown(configuration_json: Json) -> Json:
    """What clients see of a stored configuration."""
    return {name: value for name, value in configuration_json.items() if name != _ASKED}


def _with_asked(configuration_json: Json, is_asked: bool) -> Json:
    return configuration_json | ({_ASKED: [_EF_SEARCH]} if is_asked else {})


def configuration_of(schema_json: Json) -> Json:
    """The configuration_json that goes with a resolved schema."""
    index = vector_index(schema_json)
    names = ("ef_construction", "ef_search", "max_neighbors", "resize_factor", "sync_threshold")
    return {
        "hnsw": {"space": index["space"]} | {name: index["hnsw"][name] for name in names},
        "spann": None,
        "embedding_function": index.get("embedding_function"),
    }


def _parse_configuration(given: Any, num_threads: int) -> tuple[Json | None, bool]:
    """({hnsw, embedding_function} with defaults filled in, or None if hnsw and spann, is spann)."""
    hnsw = spann = function = None
    if given is not None:
        path = "configuration"
        expect_map(given, path, "struct CollectionConfiguration")
        if given.get("hnsw") is not None:
            hnsw = parse_fields(given["hnsw"], f"{path}.hnsw", "HnswConfiguration", _CREATE_HNSW)
        if given.get("spann") is not None:
            spann = parse_fields(
                given["spann"], f"{path}.spann", "SpannConfiguration", _CREATE_SPANN
            )
        if given.get("embedding_function") is not None:
            function = parse_embedding_function(
                given["embedding_function"], f"{path}.embedding_function"
            )
    if hnsw is not None and spann is not None:
        return None, True
    if spann is not None:  # Of a SPANN configuration only the space carries over.
        hnsw = {"space": spann["space"]} if "space" in spann else {}
    filled = {"space": "l2"} | hnsw_defaults(num_threads) | (hnsw or {})
    return {"hnsw": filled, "embedding_function": function}, spann is not None


def _parse_legacy(metadata: Json) -> Json:
    """The HNSW parameters in `hnsw:*` keys of collection metadata."""
    given: Json = {}
    for key, value in metadata.items():
        if not key.startswith(_LEGACY_PREFIX):
            continue
        if key == "hnsw:space":
            name, valid = "space", value in ("l2", "cosine", "ip")
        elif (name := _LEGACY_KEYS.get(key, "")) == "resize_factor":
            valid = type(value) in (int, float)
            value = float(value) if valid else value
        else:
            least = _FLUSHED_MIN if name in ("batch_size", "sync_threshold") else 0
            valid = bool(name) and type(value) is int and value >= least
        if not valid:
            raise InvalidArgument(
                "Failed to parse hnsw parameters from segment metadata", key=key, value=value
            )
        given[name] = value
    return given


def _reconcile(
    user_schema: Json | None, config: Json, config_is_default: bool, num_threads: int
) -> Json:
    """One schema from what the schema and the configuration say; only one of them may speak."""
    if user_schema is not None:
        if not config_is_default and not _is_default(user_schema):
            raise _irreconcilable("Cannot set both collection config and schema simultaneously")
        if any("sparse_vector" in types and _has_sparse_index(types)
               for types in user_schema["keys"].values()):  # fmt: skip
            raise _irreconcilable(
                "Invalid schema input: Sparse vector indexing is not enabled in local"
            )
    merged = default_schema(num_threads)
    if user_schema is not None:
        _merge(merged, user_schema)
        if config_is_default and not _is_default(merged):
            return merged
        merged = default_schema(num_threads)
    hnsw = dict(config["hnsw"])
    space, function = hnsw.pop("space"), config["embedding_function"]
    for index in (vector_index(merged), vector_index(merged, default=True)):
        index["space"], index["hnsw"] = space, dict(hnsw)
        if function is not None:
            index["embedding_function"] = function
    return merged


def _irreconcilable(problem: str) -> InvalidArgument:
    return InvalidArgument(f"Failed to reconcile schema: {problem}")


def _has_sparse_index(types: Json) -> bool:
    return bool(types["sparse_vector"].get("sparse_vector_index", {}).get("enabled", False))


def _merge(base: Json, user: Json) -> None:
    """Put what a client's schema says over `base`, the default schema. Raises InvalidArgument."""
    _merge_types(base["defaults"], user["defaults"])
    for key, types in user["keys"].items():
        if key in base["keys"]:
            _merge_types(base["keys"][key], types)
        else:
            base["keys"][key] = types
    if "cmek" in user:
        base["cmek"] = user["cmek"]


def _merge_types(base: Json, user: Json) -> None:
    for value_type, indexes in user.items():
        for name, index in indexes.items():
            merged = base.setdefault(value_type, {}).setdefault(name, {"config": {}})
            config = dict(index["config"])
            if name == "vector_index":
                config.pop("spann", None)  # The index here is HNSW, whatever the schema prefers.
                config["hnsw"] = merged["config"]["hnsw"] | _check_hnsw(config.get("hnsw", {}))
            merged["enabled"] = index["enabled"]
            merged["config"] |= config


def _check_hnsw(hnsw: Json) -> Json:
    problems = [
        f'{name}: Validation error: range [{{"min": Number({_FLUSHED_MIN}), '
        f'"value": Number({hnsw[name]})}}]'
        for name in ("batch_size", "sync_threshold")
        if hnsw.get(name, _FLUSHED_MIN) < _FLUSHED_MIN
    ]
    if problems:
        raise _irreconcilable("Invalid HNSW configuration: " + "\n".join(problems))
    return hnsw


def _is_default(schema: Json) -> bool:
    """Whether a schema says nothing that the default schema does not say."""
    keys = schema["keys"]
    return (
        "cmek" not in schema
        and keys.keys() <= {DOCUMENT, EMBEDDING}
        and _says_only(schema["defaults"], {"fts_index": False, "vector_index": False,
                                            "sparse_vector_index": False}, None)
        and _says_only(keys.get(DOCUMENT, {}), {"string_inverted_index": False}, None)
        and _says_only(keys.get(EMBEDDING, {}), {}, DOCUMENT)
    )  # fmt: skip


def _says_only(types: Json, disabled: dict[str, bool], source_key: str | None) -> bool:
    """Whether all indexes are enabled but the `disabled` ones, with default configurations."""
    for indexes in types.values():
        for name, index in indexes.items():
            config = index["config"]
            if index["enabled"] != disabled.get(name, True):
                return False
            if not is_default_embedding_function(config.get("embedding_function")):
                return False
            if name == "vector_index" and not _is_default_vector_index(config, source_key):
                return False
            if name == "sparse_vector_index" and (config.get("bm25") or "source_key" in config):
                return False
    return True


def _is_default_vector_index(config: Json, source_key: str | None) -> bool:
    hnsw, spann = config.get("hnsw"), config.get("spann")
    defaults = hnsw_defaults(num_threads=0)
    return (
        config.get("space", "l2") == "l2"
        and config.get("source_key") == source_key
        and (hnsw is None or spann is None)
        and all(
            value == defaults[name] for name, value in (hnsw or {}).items() if name != "num_threads"
        )
        and all(value == SPANN_DEFAULTS[name] for name, value in (spann or {}).items())
    )


__all__ = [
    "IndexSettings",
    "check_filterable",
    "configuration_of",
    "index_settings",
    "resolve",
    "schema_with_keys",
    "shown",
    "update",
]
