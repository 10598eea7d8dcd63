"""From the JSON of `where` and `where_document` to the syntax tree in `where`.

    parse_where({"$and": [{"year": {"$gte": 1990}}, {"#document": {"$contains": "war"}}]})
    combine(parse_where(body.get("where")), parse_where_document(body.get("where_document")))

The language is rest-contract section 8. An object has exactly one key: `$and` or `$or` with a list
of any length, or a condition. Anything else is refused with 400, as is what exceeds the limits
below, so that no request can make a filter arbitrarily costly. Integers beyond int64 become floats.
Patterns are RE2's syntax, which has no look-around and no back-references; its `\\d`, `\\w` and
`\\b` know ASCII only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ochredb.errors import InvalidArgument
from ochredb.metadata import INT64_MAX, INT64_MIN
from ochredb.where import (
    And,
    Compare,
    ComparisonOp,
    DocumentContains,
    DocumentMatches,
    IdIn,
    ListContains,
    OneOf,
    Or,
    Scalar,
    Where,
)

DEPTH_MAX = 64  # Nested $and and $or.
NODES_MAX = 1_000  # Conditions and connectives in one filter; the length of $in is not limited.
PATTERN_BYTES_MAX = 4_096  # Of one regular expression, in UTF-8.

DOCUMENT_KEY, ID_KEY = "#document", "#id"

_ORDERINGS: dict[str, ComparisonOp] = {"$gt": "$gt", "$gte": "$gte", "$lt": "$lt", "$lte": "$lte"}
_EQUALITIES: dict[str, ComparisonOp] = {"$eq": "$eq", "$ne": "$ne"}


def parse_where(filter_json: Any) -> Where | None:
    """The tree of a `where`; None if it is null. Raises InvalidArgument."""
    return None if filter_json is None else _Parser("Invalid where clause", _condition).parse(
        filter_json, 0
    )  # fmt: skip


def parse_where_document(filter_json: Any) -> Where | None:
    """The tree of a `where_document`; None if it is null. Raises InvalidArgument."""
    return None if filter_json is None else _Parser(
        "Invalid where document clause", _document_condition
    ).parse(filter_json, 0)  # fmt: skip


def combine(first: Where | None, second: Where | None) -> Where | None:
    """Both filters at once; None if neither is there."""
    if first is None or second is None:
        return first if second is None else second
    return And((first, second))


def check_pattern(pattern: str) -> None:
    """Raise InvalidArgument unless `pattern` is a regular expression of acceptable size.

    Cost: about 20 µs for a new pattern (the first call imports pyarrow.compute, 30 ms); patterns
    that were checked lately are free.
    """
    try:
        length = len(pattern.encode())
    except UnicodeEncodeError as error:  # A lone surrogate; no JSON parser lets one through.
        raise InvalidArgument(f"Regex syntax errror: {error}") from error
    if length > PATTERN_BYTES_MAX:
        raise InvalidArgument(
            f"Regex syntax errror: the pattern is longer than {PATTERN_BYTES_MAX} bytes"
        )
    _compile(pattern)


@lru_cache(maxsize=1_024)
def _compile(pattern: str) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        pc.match_substring_regex(pa.array([""], pa.string()), pattern)
    except pa.ArrowInvalid as error:
        problem = str(error).removeprefix("Invalid regular expression: ")
        raise InvalidArgument(f"Regex syntax errror: {problem}") from error


class _Parser:
    """Connectives, and the limits; `condition` parses the other objects."""

    def __init__(self, refusal: str, condition: Callable[[_Parser, str, Any], Where]) -> None:
        self._refusal, self._condition = refusal, condition
        self._nodes = 0

    def refused(self, reason: str = "") -> InvalidArgument:
        return InvalidArgument(self._refusal + reason)

    def only_entry(self, value: Any) -> tuple[str, Any]:
        """The key and value of an object that has exactly one."""
        if not isinstance(value, dict) or len(value) != 1:
            raise self.refused()
        entry: tuple[str, Any] = next(iter(value.items()))
        return entry

    def parse(self, value: Any, depth: int) -> Where:
        key, operand = self.only_entry(value)
        self._nodes += 1
        if self._nodes > NODES_MAX:
            raise self.refused(f": it has more than {NODES_MAX} conditions")
        if key not in ("$and", "$or"):
            return self._condition(self, key, operand)
        if not isinstance(operand, list):
            raise self.refused()
        if depth == DEPTH_MAX:
            raise self.refused(f": it is nested more than {DEPTH_MAX} deep")
        children = tuple([self.parse(child, depth + 1) for child in operand])
        return And(children) if key == "$and" else Or(children)


def _document_condition(parser: _Parser, operator: str, operand: Any) -> Where:
    if type(operand) is not str:
        raise parser.refused()
    match operator:
        case "$contains" | "$not_contains":
            return DocumentContains(operand, negated=operator == "$not_contains")
        case "$regex" | "$not_regex":
            check_pattern(operand)
            return DocumentMatches(operand, negated=operator == "$not_regex")
    raise parser.refused()


def _condition(parser: _Parser, key: str, value: Any) -> Where:
    if key.startswith("$"):
        raise parser.refused()
    operator, operand = parser.only_entry(value) if isinstance(value, dict) else ("$eq", value)
    if key == DOCUMENT_KEY and operator in ("$contains", "$not_contains", "$regex", "$not_regex"):
        return _document_condition(parser, operator, operand)
    if operator in ("$in", "$nin"):
        return _one_of(parser, key, operand, negated=operator == "$nin")
    scalar = _scalar(parser, operand)
    if (equality := _EQUALITIES.get(operator)) is not None:
        if key == ID_KEY and isinstance(scalar, str):
            return IdIn((scalar,), negated=operator == "$ne")
        return Compare(key, equality, scalar)
    if (ordering := _ORDERINGS.get(operator)) is not None and type(scalar) in (int, float):
        return Compare(key, ordering, scalar)
    if operator in ("$contains", "$not_contains"):
        return ListContains(key, scalar, negated=operator == "$not_contains")
    raise parser.refused()


def _scalar(parser: _Parser, value: Any) -> Scalar:
    if type(value) is int and not INT64_MIN <= value <= INT64_MAX:
        return float(value)
    if type(value) not in (str, int, float, bool):
        raise parser.refused()
    scalar: Scalar = value
    return scalar


def _one_of(parser: _Parser, key: str, operand: Any, *, negated: bool) -> Where:
    if not isinstance(operand, list) or not operand:
        raise parser.refused()
    kinds = set(map(type, operand))
    # The first element decides: floats admit integers, but integers do not admit floats.
    if len(kinds) != 1 and not (type(operand[0]) is float and kinds == {int, float}):
        raise parser.refused()
    if key == ID_KEY and kinds == {str}:
        return IdIn(tuple(operand), negated)
    values = [_scalar(parser, value) for value in operand]
    if float in kinds:
        # Among floats, integers are floats too, but for those that would be rounded.
        values = [float(v) if type(v) is int and float(v) == v else v for v in values]
    # One type per node: integers beyond int64, now floats, and those among floats, still
    # integers, get their own.
    nodes = [
        OneOf(key, tuple(group), negated)
        for kind in dict.fromkeys(map(type, values))
        if (group := [value for value in values if type(value) is kind])
    ]
    if len(nodes) == 1:
        return nodes[0]
    return And(tuple(nodes)) if negated else Or(tuple(nodes))
