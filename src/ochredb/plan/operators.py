"""The steps of a read, each small, typed and explainable: the `repr` of one says what it does.

    Filter -> Nearest (or Page) -> Project

Rows are named by (segment, row) within a View. Answers do not depend on how rows are spread over
segments: Nearest sorts by (distance, seq), Page by seq, and both cut only after merging.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ochredb.cancel import Cancel
from ochredb.plan import cost
from ochredb.plan.filter import evaluate
from ochredb.segment import Rows, SegmentView, View
from ochredb.types import Bools, Field, Float32s, Records
from ochredb.vectors.distance import Space
from ochredb.vectors.scan import Estimates, estimates, finish, limit_of
from ochredb.where import Where

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of one segment that may answer. mask: bool[n] of live matches, None = every row."""

    view: SegmentView
    mask: Bools | None
    count: int
    filtered: bool

    def rows(self) -> Rows | None:
        return None if self.mask is None else np.flatnonzero(self.mask)


@dataclass(frozen=True, slots=True)
class Hits:
    """Rows of an answer, in order. segments: int64[n], rows: int64[n], distances: float32[n]."""

    segments: NDArray[np.int64]
    rows: Rows
    distances: Float32s | None = None

    def __post_init__(self) -> None:
        assert self.segments.shape == self.rows.shape
        assert self.distances is None or self.distances.shape == self.rows.shape


@dataclass(frozen=True, slots=True)
class Filter:
    """Live rows that match a where tree and, if given, have one of these ids."""

    where: Where | None = None
    ids: tuple[str, ...] | None = None

    def run(self, view: View, cancel: Cancel) -> list[Selection]:
        if self.where is None and self.ids is None:
            return [Selection(item, item.live, item.live_count, False) for item in view.segments]
        selections = []
        found = view.find_ids(self.ids) if self.ids is not None else None
        for position, item in enumerate(view.segments):
            cancel.check()
            mask = item.live
            if found is not None:
                mask = np.zeros(len(item.segment), np.bool_)
                mask[found[position][found[position] >= 0]] = True
                if not mask.any():
                    continue
            if self.where is not None:
                mask = evaluate(self.where, item.segment, mask)
            assert mask is not None
            count = int(np.count_nonzero(mask))
            if count:
                selections.append(Selection(item, mask, count, True))
        return selections


