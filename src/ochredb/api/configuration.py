"""A collection's configuration: as users write it, as it travels, and which function embeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from ochredb.api.types import CollectionMetadata, Space
from ochredb.embedding_functions.base import (
    EmbeddingFunction,
    check_embedding_function,
    check_space,
    config_to_embedding_function,
    describe,
    name_of,
    stored_name,
    to_config,
)
from ochredb.embedding_functions.lexical import DEFAULT_EMBEDDING_FUNCTION


class HNSWConfiguration(TypedDict, total=False):
    """The graph index. What is left out takes the server's default."""

    space: Space
    ef_construction: int
    max_neighbors: int
    ef_search: int
    num_threads: int
    batch_size: int
    sync_threshold: int
    resize_factor: float


class SpannConfiguration(TypedDict, total=False):
    """The cluster index of Chroma's cloud; a server without it uses a graph of the same space."""

    search_nprobe: int
    write_nprobe: int
    space: Space
    ef_construction: int
    ef_search: int
    max_neighbors: int
    reassign_neighbor_count: int
    split_threshold: int
    merge_threshold: int


class CollectionConfiguration(TypedDict):
    hnsw: HNSWConfiguration | None
    spann: SpannConfiguration | None
    embedding_function: EmbeddingFunction[Any] | None


class CreateCollectionConfiguration(TypedDict, total=False):
    hnsw: HNSWConfiguration | None
    spann: SpannConfiguration | None
    embedding_function: EmbeddingFunction[Any] | None


class UpdateHNSWConfiguration(TypedDict, total=False):
    ef_search: int
    max_neighbors: int
    num_threads: int
    batch_size: int
    sync_threshold: int
    resize_factor: float


class UpdateSpannConfiguration(TypedDict, total=False):
    search_nprobe: int
    ef_search: int


class UpdateCollectionConfiguration(TypedDict, total=False):
    hnsw: UpdateHNSWConfiguration | None
    spann: UpdateSpannConfiguration | None
    embedding_function: EmbeddingFunction[Any] | None


def is_default(function: EmbeddingFunction[Any] | None) -> bool:
    """Whether the caller left the choice to us."""
    return function is DEFAULT_EMBEDDING_FUNCTION


def chosen_function(
    function: EmbeddingFunction[Any] | None, configured: EmbeddingFunction[Any] | None
) -> EmbeddingFunction[Any] | None:
    """The function of a new collection: the argument's, or the configuration's.

    Raises ValueError if both are given and differ.
    """
    for candidate in (function, configured):
        if candidate is not None:
            check_embedding_function(candidate)
    if configured is None:
        return function
    if function is None or is_default(function):
        return configured
    if function is not configured and describe(function) != describe(configured):
        raise ValueError(
            "two embedding functions are given: the argument embedding_function is "
            f"{_named(function)}, the configuration's is {_named(configured)}; give one"
        )
    return configured


def check_stored_function(
    function: EmbeddingFunction[Any] | None, configuration_json: Mapping[str, Any]
) -> None:
    """Raise ValueError if the caller's function is not the one that made the stored vectors."""
    if function is None:
        return
    check_embedding_function(function)
    stored = stored_name(configuration_json.get("embedding_function"))
    if is_default(function) or stored is None or stored == name_of(function):
        return
    raise ValueError(
        f"this collection's vectors are made by the embedding function {stored}, but "
        f"{_named(function)} is given; to embed with another one, pass embeddings instead of texts"
    )


def create_to_json(
    configuration: Mapping[str, Any],
    function: EmbeddingFunction[Any] | None,
    metadata: CollectionMetadata | None,
) -> dict[str, Any]:
    """The `configuration` of a request that creates a collection.

    A function that was chosen, and not just the default, also chooses the distance where neither
    configuration nor metadata do. The default function does not: a collection of which nothing is
    said has Chroma's distance, l2, which ranks its unit vectors as cosine would.
    """
    hnsw, spann = configuration.get("hnsw"), configuration.get("spann")
    if hnsw is not None and spann is not None:
        raise ValueError("a configuration has hnsw or spann, not both")
    if function is None:
        return {"hnsw": hnsw, "spann": spann, "embedding_function": {"type": "legacy"}}
    stored = to_config(function)
    if stored["type"] == "known" and not is_default(function):
        space = getattr(function, "default_space", lambda: "l2")()
        if spann is not None:
            spann = {**spann, "space": spann.get("space") or space}
        elif hnsw is not None or "hnsw:space" not in (metadata or {}):
            hnsw = {**(hnsw or {}), "space": (hnsw or {}).get("space") or space}
        chosen = (hnsw or spann or {}).get("space") or (metadata or {}).get("hnsw:space")
        check_space(function, str(chosen))
    return {"hnsw": hnsw, "spann": spann, "embedding_function": stored}


def update_to_json(
    configuration: UpdateCollectionConfiguration, configuration_json: Mapping[str, Any]
) -> dict[str, Any]:
    """The `new_configuration` of a request that modifies a collection: what is given, no more.

    Raises ValueError if a new embedding function is not the stored one with another configuration.
    """
    if configuration.get("hnsw") is not None and configuration.get("spann") is not None:
        raise ValueError("a configuration has hnsw or spann, not both")
    document: dict[str, Any] = {
        key: configuration[key] for key in ("hnsw", "spann") if configuration.get(key) is not None
    }
    function = configuration.get("embedding_function")
    if function is not None:
        check_embedding_function(function)
        _check_replacement(function, configuration_json.get("embedding_function"))
        document["embedding_function"] = to_config(function)
    return document


def _check_replacement(
    function: EmbeddingFunction[Any], persisted: Mapping[str, Any] | None
) -> None:
    stored = stored_name(persisted)
    if stored is None or persisted is None:
        return
    if stored != name_of(function):
        raise ValueError(
            f"the embedding function cannot change from {stored} to {_named(function)}: the "
            "vectors stored so far would mean nothing to it"
        )
    validate = getattr(function, "validate_config_update", None)
    if validate is not None:
        validate(persisted.get("config") or {}, function.get_config())


def merged(configuration_json: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration after the server has accepted an update."""
    result = dict(configuration_json)
    for key in ("hnsw", "spann"):
        if result.get(key) is not None and update.get(key) is not None:
            result[key] = {**result[key], **update[key]}
    if update.get("embedding_function") is not None:
        result["embedding_function"] = update["embedding_function"]
    return result


def from_json(configuration_json: Mapping[str, Any]) -> CollectionConfiguration:
    """The stored configuration, its function rebuilt. Raises ValueError if that is not known."""
    persisted = configuration_json.get("embedding_function")
    return CollectionConfiguration(
        hnsw=configuration_json.get("hnsw"),
        spann=configuration_json.get("spann"),
        embedding_function=None
        if stored_name(persisted) is None
        else config_to_embedding_function(persisted or {}),
    )


def _named(function: EmbeddingFunction[Any]) -> str:
    return name_of(function) or type(function).__name__
