"""The nearest rows: which way to find them in each segment, and the merge of what was found.

Whatever proposed a row, its distance is recomputed by one exact function from the stored vector,
and ties go to the older record: answers do not depend on how rows are spread over segments (I5).
Several query vectors are searched together: one matrix product where rows are scanned, threads
where a graph is searched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ochredb.cancel import Cancel
from ochredb.configuration import IndexSettings
from ochredb.explain import Trace, Value
from ochredb.parts.calibration import RECALL_ENOUGH, list_for
from ochredb.plan import cost
from ochredb.plan.operators import Hits, Opening, Page, Selection, named, step
from ochredb.segment import Rows, Segment, View
from ochredb.types import Float32s, Int64s
from ochredb.vectors.distance import Space, exact
from ochredb.vectors.scan import QUERIES_MAX, Candidates, Scan, are_usual, exactly

_QUERIES_PER_SEARCH = 64  # Of a graph, between two looks at whether to go on.


@dataclass(frozen=True, slots=True)
class OneGraph:
    """The commonest search, made ready: by the graph of the only segment, all of whose rows live.

    It answers as `Nearest` does, in a few calls. ef: candidates asked for. wanted: how many of them
    are looked at again.
    """

    segment: Segment
    space: Space
    count: int
    ef: int
    wanted: int

    def candidates(self, queries: Float32s) -> Rows | None:
        """int64[q, wanted] rows near each of float32[q, d]; most of the time it takes is here.

        None: `Nearest` has to do it, for a query that is not finite or a graph with gaps.
        """
        graph = self.segment.graph
        if graph is None or not math.isfinite(float(queries.sum())):
            return None
        found = graph.search(queries, self.ef)
        return None if found is None else found[:, : self.wanted]

    def nearest(self, queries: Float32s, rows: Rows) -> tuple[Rows, Float32s]:
        """int64[q, k] rows and float32[q, k] distances, of the candidates, nearest first."""
        again = queries if len(queries) == 1 else np.repeat(queries, rows.shape[1], axis=0)
        distances = exact(self.space, again, self.segment.vectors[rows.ravel()]).reshape(rows.shape)
        order = np.lexsort((self.segment.seqs[rows], distances))[:, : self.count]
        if len(queries) == 1:
            return rows[:, order[0]], distances[:, order[0]]
        return np.take_along_axis(rows, order, 1), np.take_along_axis(distances, order, 1)


@dataclass(frozen=True, slots=True)
class Nearest:
    """The `count` rows nearest to each query vector, exact, or by a graph where that is cheaper.

    settings: the collection's; of them comes the shortest candidate list.
    target_recall: the share of the true nearest that a graph shall find, by its own calibration;
        if it cannot, it is not used. 0: what `ef_search` alone gives.
    """

    settings: IndexSettings
    count: int
    target_recall: float = 0.0
    exact: bool = False

    def run(
        self,
        queries: Float32s,
        view: View,
        selections: list[Selection],
        cancel: Cancel,
        trace: Trace | None = None,
    ) -> Hits:
        """queries: float32[q, d], q >= 1.

        To one that is not finite all distances are NaN, and rows come in seq order.
        """
        if self.count == 0:
            return self._cut(len(queries), [])
        if len(queries) > 1 and not are_usual(queries):
            # Such a query takes longer: in a batch it would make all of them.
            each = [
                self.run(queries[i : i + 1], view, selections, cancel, trace)
                for i in range(len(queries))
            ]
            return _joined(each)
        if len(queries) == 1 and not np.isfinite(queries).all():
            return self._unordered(view, selections)
        with step(trace, "Nearest") as plan:
            hits = self._run(queries, view, selections, cancel, trace)
            if plan is not None:
                plan.details["queries"] = len(queries)
                plan.details["n_results"] = self.count
                plan.details["rows_in"] = sum(item.count for item in selections)
                plan.details["rows_out"] = len(hits.rows)
        return hits

    def _run(
        self,
        queries: Float32s,
        view: View,
        selections: list[Selection],
        cancel: Cancel,
        trace: Trace | None,
    ) -> Hits:
        numbers = {id(item): number for number, item in enumerate(view.segments)}
        found: list[tuple[int, Candidates]] = []
        scanned = []
        for selection in selections:
            cancel.check()
            if not self.uses_graph(selection):
                scanned.append(selection)
                continue
            number = numbers[id(selection.view)]
            candidates, short = self._by_graph(queries, selection, cancel, trace)
            found += [(number, item) for item in candidates]
            if len(short):  # The graph could not give enough: I10.
                # Perhaps on an event loop, where nobody expects a scan: no codes are made for it.
                found += self._by_scan(
                    queries, short, [selection], numbers, cancel, trace, makes_codes=False
                )
        if scanned:
            everyone = np.arange(len(queries))
            found += self._by_scan(queries, everyone, scanned, numbers, cancel, trace)
        return self._cut(len(queries), found)

    def _cut(self, queries: int, found: list[tuple[int, Candidates]]) -> Hits:
        """The `count` candidates nearest to each query, ties to the older."""
        if len(found) == 1:
            number, only = found[0]
            owners, rows, distances, seqs = only.owners, only.rows, only.distances, only.seqs
            segments = np.full(len(rows), number, np.int64)
        elif found:
            owners = np.concatenate([item.owners for _, item in found])
            rows = np.concatenate([item.rows for _, item in found])
            distances = np.concatenate([item.distances for _, item in found])
            seqs = np.concatenate([item.seqs for _, item in found])
            segments = np.repeat(
                np.array([number for number, _ in found], np.int64),
                [len(item.rows) for _, item in found],
            )
        else:
            none = np.empty(0, np.int64)
            return Hits(none, none, [0] * (queries + 1), np.empty(0, np.float32))
        if queries == 1:
            order = np.lexsort((seqs, distances))[: self.count]
            splits = [0, len(order)]
        else:
            order = np.lexsort((seqs, distances, owners))
            counts = np.bincount(owners, minlength=queries)
            starts = np.cumsum(counts) - counts
            order = order[np.arange(len(order)) - np.repeat(starts, counts) < self.count]
            splits = [0, *np.cumsum(np.minimum(counts, self.count)).tolist()]
        return Hits(segments[order], rows[order], splits, distances[order])

    def _unordered(self, view: View, selections: list[Selection]) -> Hits:
        hits = Page(self.count, 0).run(view, selections)
        nan = np.full(len(hits.rows), np.nan, np.float32)
        return Hits(hits.segments, hits.rows, hits.splits, nan)

    # -- which way

    def uses_graph(self, selection: Selection) -> bool:
        """The planner's choice for one segment."""
        segment = selection.view.segment
        labels = segment.graph_labels
        if labels == 0 or self.exact:
            return False
        ef = self.ef_of(segment)
        return ef is not None and cost.prefers_graph(
            matching=selection.count,
            total=len(segment),
            labels=labels,
            neighbors=segment.graph_neighbors,
            dimension=segment.dimension,
            count=self.count,
            ef=ef,
            filtered=selection.filtered,
            coded=segment.coded.is_useful,
        )

    def ef_of(self, segment: Segment) -> int | None:
        """The length of the candidate list with which a segment's graph is searched.

        None: its calibration knows of none that reaches the target recall, so only a scan does.
        """
        ef = list_for(segment.graph_recall, self.target_recall)
        return None if ef is None else max(self._ef_min(segment), ef)

    def _ef_min(self, segment: Segment) -> int:
        curve = segment.graph_recall
        enough = next((point for point in curve if point[1] >= RECALL_ENOUGH), None)
        return cost.list_min(self.settings, segment.graph_neighbors, self.count, enough)

    def estimate_us(self, selection: Selection) -> float:
        """Predicted cost of one query vector on one segment."""
        if self.uses_graph(selection):
            return self._graph_us(selection, self._asked(selection))
        return _scan_us(selection)

    def _asked(self, selection: Selection) -> int:
        """How many candidates a segment's graph is asked for at first."""
        segment = selection.view.segment
        share = selection.count / max(1, segment.graph_labels)
        ef = self.ef_of(segment) or self._ef_min(segment)
        return max(ef, cost.fetch_count(self.count, share))

    def _graph_us(self, selection: Selection, asked: int) -> float:
        segment = selection.view.segment
        neighbors = segment.graph_neighbors
        return cost.graph_us(segment.graph_labels, segment.dimension, asked, neighbors)

    # -- by graph

    def one_graph(self, selections: list[Selection]) -> OneGraph | None:
        """The search of these selections made ready, if it is one graph's and nothing else."""
        if len(selections) != 1 or selections[0].mask is not None or not self.count:
            return None
        (selection,) = selections
        segment = selection.view.segment
        if segment.graph_labels != len(segment) or not self.uses_graph(selection):
            return None  # A label without a row is a record that died.
        wanted = min(self.count + cost.OVERFETCH_ROWS, selection.count)
        return OneGraph(segment, self.settings.space, self.count, self._asked(selection), wanted)

    def _by_graph(
        self, queries: Float32s, selection: Selection, cancel: Cancel, trace: Trace | None
    ) -> tuple[list[Candidates], Int64s]:
        """Candidates of a segment's graph, and the numbers of the queries it could not answer."""
        found, short = [], []
        with step(trace, "Graph") as plan, Opening(selection.view, plan):
            for start in range(0, len(queries), _QUERIES_PER_SEARCH):
                cancel.check()
                numbers = np.arange(start, min(start + _QUERIES_PER_SEARCH, len(queries)))
                owners, rows, left = self._search(queries, numbers, selection)
                found.append(
                    exactly(self.settings.space, queries, selection.view.segment, owners, rows)
                )
                short.append(left)
            if plan is not None:
                plan.details |= self._explained(selection)
                plan.details["ef"] = self._asked(selection)
                plan.details["target_recall"] = self.target_recall
                plan.details["candidates"] = sum(len(item.rows) for item in found)
                plan.details["fell_short"] = sum(map(len, short))
        return found, short[0] if len(short) == 1 else np.concatenate(short)

    def _search(
        self, queries: Float32s, numbers: Int64s, selection: Selection
    ) -> tuple[Int64s, Rows, Int64s]:
        """Pairs (owner, row) for queries[numbers], and the numbers of those that stay short.

        The search is widened until enough rows survive the filter.
        """
        segment, mask = selection.view.segment, selection.mask
        graph = segment.graph
        wanted = min(self.count + cost.OVERFETCH_ROWS, selection.count)
        asked = self._asked(selection)
        owners: list[Int64s] = []
        kept: list[Rows] = []
        while True:
            rows = None if graph is None else graph.search(queries[numbers], asked)
            if rows is None:  # The graph is damaged, or has gaps: the caller scans.
                break
            valid = rows >= 0
            if mask is not None:
                valid &= mask[rows]
            if rows.shape[1] >= wanted and valid[:, :wanted].all():
                owners.append(np.repeat(numbers, wanted))
                kept.append(rows[:, :wanted].ravel())
                numbers = numbers[:0]
                break
            enough = np.count_nonzero(valid, axis=1) >= wanted
            chosen = valid & (np.cumsum(valid, axis=1) <= wanted)
            chosen[~enough] = False
            places, columns = np.nonzero(chosen)
            owners.append(numbers[places])
            kept.append(rows[places, columns])
            numbers = numbers[~enough]
            asked *= 2
            if not len(numbers) or asked > segment.graph_labels // 4 + wanted:
                break
        if len(kept) == 1:
            return owners[0], kept[0], numbers
        none = [np.empty(0, np.int64)]
        return np.concatenate(none + owners), np.concatenate(none + kept), numbers

    # -- by scan

    def _by_scan(
        self,
        queries: Float32s,
        owners: Int64s,
        selections: list[Selection],
        numbers: dict[int, int],
        cancel: Cancel,
        trace: Trace | None,
        *,
        makes_codes: bool = True,
    ) -> list[tuple[int, Candidates]]:
        """Candidates for queries[owners] among all rows of these segments.

        One limit for all segments: exact distances only for what can still answer.
        """
        if trace is not None:
            return self._by_traced_scan(
                queries, owners, selections, numbers, cancel, trace, makes_codes
            )
        found = []
        for start in range(0, len(owners), QUERIES_MAX):
            block = owners[start : start + QUERIES_MAX]
            asked = queries if len(block) == len(queries) else queries[block]
            scan = Scan(self.settings.space, asked, self.count, makes_codes=makes_codes)
            for selection in selections:
                cancel.check()
                segment, mask = selection.view.segment, selection.mask
                scan.add(numbers[id(selection.view)], segment, mask, selection.codes)
            found += [
                (number, replace(item, owners=block[item.owners]))
                for number, item in scan.candidates()
            ]
        return found

    def _by_traced_scan(
        self,
        queries: Float32s,
        owners: Int64s,
        selections: list[Selection],
        numbers: dict[int, int],
        cancel: Cancel,
        trace: Trace,
        makes_codes: bool,
    ) -> list[tuple[int, Candidates]]:
        """The same, segment by segment, so that each has its own time."""
        found = []
        for selection in selections:
            with trace.step("Scan") as plan, Opening(selection.view, plan):
                candidates = self._by_scan(
                    queries, owners, [selection], numbers, cancel, None, makes_codes=makes_codes
                )
                plan.details |= self._explained(selection)
                plan.details["candidates"] = sum(len(item.rows) for _, item in candidates)
            found += candidates
        return found

    def _explained(self, selection: Selection) -> dict[str, Value]:
        segment = selection.view.segment
        details = named(selection.view)
        details["matching"] = selection.count
        details["estimate_us"] = round(self.estimate_us(selection), 1)
        if segment.graph_labels:
            details["scan_us"] = round(_scan_us(selection), 1)
            if self.ef_of(segment) is not None:
                graph_us = self._graph_us(selection, self._asked(selection))
                details["graph_us"] = round(graph_us, 1)
            elif not self.exact:  # Why it was scanned.
                details["graph_recall_max"] = segment.graph_recall[-1][1]
        return details


def _scan_us(selection: Selection) -> float:
    segment = selection.view.segment
    count, dimension = selection.count, segment.dimension
    return cost.scan_us(count, len(segment), dimension, coded=segment.coded.is_useful)


def _joined(each: list[Hits]) -> Hits:
    """Several answers as one."""
    splits = [0]
    for hits in each:
        splits += [splits[-1] + split for split in hits.splits[1:]]
    return Hits(
        np.concatenate([hits.segments for hits in each]),
        np.concatenate([hits.rows for hits in each]),
        splits,
        np.concatenate([hits.distances for hits in each if hits.distances is not None]),
    )
