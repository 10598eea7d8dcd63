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

from ochredb.cancel import Cancel
from ochredb.parts.columns import BytesColumn, Check, go_on
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


def evaluate(
    where: Where, segment: Segment, live: Bools | None, cancel: Cancel | None = None
) -> Bools:
    """bool[n]: the live rows of the segment that match (a new array).

    live: bool[n], or None if all rows live.
    cancel: asked about every millisecond while documents are searched.

    Raises InvalidArgument if RE2 refuses a pattern; Cancelled, DeadlineExceeded.
    """
    possible = np.ones(len(segment), dtype=np.bool_) if live is None else live
    check = go_on if cancel is None else cancel.check
    matched = _Evaluation(segment, check).mask(where, possible)
    return matched if live is None else np.logical_and(matched, live, out=matched)


class _Evaluation:
    """Of one filter on one segment."""

    def __init__(self, segment: Segment, check: Check) -> None:
        self._segment, self._check = segment, check

    def mask(self, where: Where, possible: Bools) -> Bools:
        """bool[n], right where `possible` is set and meaningless elsewhere; a new array."""
        segment = self._segment
        match where:
            case And(children):
                return self._all(children, possible)
            case Or(children):
                return self._any(children, possible)
            case Compare(key, op, value):
                if op == "$ne":
                    return _complement(segment.metadata.compare(key, "$eq", value), True)
                return segment.metadata.compare(key, op, value)
            case OneOf(key, values, negated):
                return _complement(segment.metadata.one_of(key, values), negated)
            case ListContains(key, value, negated):
                return _complement(segment.metadata.list_contains(key, value), negated)
            case IdIn(ids, negated):
                rows = segment.find_ids(ids)
                mask = np.zeros(len(segment), dtype=np.bool_)
                mask[rows[rows >= 0]] = True
                return _complement(mask, negated)
            case DocumentContains(needle, negated):
                return _complement(self._contains(needle, possible), negated)
            case DocumentMatches(pattern, negated):
                return _complement(self._matches(pattern, possible), negated)

    def _all(self, children: tuple[Where, ...], possible: Bools) -> Bools:
        matched: Bools | None = None
        for child in sorted(children, key=_cost):
            left = possible if matched is None else matched
            # Documents are searched only in rows that can still match.
            if matched is not None and _cost(child) and not left.any():
                break
            found = self.mask(child, left)
            if matched is None:
                matched = np.logical_and(found, possible, out=found)
            else:
                matched &= found
        return possible.copy() if matched is None else matched

    def _any(self, children: tuple[Where, ...], possible: Bools) -> Bools:
        matched: Bools | None = None
        for child in sorted(children, key=_cost):
            missing = possible
            if matched is not None and _cost(child):
                missing = possible & ~matched
                if not missing.any():
                    break
            found = self.mask(child, missing)
            if matched is None:
                matched = found
            elif missing is possible:
                matched |= found
            else:
                matched |= np.logical_and(found, missing, out=found)
        return np.zeros(len(self._segment), np.bool_) if matched is None else matched

    def _contains(self, needle: str, possible: Bools) -> Bools:
        # Unpaired surrogates are encoded too: no document has them.
        key = needle.encode("utf-8", "surrogatepass")
        documents = self._segment.documents
        if not key:
            return documents.present.copy()
        rows = self._rows_to_verify(key, possible)
        if rows is None:
            return documents.contains(key, self._check)
        mask = np.zeros(len(self._segment), dtype=np.bool_)
        mask[rows] = documents.contains_rows(key, rows, self._check)
        return mask

    def _matches(self, pattern: str, possible: Bools) -> Bools:
        documents = self._segment.documents
        rows = self._rows_to_verify(literal_of(pattern), possible)
        if rows is None:
            return documents.matches(pattern, self._check)
        mask = np.zeros(len(self._segment), dtype=np.bool_)
        mask[rows] = documents.matches_rows(pattern, rows, self._check)
        return mask

    def _rows_to_verify(
        self, literal: bytes | None, possible: Bools
    ) -> NDArray[np.signedinteger] | None:
        """The possible rows that may contain `literal` (None: anything); None: search them all."""
        segment = self._segment
        index = None if literal is None else segment.text
        candidates = None if index is None or literal is None else index.candidates(literal)
        rows: NDArray[np.signedinteger]
        if candidates is not None:
            rows = candidates[possible[candidates]]
        else:
            rows = np.flatnonzero(possible)
        size_bytes = segment.documents.size_bytes
        average_bytes = size_bytes // max(1, len(segment))
        return rows if len(rows) * (_ROW_COST_BYTES + average_bytes) < size_bytes else None


def _complement(mask: Bools, negated: bool) -> Bools:
    """`mask` itself, complemented in place if negated."""
    return np.logical_not(mask, out=mask) if negated else mask


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