@dataclass(frozen=True, slots=True)
class Nearest:
    """The `count` rows nearest to a query vector, exact, or by a graph where that is cheaper.

    ef: the collection's `ef_search`, a floor for the graph's candidate list.
    """

    space: Space
    count: int
    ef: int
    exact: bool = False

    def run(self, query: Float32s, view: View, selections: list[Selection], cancel: Cancel) -> Hits:
        """query: float32[d]. If it is not finite, distances are NaN and rows come in seq order."""
        if self.count == 0:
            return self._merged([])
        if not np.isfinite(query).all():
            hits = Page(self.count, 0).run(view, selections)
            return Hits(hits.segments, hits.rows, np.full(len(hits.rows), np.nan, np.float32))
        numbers = {id(item): number for number, item in enumerate(view.segments)}
        found: list[tuple[int, Rows, Float32s, SegmentView]] = []
        scans: list[tuple[int, Estimates, SegmentView]] = []
        for selection in selections:
            cancel.check()
            item, number = selection.view, numbers[id(selection.view)]
            rows = self._by_graph(query, selection) if self.uses_graph(selection) else None
            if rows is None:
                estimated = estimates(self.space, query, item.segment, selection.rows())
                scans.append((number, estimated, item))
            else:
                distances = finish(self.space, query, item.segment, rows, self.count)
                found.append((number, *distances, item))
        if scans:
            # One limit for all scanned segments: exact distances only for what can still answer.
            limit = limit_of([estimated for _, estimated, _ in scans], self.count)
            for number, estimated, item in scans:
                rows = estimated.within(limit)
                if len(rows):
                    found.append(
                        (number, *finish(self.space, query, item.segment, rows, self.count), item)
                    )
        return self._merged(found)

    def _merged(self, found: list[tuple[int, Rows, Float32s, SegmentView]]) -> Hits:
        if len(found) == 1:
            number, rows, distances, _ = found[0]
            return Hits(np.full(len(rows), number), rows, distances)
        none = np.empty(0, np.int64)
        segments = np.repeat(
            np.array([number for number, *_ in found], np.int64),
            np.array([len(rows) for _, rows, _, _ in found], np.int64),
        )
        rows = np.concatenate([none, *(rows for _, rows, _, _ in found)])
        distances = np.concatenate([np.empty(0, np.float32), *(item[2] for item in found)])
        seqs = np.concatenate([none, *(view.segment.seqs[rows] for _, rows, _, view in found)])
        order = np.lexsort((seqs, distances))[: self.count]
        return Hits(segments[order], rows[order], distances[order])

    def uses_graph(self, selection: Selection) -> bool:
        """The planner's choice for one segment."""
        graph = selection.view.segment.graph_labels
        return not self.exact and cost.prefers_graph(
            matching=selection.count,
            total=len(selection.view.segment),
            labels=graph,
            dimension=selection.view.segment.dimension,
            count=self.count,
            ef=self.ef,
            filtered=selection.filtered,
        )

    def estimate_us(self, selection: Selection) -> float:
        """Predicted cost of one query vector on one segment."""
        segment = selection.view.segment
        dimension = segment.dimension
        if self.uses_graph(selection):
            share = selection.count / max(1, segment.graph_labels)
            ef = max(self.ef, cost.fetch_count(self.count, share))
            return cost.graph_us(segment.graph_labels, dimension, ef)
        return cost.scan_us(selection.count, len(segment), dimension)

    def _by_graph(self, query: Float32s, selection: Selection) -> Rows | None:
        """Candidates from the graph, widened until enough survive; None: scan instead (I10)."""
        graph = selection.view.segment.graph
        assert graph is not None
        wanted = min(self.count + cost.OVERFETCH_ROWS, selection.count)
        labels = selection.view.segment.graph_labels
        fetch = cost.fetch_count(self.count, selection.count / max(1, labels))
        while fetch <= labels // 4 + wanted:
            rows = graph.search(query, fetch, max(self.ef, fetch))
            if rows is None:
                return None
            if selection.mask is not None:
                rows = rows[selection.mask[rows]]
            if len(rows) >= min(wanted, selection.count):
                return rows
            fetch *= 2
        return None


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
            segments.append(np.full(len(chosen), numbers[id(selection.view)]))
            rows.append(chosen)
            seqs.append(segment.seqs[chosen])
        if not rows:
            empty = np.empty(0, np.int64)
            return Hits(empty, empty)
        all_rows = np.concatenate(rows)
        order = np.argsort(np.concatenate(seqs), kind="stable")[self.offset : stop]
        return Hits(np.concatenate(segments)[order], all_rows[order])


@dataclass(frozen=True, slots=True)
class Project:
    """The columns of an answer's rows."""

    fields: Field

    def run(self, view: View, hits: Hits) -> Records:
        count = len(hits.rows)
        numbers = np.unique(hits.segments) if count > 1 else hits.segments
        if len(numbers) == 1:
            return self._take(view.segments[int(numbers[0])], hits.rows)
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
            taken = self._take(view.segments[number], hits.rows[places])
            _put(answer.ids, places, taken.ids)
            _put(answer.documents, places, taken.documents)
            _put(answer.uris, places, taken.uris)
            _put(answer.metadatas, places, taken.metadatas)
            if answer.embeddings is not None:
                answer.embeddings[places] = taken.embeddings
        return answer

    def _take(self, item: SegmentView, rows: Rows) -> Records:
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
