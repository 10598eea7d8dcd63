"""Configuration of collections, as observed on Chroma 1.5.9's wire."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ochredb.configuration import IndexSettings, index_settings, resolve, shown, update
from ochredb.errors import InvalidArgument, Unprocessable

from .schemas import (
    DEFAULT_FUNCTION,
    EMPTY,
    HNSW,
    KNOWN,
    LEGACY,
    SCHEMA,
    SHAPE,
    SHOWN,
    on_embedding,
    resolved,
    vector_configs,
)


@pytest.mark.parametrize(
    "configuration",
    [
        None, {}, {"hnsw": None}, {"hnsw": {}}, {"spann": {}}, {"bogus": 1},
        {"hnsw": None, "spann": None, "embedding_function": None},
        {"hnsw": {"space": None, "ef_search": None}}, {"spann": {"ef_search": 5}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("schema", [None, EMPTY, SCHEMA, {**EMPTY, "bogus": 1, "cmek": None}])
def test_saying_nothing_gives_the_defaults(configuration: Any, schema: Any) -> None:
    expected = {"hnsw": SHOWN, "spann": None, "embedding_function": None}
    assert resolved(configuration, schema) == (expected, SCHEMA)


@pytest.mark.parametrize(
    ("configuration", "hnsw"),
    [
        ({"hnsw": {"space": "cosine"}}, {"space": "cosine"}),
        ({"spann": {"space": "cosine", "ef_search": 5, "search_nprobe": 3}}, {"space": "cosine"}),
        ({"hnsw": {"ef_search": 0, "max_neighbors": 0}}, {"ef_search": 0, "max_neighbors": 0}),
        ({"hnsw": {"resize_factor": 1}}, {"resize_factor": 1.0}),
        ({"hnsw": {"resize_factor": -1.5}}, {"resize_factor": -1.5}),
        ({"hnsw": {"ef_search": 2**63}}, {"ef_search": 2**63}),
        ({"hnsw": {"num_threads": 9}}, {"num_threads": 9}),
        (
            {"hnsw": {"space": "ip", "sync_threshold": 1, "batch_size": 0}},
            {"space": "ip", "sync_threshold": 1, "batch_size": 0},
        ),
    ],
)
def test_hnsw_parameters(configuration: Any, hnsw: dict[str, Any]) -> None:
    shown, schema = resolved(configuration)
    expected = {**HNSW, "space": "l2", **hnsw}
    assert shown["hnsw"] == {name: expected[name] for name in SHOWN}
    assert repr(shown["hnsw"]["resize_factor"]) == repr(expected["resize_factor"])
    space = expected.pop("space")
    for config in vector_configs(schema):
        assert (config["space"], config["hnsw"]) == (space, expected)


@pytest.mark.parametrize("function", [LEGACY, {"type": "unknown"}, KNOWN, DEFAULT_FUNCTION])
def test_embedding_functions_are_echoed(function: dict[str, Any]) -> None:
    shown, schema = resolved({"embedding_function": function}, EMPTY)
    assert shown == {"hnsw": SHOWN, "spann": None, "embedding_function": function}
    assert [config["embedding_function"] for config in vector_configs(schema)] == [function] * 2


def test_embedding_function_keeps_only_known_fields() -> None:
    assert resolved({"embedding_function": {**KNOWN, "extra": 1}})[0]["embedding_function"] == KNOWN
    assert (
        resolved({"embedding_function": {**LEGACY, "name": 1}})[0]["embedding_function"] == LEGACY
    )


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ([], "configuration: invalid type: sequence, expected struct CollectionConfiguration"),
        (
            {"hnsw": "x"},
            'configuration.hnsw: invalid type: string "x", expected struct HnswConfiguration',
        ),
        (
            {"hnsw": {"bogus": 1}},
            "configuration.hnsw.bogus: unknown field `bogus`, expected one of `space`, "
            "`ef_construction`, `ef_search`, `max_neighbors`, `num_threads`, `resize_factor`, "
            "`sync_threshold`, `batch_size`",
        ),
        (
            {"spann": {"bogus": 1}},
            "configuration.spann.bogus: unknown field `bogus`, expected one of `search_nprobe`, "
            "`write_nprobe`, `space`, `ef_construction`, `ef_search`, `max_neighbors`, "
            "`reassign_neighbor_count`, `split_threshold`, `merge_threshold`",
        ),
        (
            {"hnsw": {"space": "L2"}},
            "configuration.hnsw.space: unknown variant `L2`, expected one of `l2`, `cosine`, `ip`",
        ),
        (
            {"hnsw": {"ef_search": -1}},
            "configuration.hnsw.ef_search: invalid value: integer `-1`, expected usize",
        ),
        (
            {"hnsw": {"ef_search": 1.0}},
            "configuration.hnsw.ef_search: invalid type: floating point `1.0`, expected usize",
        ),
        (
            {"hnsw": {"ef_search": True}},
            "configuration.hnsw.ef_search: invalid type: boolean `true`, expected usize",
        ),
        (
            {"hnsw": {"resize_factor": "1"}},
            'configuration.hnsw.resize_factor: invalid type: string "1", expected f64',
        ),
        (
            {"embedding_function": {}},
            "configuration.embedding_function: missing field `type`",
        ),
        (
            {"embedding_function": {"type": "known", "name": "x"}},
            "configuration.embedding_function: missing field `config`",
        ),
        (
            {"embedding_function": {"type": "bogus"}},
            "configuration.embedding_function.type: unknown variant `bogus`, expected one of "
            "`legacy`, `known`, `unknown`",
        ),
        (
            {"embedding_function": {"type": "known", "name": 1, "config": {}}},
            "configuration.embedding_function: invalid type: integer `1`, expected a string",
        ),
    ],
)
def test_wrong_shapes_of_a_configuration(configuration: Any, message: str) -> None:
    with pytest.raises(Unprocessable) as refusal:
        resolved(configuration)
    assert str(refusal.value).startswith(SHAPE + message)


@pytest.mark.parametrize(
    ("configuration", "metadata", "message"),
    [
        ({"hnsw": {}, "spann": {}}, None, "Multiple vector index configurations provided"),
        (
            {"hnsw": {"space": 1}},
            None,
            "Failed to parse the request body as JSON: configuration.hnsw.space: expected value",
        ),
    ],
)
def test_refused_configurations(configuration: Any, metadata: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        resolved(configuration, metadata=metadata)
    assert type(refusal.value) is InvalidArgument
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("metadata", "configuration", "hnsw"),
    [
        ({"hnsw:space": "cosine"}, None, {"space": "cosine"}),
        ({"hnsw:space": "cosine"}, {"hnsw": {}}, {"space": "cosine"}),
        ({"hnsw:space": "cosine"}, {"embedding_function": LEGACY}, {"space": "cosine"}),
        ({"hnsw:space": "cosine", "hnsw:M": 3}, {"hnsw": {"space": "l2"}},
         {"space": "cosine", "max_neighbors": 3}),
        ({"hnsw:space": "cosine"}, {"hnsw": {"ef_search": 5}}, {"ef_search": 5}),
        ({"hnsw:space": "cosine"}, {"hnsw": {"space": "ip"}}, {"space": "ip"}),
        ({"hnsw:space": "cosine"}, {"spann": {}}, {}),
        ({"hnsw:bogus": 1}, {"spann": {}}, {}),
        ({"hnsw:M": 0, "hnsw:construction_ef": 7, "hnsw:search_ef": 8, "hnsw:num_threads": 9,
          "hnsw:resize_factor": 2, "hnsw:batch_size": 33, "hnsw:sync_threshold": 44, "x": 1}, None,
         {"max_neighbors": 0, "ef_construction": 7, "ef_search": 8, "num_threads": 9,
          "resize_factor": 2.0, "batch_size": 33, "sync_threshold": 44}),
    ],
)  # fmt: skip
def test_legacy_metadata(
    metadata: dict[str, Any], configuration: Any, hnsw: dict[str, Any]
) -> None:
    _, schema = resolved(configuration, metadata=metadata)
    config, _ = vector_configs(schema)
    assert {"space": config["space"], **config["hnsw"]} == {"space": "l2", **HNSW, **hnsw}


@pytest.mark.parametrize(
    "metadata",
    [
        {"hnsw:space": "bad"}, {"hnsw:space": 1}, {"hnsw:M": 5.0}, {"hnsw:M": "5"}, {"hnsw:M": -1},
        {"hnsw:M": True}, {"hnsw:resize_factor": "x"}, {"hnsw:batch_size": 1},
        {"hnsw:sync_threshold": 1}, {"hnsw:bogus": 1}, {"hnsw:max_neighbors": 3},
    ],
)  # fmt: skip
def test_bad_legacy_metadata(metadata: dict[str, Any]) -> None:
    for configuration in (None, {"hnsw": {"space": "ip"}}):
        with pytest.raises(InvalidArgument) as refusal:
            resolved(configuration, metadata=metadata)
        assert str(refusal.value) == "Failed to parse hnsw parameters from segment metadata"


@pytest.mark.parametrize(
    ("changes", "hnsw", "function"),
    [
        (None, {}, None),
        ({}, {}, None),
        ({"hnsw": {"ef_search": None}}, {}, None),
        ({"hnsw": {"ef_search": 0, "batch_size": 0}}, {"ef_search": 0, "batch_size": 0}, None),
        (
            {"hnsw": {"max_neighbors": 8, "num_threads": 9, "resize_factor": 2}},
            {"max_neighbors": 8, "num_threads": 9, "resize_factor": 2.0},
            None,
        ),
        ({"spann": {"ef_search": 5, "search_nprobe": 6}}, {}, None),
        ({"embedding_function": KNOWN, "hnsw": {"ef_search": 3}}, {"ef_search": 3}, KNOWN),
    ],
)
def test_update(changes: Any, hnsw: dict[str, Any], function: Any) -> None:
    before = resolved(None, on_embedding(space="cosine"))
    kept = copy.deepcopy(before)
    configuration, schema = update(*before, changes)
    assert before == kept
    expected = {**HNSW, **hnsw}
    assert shown(configuration) == {
        "hnsw": {name: {"space": "cosine", **expected}[name] for name in SHOWN},
        "spann": None,
        "embedding_function": function,
    }
    for config, space in zip(vector_configs(schema), ("cosine", "l2"), strict=True):
        assert (config["space"], config["hnsw"]) == (space, expected)
        assert config.get("embedding_function") == function


def test_update_keeps_an_embedding_function_that_it_does_not_name() -> None:
    before = resolved({"embedding_function": KNOWN})
    assert update(*before, {"embedding_function": None}) == before
    assert update(*before, {"hnsw": {"ef_search": 5}})[0]["embedding_function"] == KNOWN
    assert update(*before, {"embedding_function": LEGACY})[0]["embedding_function"] == LEGACY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hnsw": {"space": "ip"}},
            "new_configuration.hnsw.space: unknown field `space`, expected one of `ef_search`, "
            "`max_neighbors`, `num_threads`, `resize_factor`, `sync_threshold`, `batch_size`",
        ),
        ({"hnsw": {"ef_construction": 5}}, "new_configuration.hnsw.ef_construction: unknown field"),
        (
            {"spann": {"space": "l2"}},
            "new_configuration.spann.space: unknown field `space`, expected `search_nprobe` or "
            "`ef_search`",
        ),
        ({"hnsw": {"ef_search": -1}}, "new_configuration.hnsw.ef_search: invalid value"),
        ({"embedding_function": {"type": "bogus"}}, "new_configuration.embedding_function.type"),
        ([], "new_configuration: invalid type: sequence"),
    ],
)
def test_refused_updates(changes: Any, message: str) -> None:
    with pytest.raises(Unprocessable) as refusal:
        update(*resolved(), changes)
    assert str(refusal.value).startswith(SHAPE + message)


def test_update_with_both_index_kinds() -> None:
    with pytest.raises(InvalidArgument, match=r"^Multiple vector index configurations provided$"):
        update(*resolved(), {"hnsw": {}, "spann": {}})


def test_index_settings_are_clamped_to_what_a_graph_bears() -> None:
    stored, _ = resolved({"hnsw": {"space": "ip", "ef_search": 200, "max_neighbors": 24}})
    assert index_settings(stored) == IndexSettings(
        space="ip", ef_search=200, max_neighbors=24, ef_search_is_asked=True
    )
    stored, _ = resolved({"hnsw": {"ef_search": 0, "ef_construction": 0, "max_neighbors": 0}})
    assert index_settings(stored) == IndexSettings(
        ef_search=1, ef_construction=1, max_neighbors=2, ef_search_is_asked=True
    )
    huge = 2**64 - 1
    stored, _ = resolved({"hnsw": dict.fromkeys(("ef_search", "ef_construction"), huge)})
    assert index_settings(stored) == IndexSettings(
        ef_search=10_000, ef_construction=10_000, ef_search_is_asked=True
    )


@pytest.mark.parametrize(
    ("configuration", "metadata", "is_asked"),
    [
        (None, None, False),
        ({"hnsw": {"space": "ip"}}, None, False),
        ({"hnsw": {"ef_search": None}}, None, False),
        ({"hnsw": {"max_neighbors": 24}}, None, False),
        ({"hnsw": {"ef_search": 100}}, None, True),
        ({"hnsw": {"ef_search": 30}}, None, True),
        (None, {"hnsw:search_ef": 100}, True),
        (None, {"hnsw:M": 24}, False),
    ],
)
def test_what_somebody_chose_is_kept_and_not_shown(
    configuration: Any, metadata: Any, is_asked: bool
) -> None:
    stored, schema = resolve(metadata, configuration, None, num_threads=2)
    assert index_settings(stored).ef_search_is_asked == is_asked
    assert set(shown(stored)) == {"hnsw", "spann", "embedding_function"}
    changed, schema = update(stored, schema, {"hnsw": {"batch_size": 7}})
    assert index_settings(changed).ef_search_is_asked == is_asked
    changed, _ = update(changed, schema, {"hnsw": {"ef_search": 100}})
    assert index_settings(changed).ef_search_is_asked
    assert set(shown(changed)) == {"hnsw", "spann", "embedding_function"}


def test_a_configuration_of_before_it_was_kept_asks_for_what_is_not_the_default() -> None:
    for ef_search in (99, 100):
        stored = resolved({"hnsw": {"ef_search": ef_search}})[0]
        assert index_settings(shown(stored)).ef_search_is_asked == (ef_search != 100)
