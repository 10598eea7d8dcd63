"""Refusals of JSON that parses but has the wrong shape (422), worded as Chroma's server words them.

raise wrong_shape("metadatas[0]", f"invalid type: {describe(item)}, expected a map")
"""

from __future__ import annotations

from typing import Any

import orjson

from ochredb.errors import Unprocessable


def wrong_shape(path: str, problem: str) -> Unprocessable:
    """The error to raise. path: where in the document, like `configuration.hnsw.space`."""
    return Unprocessable(
        f"Failed to deserialize the JSON body into the target type: {path}: {problem}"
    )


def describe(value: Any) -> str:
    """What a parsed JSON value is, in words that quote short values."""
    if value is None:
        return "null"
    if value is True or value is False:
        return f"boolean `{str(value).lower()}`"
    if isinstance(value, int):
        return f"integer `{value}`"
    if isinstance(value, float):
        return f"floating point `{orjson.dumps(value).decode()}`"
    if isinstance(value, str):
        text = value if len(value) <= 100 else value[:100] + "..."
        return f'string "{text}"'
    return "sequence" if isinstance(value, list) else "map"


def expect_map(value: Any, path: str, expected: str = "a map") -> dict[str, Any]:
    """`value` if it is a JSON object; raises Unprocessable otherwise."""
    if not isinstance(value, dict):
        raise wrong_shape(path, f"invalid type: {describe(value)}, expected {expected}")
    return value
