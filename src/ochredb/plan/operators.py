"""The steps of a read, each small, typed and explainable: with a trace, each says what it did.

    Filter -> Nearest (or Page) -> Project

Rows are named by (segment, row) within a View. Answers do not depend on how rows are spread over
segments: Nearest sorts by (distance, seq), Page by seq, and both cut only after merging.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ochredb.cancel import Cancel
from ochredb.explain import PlanStep, Trace, Value
from ochredb.plan.filter import evaluate
from ochredb.segment import Rows, SegmentView, View
from ochredb.types import Bools, Field, Float32s, Records
from ochredb.vectors.codes import CodesOnUse
from ochredb.where import Where

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of one segment that may answer.

    mask: bool[n] of live matches, None = every row. codes: of these rows, if they are kept.
    """

    view: SegmentView
    mask: Bools | None
    count: int
    filtered: bool
    codes: CodesOnUse | None = None

    def rows(self) -> Rows | None:
        return None if self.mask is None else np.flatnonzero(self.mask)


@dataclass(frozen=True, slots=True)
class Hits:
    """Rows of an answer, in order; of several answers one after the other.

    segments: int64[n], rows: int64[n], distances: float32[n]. splits: answer i is what lies at
    [splits[i], splits[i + 1]).
    """

    segments: NDArray[np.int64]
    rows: Rows
    splits: list[int]
    distances: Float32s | None = None

    def __post_init__(self) -> None:
        assert self.segments.shape == self.rows.shape
        assert self.distances is None or self.distances.shape == self.rows.shape
        assert self.splits[-1] == len(self.rows)

    def answers(self, first: int, stop: int) -> Hits:
        """Answers [first, stop)."""
        start = self.splits[first]
        piece = slice(start, self.splits[stop])
        return Hits(
            self.segments[piece],
            self.rows[piece],
            [split - start for split in self.splits[first : stop + 1]],
            None if self.distances is None else self.distances[piece],
        )


def step(trace: Trace | None, operator: str) -> AbstractContextManager[PlanStep | None]:
    """A step of the plan, if it is asked for."""
    return nullcontext() if trace is None else trace.step(operator)


def named(item: SegmentView) -> dict[str, Value]:
    """Which segment a step worked on."""
    return {"part": item.part_id or "tail", "rows": len(item.segment)}


class Opening:
    """Notes in a step how many bytes of a segment had to be read and verified for it."""

    def __init__(self, item: SegmentView, plan: PlanStep | None) -> None:
        self._segment, self._plan = item.segment, plan

    def __enter__(self) -> None:
        if self._plan is not None:
            self._before = self._segment.verified_bytes

    def __exit__(self, *_: object) -> None:
        if self._plan is not None:
            read = self._segment.verified_bytes - self._before
            self._plan.details["bytes_read"] = read
            self._plan.details["cached"] = read == 0


@dataclass(frozen=True, slots=True)
class Filter:
    """Live rows that match a where tree and, if given, have one of these ids, which differ."""

    where: Where | None = None
    ids: tuple[str, ...] | None = None

    def run(self, view: View, cancel: Cancel, trace: Trace | None = None) -> list[Selection]:
        if self.where is None and self.ids is None:
            return [Selection(item, item.live, item.live_count, False) for item in view.segments]
        with step(trace, "Filter") as plan:
            if plan is not None:
                plan.details["where"] = None if self.where is None else repr(self.where)
                plan.details["ids"] = None if self.ids is None else len(self.ids)
            selections = self._run(view, cancel, trace)
            if plan is not None:
                plan.details["rows_in"] = view.count
                plan.details["rows_out"] = sum(item.count for item in selections)
        return selections

    def _run(self, view: View, cancel: Cancel, trace: Trace | None) -> list[Selection]:
        selections = []
        found = view.find_ids(self.ids) if self.ids is not None else None
        for position, item in enumerate(view.segments):
            cancel.check()
            mask = item.live
            if found is not None:
                rows = found[position]
                rows = rows[rows >= 0]
                if not len(rows):
                    continue
                mask = np.zeros(len(item.segment), np.bool_)
                mask[rows] = True
                if self.where is None:
                    selections.append(Selection(item, mask, len(rows), True))  # An id lives once.
                    continue
            if self.where is not None:
                with step(trace, "Evaluate") as plan, Opening(item, plan):
                    mask = evaluate(self.where, item.segment, mask, cancel)
                    if plan is not None:
                        plan.details |= named(item)
                        plan.details["rows_out"] = int(np.count_nonzero(mask))
            assert mask is not None
            count = int(np.count_nonzero(mask))
            if count:
                selections.append(Selection(item, mask, count, True))
        return selections


