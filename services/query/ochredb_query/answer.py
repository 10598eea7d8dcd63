"""From a planned search to its answer: what is found, and the columns that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from ochredb.cancel import Cancel
from ochredb.catalog.appends import dimension_error
from ochredb.errors import InvalidArgument, TooLarge
from ochredb.explain import Trace, Value
from ochredb.peers import GetRequest, QueryRequest, QuickRead
from ochredb.plan.nearest import Nearest
from ochredb.plan.operators import Filter, Hits, Page, Project, Selection, step
from ochredb.segment import Rows, View
from ochredb.types import Field, QueryAnswer, Records
from ochredb_query import quick
from ochredb_query.selected import Selected, name_of

_ANSWER_BYTES_MAX = 256 << 20
_PROJECTED_ROWS = 2_000  # Between two looks at the size of an answer.


def projected(fields: Field, rows: int) -> dict[str, Value]:
    names = [str(one.name).lower() for one in Field if one in fields]
    return {"rows": rows, "columns": " ".join(["id", *names])}


def select(
    view: View,
    selected: Callable[[], Selected],
    request: GetRequest | QueryRequest,
    cancel: Cancel,
    trace: Trace | None,
) -> list[Selection]:
    """The rows that may answer. An explained read finds them anew: its plan says how."""
    ids, where = request.ids, request.where
    if ids is not None or where is None or trace is not None:
        some_ids = None if ids is None else tuple(dict.fromkeys(ids))
        return Filter(where, some_ids).run(view, cancel, trace)
    known, name = selected(), name_of(where)
    found = known.find(name)
    if found is None:
        found = Filter(where).run(view, cancel)
        known.keep(name, found)
    return found


def search_quickly(search: quick.Search, request: QueryRequest, cancel: Cancel) -> QueryAnswer:
    """What `search_view` answers, in fewer steps where one graph is all that is searched."""
    rows = None if search.one_graph is None else search.one_graph.candidates(request.embeddings)
    return _searched(search, request, rows, cancel)


def _searched(
    search: quick.Search, request: QueryRequest, rows: Rows | None, cancel: Cancel
) -> QueryAnswer:
    """The answer from the candidates of one graph, or if there are none, from the beginning."""
    if rows is None or search.one_graph is None:
        return search_view(search.view, search.nearest, request, search.selections, cancel)
    rows, distances = search.one_graph.nearest(request.embeddings, rows)
    records = Project(request.fields).take(search.selections[0].view, rows.ravel())
    check_size(records.size_bytes)
    splits = list(range(0, rows.size + 1, rows.shape[1]))
    return QueryAnswer(records.split(splits), list(distances))


def page_of(
    view: View,
    request: GetRequest,
    selections: list[Selection],
    cancel: Cancel,
    trace: Trace | None = None,
) -> Records:
    with step(trace, "Page") as plan:
        hits = Page(request.limit, request.offset).run(view, selections)
        if plan is not None:
            plan.details["rows_in"] = sum(item.count for item in selections)
            plan.details["rows_out"] = len(hits.rows)
    cancel.check()
    with step(trace, "Project") as plan:
        records = Project(request.fields).run(view, hits)
        if plan is not None:
            plan.details |= projected(request.fields, len(hits.rows))
    return records


class SearchBatch:
    """`ochredb.peers.Batch`: the vectors of all reads in one request."""

    def __init__(self, reads: Sequence[QuickRead]) -> None:
        search = reads[0].group
        assert isinstance(search, quick.Search)
        queries = [read.embeddings for read in reads if read.embeddings is not None]
        self._found = search
        self._request = QueryRequest(
            embeddings=np.concatenate(queries),
            n_results=search.nearest.count,
            fields=search.fields,
        )
        self._counts = [len(vectors) for vectors in queries]
        self._rows: Rows | None = None
        self._hits: Hits | None = None
        self._failure: Exception | None = None

    def search(self) -> None:
        found, request = self._found, self._request
        try:
            if found.one_graph is not None:
                self._rows = found.one_graph.candidates(request.embeddings)
            else:
                self._hits = _hits(found.view, found.nearest, request, found.selections, Cancel())
        except Exception as error:  # Raised where the answers are asked for.
            self._failure = error

    def answers(self, cancel: Cancel) -> list[QueryAnswer]:
        if self._failure is not None:
            raise self._failure
        if self._hits is not None:
            answer = _answer(self._found.view, self._request, self._hits, cancel)
        else:
            answer = _searched(self._found, self._request, self._rows, cancel)
        return answer.split(self._counts)


def search_view(
    view: View,
    nearest: Nearest,
    request: QueryRequest,
    selections: list[Selection],
    cancel: Cancel,
    trace: Trace | None = None,
) -> QueryAnswer:
    hits = _hits(view, nearest, request, selections, cancel, trace)
    return _answer(view, request, hits, cancel, trace)


def _hits(
    view: View,
    nearest: Nearest,
    request: QueryRequest,
    selections: list[Selection],
    cancel: Cancel,
    trace: Trace | None = None,
) -> Hits | None:
    """None: there is no query vector."""
    check_dimension(view, request)
    if request.ids and request.n_results and view.count and not any_lives(view, request.ids):
        raise none_lives()
    if not len(request.embeddings):
        return None
    return nearest.run(request.embeddings, view, selections, cancel, trace)


def _answer(
    view: View,
    request: QueryRequest,
    hits: Hits | None,
    cancel: Cancel,
    trace: Trace | None = None,
) -> QueryAnswer:
    answer = QueryAnswer(records=[], distances=[])
    if hits is None:
        return answer
    with step(trace, "Project") as plan:
        _project(view, request, hits, answer, cancel)
        if plan is not None:
            plan.details |= projected(request.fields, len(hits.rows))
    return answer


def _project(
    view: View, request: QueryRequest, hits: Hits, answer: QueryAnswer, cancel: Cancel
) -> None:
    """Add the records of all hits to `answer`, some query vectors at a time."""
    project = Project(request.fields)
    assert hits.distances is not None
    queries = len(hits.splits) - 1
    together = max(1, _PROJECTED_ROWS // max(1, request.n_results))
    size_bytes = 0
    for first in range(0, queries, together):
        cancel.check()
        some = hits.answers(first, min(queries, first + together))
        records = project.run(view, some)
        size_bytes += records.size_bytes
        check_size(size_bytes)
        answer.records += records.split(some.splits)
    for start, stop in pairwise(hits.splits):
        answer.distances.append(hits.distances[start:stop])


def check_size(size_bytes: int) -> None:
    """One large document may answer every query vector: a small request, a huge answer."""
    if size_bytes > _ANSWER_BYTES_MAX:
        raise TooLarge(
            f"query_embeddings: the answer is larger than the maximum of {_ANSWER_BYTES_MAX} "
            "bytes; ask for fewer results, fewer vectors or less in `include`"
        )


def check_dimension(view: View, request: QueryRequest) -> None:
    """Raises InvalidArgument if the vectors are of another dimension than the collection's."""
    dimension = request.embeddings.shape[1]
    if view.dimension is not None and len(request.embeddings) and dimension != view.dimension:
        raise dimension_error(view.dimension, dimension)


def none_lives() -> InvalidArgument:
    """Official clients' tests want an error here; of several ids, the ones that live answer."""
    return InvalidArgument("Error finding id: none of the given ids exists in the collection")


def any_lives(view: View, ids: list[str]) -> bool:
    return any(bool((rows >= 0).any()) for rows in view.find_ids(ids))


def state_of(collection_id: str, view: View) -> dict[str, Value]:
    """What a plan says of the state that a read saw."""
    parts = [item for item in view.segments if item.part_id is not None]
    return {
        "collection": collection_id,
        "version": view.version,
        "offset": view.last_offset,
        "parts": len(parts),
        "records": view.count,
        "tail_records": view.count - sum(item.live_count for item in parts),
    }
