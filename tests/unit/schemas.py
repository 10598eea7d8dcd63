"""Expected configurations and schemas, and short ways to write those that tests send."""

from __future__ import annotations

from typing import Any

from ochredb.configuration import resolve

# The answer to `{"name": "abc"}` on a machine with two processors.
HNSW = {
    "ef_construction": 100, "max_neighbors": 16, "ef_search": 100, "num_threads": 2,
    "batch_size": 100, "sync_threshold": 1000, "resize_factor": 1.2,
}  # fmt: skip
SHOWN = {
    "space": "l2", "ef_construction": 100, "ef_search": 100, "max_neighbors": 16,
    "resize_factor": 1.2, "sync_threshold": 1000,
}  # fmt: skip
ON: dict[str, Any] = {"enabled": True, "config": {}}
OFF: dict[str, Any] = {"enabled": False, "config": {}}
SCHEMA: dict[str, Any] = {
    "defaults": {
        "string": {"fts_index": OFF, "string_inverted_index": ON},
        "float_list": {"vector_index": {"enabled": False, "config": {"space": "l2", "hnsw": HNSW}}},
        "sparse_vector": {
            "sparse_vector_index": {
                "enabled": False,
                "config": {"embedding_function": {"type": "unknown"}, "bm25": False},
            }
        },
        "int": {"int_inverted_index": ON},
        "float": {"float_inverted_index": ON},
        "bool": {"bool_inverted_index": ON},
    },
    "keys": {
        "#document": {"string": {"fts_index": ON, "string_inverted_index": OFF}},
        "#embedding": {
            "float_list": {
                "vector_index": {
                    "enabled": True,
                    "config": {"space": "l2", "source_key": "#document", "hnsw": HNSW},
                }
            }
        },
    },
}
EMPTY: dict[str, Any] = {"defaults": {}, "keys": {}}
LEGACY = {"type": "legacy"}
KNOWN = {"type": "known", "name": "x", "config": {"a": {"b": 1.5}}}
DEFAULT_FUNCTION = {"type": "known", "name": "default", "config": {}}
CONFLICT = "Failed to reconcile schema: Cannot set both collection config and schema simultaneously"
SHAPE = "Failed to deserialize the JSON body into the target type: "


def on_embedding(*, enabled: bool = True, **config: Any) -> dict[str, Any]:
    index = {"enabled": enabled, "config": config}
    return {"defaults": {}, "keys": {"#embedding": {"float_list": {"vector_index": index}}}}


def with_keys(**keys: Any) -> dict[str, Any]:
    return {"defaults": {}, "keys": keys}


def resolved(
    configuration: Any = None, schema: Any = None, metadata: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    return resolve(metadata, configuration, schema, num_threads=2)


def vector_configs(schema: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of `#embedding` and of the defaults."""
    first = schema["keys"]["#embedding"]["float_list"]["vector_index"]["config"]
    return first, schema["defaults"]["float_list"]["vector_index"]["config"]
