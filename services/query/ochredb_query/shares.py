"""Shares of a read: what some parts answer by themselves, and the merge of all shares, exactly.

Each share gives its own nearest (or first) rows, with exact distances and seqs. The order of the
whole, by distance and then by seq, is total, so the merge is what one node would have answered,
however the parts are spread (I5). What is to be computed from ranks or from all rows that were
found belongs after `merged`, never into a share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ochredb.cancel import Cancel
from ochredb.explain import Trace
from ochredb.peers import GetRequest, PartsAnswer, PartsRequest, QueryRequest
from ochredb.plan.nearest import Nearest
from ochredb.plan.operators import Hits, Page, Project, Selection, step
from ochredb.segment import View
from ochredb.types import Field, Int64s, Records
from ochredb_query.answer import any_lives, check_size, projected, select
from ochredb_query.selected import Selected

_T = TypeVar("_T")
_PROJECTED_ROWS = 2_000  # Between two looks at the size of an answer.


def share_of(
    selected: Selected,
    request: PartsRequest,
    nearest: Callable[[QueryRequest], Nearest],
    cancel: Cancel,
    trace: Trace | None,
) -> PartsAnswer:
    """What the rows of one view answer. A get's rows are the first `offset + limit`, less offset.

    nearest: the search that a query asks for.
    """
    view, asked = selected.view, request.request
    selections = select(view, lambda: selected, asked, cancel, trace)
    hits = _hits(view, selections, asked, nearest, cancel, trace)
    records = Records()
    if not request.keys_only:
        with step(trace, "Project") as plan:
            records = _projected(view, hits, asked.fields, cancel)
            if plan is not None:
                plan.details |= projected(asked.fields, len(hits.rows))
    return PartsAnswer(
        records=records,
        splits=hits.splits,
        seqs=_seqs(view, hits),
        distances=hits.distances,
        any_lives=bool(asked.ids) and any_lives(view, asked.ids or []),
    )


def _hits(
    view: View,
    selections: list[Selection],
    asked: GetRequest | QueryRequest,
    nearest: Callable[[QueryRequest], Nearest],
    cancel: Cancel,
    trace: Trace | None,
) -> Hits:
    if isinstance(asked, QueryRequest):
        return nearest(asked).run(asked.embeddings, view, selections, cancel, trace)
    with step(trace, "Page") as plan:
        hits = Page(asked.limit, asked.offset).run(view, selections)
        if plan is not None:
            plan.details["rows_in"] = sum(item.count for item in selections)
            plan.details["rows_out"] = len(hits.rows)
    return hits


def _projected(view: View, hits: Hits, fields: Field, cancel: Cancel) -> Records:
    project = Project(fields)
    pieces = []
    size_bytes = 0
    for start in range(0, max(1, len(hits.rows)), _PROJECTED_ROWS):
        cancel.check()
        piece = slice(start, start + _PROJECTED_ROWS)
        rows = hits.rows[piece]
        records = project.run(view, Hits(hits.segments[piece], rows, [0, len(rows)]))
        size_bytes += records.size_bytes
        check_size(size_bytes)
        pieces.append(records)
    return _gathered(pieces, fields, None)


def _seqs(view: View, hits: Hits) -> Int64s:
    seqs = np.empty(len(hits.rows), np.int64)
    # `np.unique` would import numpy.ma.
    for number in np.flatnonzero(np.bincount(hits.segments)).tolist():
        places = hits.segments == number
        seqs[places] = view.segments[number].segment.seqs[hits.rows[places]]
    return seqs


def order_of(shares: Sequence[PartsAnswer], count: int | None) -> tuple[Int64s, list[int]]:
    """The rows of all shares, numbered one share after the other, in the order of the whole.

    count: of each answer's rows, None for all. Returns int64[n] and the splits.
    """
    answers = len(shares[0].splits) - 1
    lengths = np.concatenate([np.diff(np.array(share.splits)) for share in shares])
    owners = np.repeat(np.tile(np.arange(answers), len(shares)), lengths)
    seqs = np.concatenate([share.seqs for share in shares])
    if shares[0].distances is None:
        order = np.lexsort((seqs, owners))
    else:
        distances = [share.distances for share in shares if share.distances is not None]
        order = np.lexsort((seqs, np.concatenate(distances), owners))
    counts = np.bincount(owners, minlength=answers)
    if count is not None:
        starts = np.cumsum(counts) - counts
        order = order[np.arange(len(order)) - np.repeat(starts, counts) < count]
        counts = np.minimum(counts, count)
    return order, [0, *np.cumsum(counts).tolist()]


def merged(shares: Sequence[PartsAnswer], fields: Field, count: int | None) -> PartsAnswer:
    """The answers of all shares as one; `count` as in `order_of`."""
    order, splits = order_of(shares, count)
    distances = None
    if shares[0].distances is not None:
        all_distances = [share.distances for share in shares if share.distances is not None]
        distances = np.concatenate(all_distances)[order]
    return PartsAnswer(
        records=_gathered([share.records for share in shares], fields, order),
        splits=splits,
        seqs=np.concatenate([share.seqs for share in shares])[order],
        distances=distances,
        any_lives=any(share.any_lives for share in shares),
    )


def pages_of(shares: Sequence[PartsAnswer], request: GetRequest) -> list[GetRequest]:
    """Which page of its own rows each share has to give, so that together they are the one asked.

    shares: the keys of each one's first `offset + limit` rows.
    """
    lengths = [len(share.seqs) for share in shares]
    order, _ = order_of(shares, None)
    share_of_row = np.repeat(np.arange(len(shares)), lengths)[order]
    stop = len(order) if request.limit is None else request.offset + request.limit
    before = np.bincount(share_of_row[: request.offset], minlength=len(shares)).tolist()
    within = np.bincount(share_of_row[request.offset : stop], minlength=len(shares)).tolist()
    return [
        replace(request, offset=offset, limit=limit)
        for offset, limit in zip(before, within, strict=True)
    ]


def _gathered(pieces: Sequence[Records], fields: Field, order: Int64s | None) -> Records:
    """Rows of all pieces, one after the other, in this order (None: as they are)."""
    if len(pieces) == 1 and order is None:
        return pieces[0]
    rows = None if order is None else order.tolist()

    def column(values: list[list[_T] | None], is_wanted: bool) -> list[_T] | None:
        if not is_wanted:
            return None
        joined: list[_T] = []
        for piece in values:
            joined += piece or []
        return joined if rows is None else [joined[row] for row in rows]

    answer = Records(
        ids=column([piece.ids for piece in pieces], True) or [],
        documents=column([piece.documents for piece in pieces], Field.DOCUMENT in fields),
        uris=column([piece.uris for piece in pieces], Field.URI in fields),
        metadatas=column([piece.metadatas for piece in pieces], Field.METADATA in fields),
    )
    if Field.EMBEDDING in fields:
        vectors = [piece.embeddings for piece in pieces if piece.embeddings is not None]
        filled = [each for each in vectors if len(each)] or vectors[:1]
        joined = np.concatenate(filled)
        answer.embeddings = joined if order is None else joined[order]
    return answer
