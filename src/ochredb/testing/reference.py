"""The meaning of the filter language, written to be obviously right rather than fast.

    matches(parse_where({"year": {"$ne": 1999}}), ReferenceRecord(id="a"))   # True

Every other evaluator is tested against this one. Semantics: rest-contract section 8.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ochredb.where import (
    And,
    Compare,
    DocumentContains,
    DocumentMatches,
    IdIn,
    ListContains,
    OneOf,
    Or,
    Where,
)

_ORDERINGS = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRecord:
    """What a filter looks at. metadata: as parsed from JSON; None or {}: no metadata."""

    id: str
    document: str | None = None
    metadata: dict[str, Any] | None = None


def matches(where: Where | None, record: ReferenceRecord) -> bool:
    """Whether the record passes the filter; None lets everything pass."""
    metadata = record.metadata or {}
    match where:
        case None:
            return True
        case And(children):
            return all(matches(child, record) for child in children)
        case Or(children):
            return any(matches(child, record) for child in children)
        case Compare(key, "$eq", value):
            return key in metadata and equal(metadata[key], value)
        case Compare(key, "$ne", value):
            return not (key in metadata and equal(metadata[key], value))
        case Compare(key, op, value):
            stored: Any = metadata.get(key)
            # Python orders integers and floats exactly, whatever their size.
            return is_number(stored) and is_number(value) and bool(_ORDERINGS[op](stored, value))
        case OneOf(key, values, negated):
            found = key in metadata and any(equal(metadata[key], value) for value in values)
            return found != negated
        case ListContains(key, value, negated):
            elements = metadata[key] if isinstance(metadata.get(key), list) else []
            found = any(type(item) is type(value) and item == value for item in elements)
            return found != negated
        case DocumentContains(needle, negated):
            return (record.document is not None and needle in record.document) != negated
        case DocumentMatches(pattern, negated):
            found = record.document is not None and matches_pattern(record.document, pattern)
            return found != negated
        case IdIn(ids, negated):
            return (record.id in ids) != negated


def is_number(value: Any) -> bool:
    """An integer or float; a boolean is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def equal(stored: Any, value: Any) -> bool:
    """Numbers by their exact value; anything else only within one type; a list equals nothing."""
    if is_number(stored) and is_number(value):
        return bool(stored == value)
    return type(stored) is type(value) and not isinstance(stored, list) and bool(stored == value)


def matches_pattern(document: str, pattern: str) -> bool:
    """RE2, unanchored, one document at a time."""
    found = pc.match_substring_regex(pa.array([document], pa.large_string()), pattern)
    return bool(found[0].as_py())
