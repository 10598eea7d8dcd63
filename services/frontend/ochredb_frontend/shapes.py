"""Checks of decoded JSON: one function per shape, each with the wire's message on refusal.

JSON that does not parse is 400 (InvalidArgument); JSON of the wrong shape is 422 (Unprocessable).
Every message names the field.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import parse_qsl

import orjson

from ochredb.errors import InvalidArgument, Unprocessable
from ochredb.json_shape import describe
from ochredb.json_text import loads
from ochredb_frontend.messages import Request, unsupported_media_type

U32_MAX = 2**32 - 1
_CANONICAL_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_BOOLEANS = {"true": True, "false": False}
_STRING: frozenset[type] = frozenset((str,))
_STRING_OR_NULL: frozenset[type] = frozenset((str, type(None)))


def wrong_shape(message: str) -> Unprocessable:
    return Unprocessable(f"Failed to deserialize the JSON body into the target type: {message}")


def wrong_type(field: str, value: object, expected: str) -> Unprocessable:
    return wrong_shape(f"{field}: invalid type: {describe(value)}, expected {expected}")


def require_json(request: Request) -> None:
    """Raises the 415 refusal unless the request says that its body is JSON."""
    content_type = request.headers.get("content-type", "")
    if content_type == "application/json":
        return
    essence = content_type.partition(";")[0].strip().lower()
    if essence == "application/json":
        return
    if essence.startswith("application/") and essence.endswith("+json"):
        return
    raise unsupported_media_type()


def json_object(request: Request) -> dict[str, Any]:
    """The request's body. Raises 415, InvalidArgument or Unprocessable."""
    require_json(request)
    try:
        value = loads(request.body)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(
            f"Failed to parse the request body as JSON: {error.msg}"
            f" at line {error.lineno} column {error.colno}"
        ) from None
    if not isinstance(value, dict):
        raise wrong_shape(f"invalid type: {describe(value)}, expected a map")
    return value


def require(body: Mapping[str, Any], field: str) -> Any:
    try:
        return body[field]
    except KeyError:
        raise wrong_shape(f"missing field `{field}`") from None


def string(body: Mapping[str, Any], field: str) -> str:
    value = require(body, field)
    if not isinstance(value, str):
        raise wrong_type(field, value, "a string")
    return value


def optional_string(body: Mapping[str, Any], field: str) -> str | None:
    return None if body.get(field) is None else string(body, field)


def boolean(body: Mapping[str, Any], field: str, default: bool) -> bool:
    value = body.get(field, default)
    if not isinstance(value, bool):
        raise wrong_type(field, value, "a boolean")
    return value


def u32(body: Mapping[str, Any], field: str) -> int | None:
    """An integer of 0 to 2**32 - 1, or None if it is absent or null."""
    value = body.get(field)
    if value is None:
        return None
    if type(value) is not int:
        raise wrong_type(field, value, "u32")
    if not 0 <= value <= U32_MAX:
        raise wrong_shape(f"{field}: invalid value: integer `{value}`, expected u32")
    return value


def share(body: Mapping[str, Any], field: str) -> float | None:
    """A number of 0 or more and below 1, or None if it is absent or null."""
    value = body.get(field)
    if value is None:
        return None
    if type(value) is not float and type(value) is not int:
        raise wrong_type(field, value, "a number")
    if not 0 <= value < 1:
        raise wrong_shape(
            f"{field}: invalid value: {describe(value)}, expected at least 0 and below 1"
        )
    return float(value)


def strings(field: str, value: object) -> list[str]:
    """A list of strings. Cost: one pass in C."""
    if not isinstance(value, list):
        raise wrong_type(field, value, "a sequence")
    _check_items(field, value, _STRING)
    return value


def optional_strings(field: str, value: object) -> list[str] | None:
    return None if value is None else strings(field, value)


def nullable_strings(field: str, value: object) -> list[str | None] | None:
    """A list of strings and nulls, or None if absent or null."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise wrong_type(field, value, "a sequence")
    _check_items(field, value, _STRING_OR_NULL)
    return value


def _check_items(field: str, items: list[Any], allowed: Collection[type]) -> None:
    if set(map(type, items)) <= set(allowed):
        return
    for index, item in enumerate(items):
        if type(item) not in allowed:
            raise wrong_type(f"{field}[{index}]", item, "a string")


def collection_id(request: Request) -> str:
    """The path's collection id in canonical form."""
    text = request.parameters["collection_id"]
    if _CANONICAL_UUID.fullmatch(text):
        return text
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise InvalidArgument("Collection ID is not a valid UUIDv4") from None


def query_flag(request: Request, name: str) -> bool:
    """A field of the query string that is `true`, `false` or absent. Raises InvalidArgument."""
    text = query_parameters(request).get(name, "false")
    if text not in _BOOLEANS:
        raise InvalidArgument(
            f"Failed to deserialize query string: {name}: {text!r} is not `true` or `false`"
        )
    return _BOOLEANS[text]


def query_parameters(request: Request) -> dict[str, str]:
    """The query string. Raises InvalidArgument on a repeated field or bytes that are not UTF-8."""
    if not request.query_string:
        return {}
    try:
        pairs = parse_qsl(request.query_string, keep_blank_values=True, errors="strict")
    except ValueError as error:
        raise InvalidArgument(f"Failed to deserialize query string: {error}") from None
    parameters = dict(pairs)
    if len(parameters) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise InvalidArgument(f"Failed to deserialize query string: duplicate field `{repeated}`")
    return parameters


def query_u32(parameters: Mapping[str, str], field: str) -> int | None:
    text = parameters.get(field)
    if text is None:
        return None
    if text.isascii() and text.isdigit() and int(text[:11]) <= U32_MAX and len(text) <= 11:
        return int(text)
    problem = (
        "cannot parse integer from empty string" if not text
        else "number too large to fit in target type" if text.isascii() and text.isdigit()
        else "invalid digit found in string"
    )  # fmt: skip
    raise InvalidArgument(f"Failed to deserialize query string: {field}: {problem}")
