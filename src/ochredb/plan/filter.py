"""The filter evaluator: from a `where` tree and a segment to the mask of the rows that match.

One evaluator serves parts and tail alike. Indexes decide what they can decide exactly (metadata,
ids) and only prune otherwise (text); what is left is verified on the stored documents, on no more
rows than still can matter. Results are bool masks (docs/decisions/0002-filters-are-masks.md).

    evaluate(And((Compare("year", "$gt", 1990), DocumentContains("tower", False))), part, live)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ochredb.parts.columns import BytesColumn
from ochredb.parts.metadata import MetadataIndex
from ochredb.parts.text import TextIndex
from ochredb.plan.literals import literal_of
from ochredb.types import Bools
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

# To look at one row costs as much as to search this many bytes in one pass over all of them.
_ROW_COST_BYTES = 1_500


class Segment(Protocol):
    """Rows 0..n-1 of a part, or of a piece of the in-memory tail."""

    def __len__(self) -> int: ...

    @property
    def metadata(self) -> MetadataIndex: ...

    @property
    def documents(self) -> BytesColumn: ...

    @property
    def text(self) -> TextIndex | None:
        """None: there is no index, scan."""
        ...

    def find_ids(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """int64[m]: the row of each id, -1 where it is not here."""
        ...


def evaluate(where: Where, segment: Segment, live: Bools | None) -> Bools:
    """bool[n]: the live rows of the segment that match (a new array).

    live: bool[n], or None if all rows live.

    Raises InvalidArgument if RE2 refuses a pattern.
    """
    possible = np.ones(len(segment), dtype=np.bool_) if live is None else live
    matched = _evaluate(where, segment, possible)
    return matched if live is None else matched & live


def _evaluate(where: Where, segment: Segment, possible: Bools) -> Bools:
    """bool[n], right where `possible` is set and meaningless elsewhere; a new array."""
    match where:
        case And(children):
            matched = possible.copy()
            for child in sorted(children, key=_cost):
                matched &= _evaluate(child, segment, matched)
                if not matched.any():
                    break
            return matched
        case Or(children):
            matched = np.zeros(len(segment), dtype=np.bool_)
            missing = possible
            for child in sorted(children, key=_cost):
                if not missing.any():
                    break
                matched |= _evaluate(child, segment, missing)
                missing = possible & ~matched
            return matched
        case Compare(key, op, value):
            if op == "$ne":
                return ~segment.metadata.compare(key, "$eq", value)
            return segment.metadata.compare(key, op, value)
        case OneOf(key, values, negated):
            return segment.metadata.one_of(key, values) ^ negated
        case ListContains(key, value, negated):
            return segment.metadata.list_contains(key, value) ^ negated
        case IdIn(ids, negated):
            rows = segment.find_ids(ids)
            mask = np.zeros(len(segment), dtype=np.bool_)
            mask[rows[rows >= 0]] = True
            return mask ^ negated
        case DocumentContains(needle, negated):
            return _contains(needle, segment, possible) ^ negated
        case DocumentMatches(pattern, negated):
            return _matches(pattern, segment, possible) ^ negated


def _cost(where: Where) -> int:
    """What an evaluation costs, roughly: indexes 0, substrings 1, patterns 2."""
    match where:
        case And(children) | Or(children):
            return max(map(_cost, children), default=0)
        case DocumentContains():
            return 1
        case DocumentMatches():
            return 2
        case _:
            return 0


def _contains(needle: str, segment: Segment, possible: Bools) -> Bools:
    # Unpaired surrogates are encoded too: no document has them.
    key = needle.encode("utf-8", "surrogatepass")
    documents = segment.documents
    if not key:
        return documents.present.copy()
    rows = _rows_to_verify(key, segment, possible)
    if rows is None:
        return documents.contains(key)
    mask = np.zeros(len(segment), dtype=np.bool_)
    mask[rows] = documents.contains_rows(key, rows)
    return mask


def _matches(pattern: str, segment: Segment, possible: Bools) -> Bools:
    documents = segment.documents
    rows = _rows_to_verify(literal_of(pattern), segment, possible)
    if rows is None:
        return documents.matches(pattern)
    mask = np.zeros(len(segment), dtype=np.bool_)
    mask[rows] = documents.matches_rows(pattern, rows)
    return mask


def _rows_to_verify(
    literal: bytes | None, segment: Segment, possible: Bools
) -> NDArray[np.signedinteger] | None:
    """The possible rows that may contain `literal` (None: anything); None: search all at once."""
    index = segment.text
    candidates = None if index is None or literal is None else index.candidates(literal)
    rows: NDArray[np.signedinteger]
    if candidates is not None:
        rows = candidates[possible[candidates]]
    else:
        rows = np.flatnonzero(possible)
    size_bytes = segment.documents.size_bytes
    average_bytes = size_bytes // max(1, len(segment))
    return rows if len(rows) * (_ROW_COST_BYTES + average_bytes) < size_bytes else None