@dataclass(frozen=True, slots=True)
class Page:
    """Rows in order of first insertion: `limit` (None = all) of them after `offset`."""

    limit: int | None
    offset: int = 0

    def run(self, view: View, selections: list[Selection]) -> Hits:
        stop = None if self.limit is None else self.offset + self.limit
        numbers = {id(item): number for number, item in enumerate(view.segments)}
        segments, rows, seqs = [], [], []
        for selection in selections:
            segment = selection.view.segment
            chosen = selection.rows()
            if chosen is None:
                cut = stop if segment.sorted_by_seq else None
                chosen = np.arange(len(segment) if cut is None else min(cut, len(segment)))
            if segment.sorted_by_seq:
                chosen = chosen[:stop]
            number = numbers[id(selection.view)]
            if len(selections) == 1 and segment.sorted_by_seq:  # Nothing to merge with.
                chosen = chosen[self.offset :]
                return Hits(np.full(len(chosen), number), chosen, [0, len(chosen)])
            segments.append(np.full(len(chosen), number))
            rows.append(chosen)
            seqs.append(segment.seqs[chosen])
        if not rows:
            empty = np.empty(0, np.int64)
            return Hits(empty, empty, [0, 0])
        all_rows = np.concatenate(rows)
        order = np.argsort(np.concatenate(seqs), kind="stable")[self.offset : stop]
        return Hits(np.concatenate(segments)[order], all_rows[order], [0, len(order)])


@dataclass(frozen=True, slots=True)
class Project:
    """The columns of an answer's rows."""

    fields: Field

    def run(self, view: View, hits: Hits) -> Records:
        count = len(hits.rows)
        # `np.unique` would import numpy.ma, 20 ms of a server's first answer.
        numbers = np.flatnonzero(np.bincount(hits.segments)) if count > 1 else hits.segments
        if len(numbers) == 1:
            return self.take(view.segments[int(numbers[0])], hits.rows)
        answer = Records(
            ids=[""] * count,
            documents=[None] * count if Field.DOCUMENT in self.fields else None,
            uris=[None] * count if Field.URI in self.fields else None,
            metadatas=[None] * count if Field.METADATA in self.fields else None,
        )
        if Field.EMBEDDING in self.fields:
            answer.embeddings = np.empty((count, view.dimension or 0), np.float32)
        for number in numbers.tolist():
            places = np.flatnonzero(hits.segments == number)
            taken = self.take(view.segments[number], hits.rows[places])
            _put(answer.ids, places, taken.ids)
            _put(answer.documents, places, taken.documents)
            _put(answer.uris, places, taken.uris)
            _put(answer.metadatas, places, taken.metadatas)
            if answer.embeddings is not None:
                answer.embeddings[places] = taken.embeddings
        return answer

    def take(self, item: SegmentView, rows: Rows) -> Records:
        """Rows of one segment, in the given order."""
        segment, fields = item.segment, self.fields
        return Records(
            ids=segment.take_ids(rows),
            documents=segment.take_documents(rows) if Field.DOCUMENT in fields else None,
            uris=segment.take_uris(rows) if Field.URI in fields else None,
            metadatas=segment.take_metadatas(rows) if Field.METADATA in fields else None,
            embeddings=segment.vectors[rows] if Field.EMBEDDING in fields else None,
        )


def _put(target: list[_T] | None, places: Rows, values: list[_T] | None) -> None:
    """Set target[places[i]] = values[i]; nothing if the column was not asked for."""
    if target is not None and values is not None:
        for place, value in zip(places.tolist(), values, strict=True):
            target[place] = value
