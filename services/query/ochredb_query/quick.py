"""Which reads may be answered on an event loop: predicted to be short, and sure not to wait.

Everything here errs on the side of "no": a read that is refused runs in the pool, a tenth of a
millisecond slower. Indexes that were not used before are never opened here (that reads, verifies
and may wait), and documents are never searched (their cost depends on what is in them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ochredb.cancel import Cancel
from ochredb.peers import GetRequest, QueryRequest
from ochredb.plan.nearest import Nearest, OneGraph
from ochredb.plan.operators import Filter, Selection
from ochredb.segment import View
from ochredb.types import Field
from ochredb.vectors.scan import reads_all
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
from ochredb_query.selected import Selected, name_of

QUERIES_MAX = 4
RESULTS_MAX = 200
IDS_MAX = 200
_SEARCHED = ("record_batch", "vectors")  # What a search uses, but for the graph.
_PLANS_MAX = 64
_NODE_US, _NODE_ROW_US = 15.0, 0.0004  # One predicate over a segment; measured, rounded up.


@dataclass(frozen=True, slots=True)
class Search:
    """A search of one view that is quick; equal to those of this view that ask for the same.

    They differ in their query vectors alone: they may run as one batch.
    search_us: estimated, for each query vector. one_graph: the whole search, if it is that simple.
    """

    view: View
    asked: tuple[object, ...]
    nearest: Nearest = field(compare=False)
    fields: Field = field(compare=False)
    selections: list[Selection] = field(compare=False)
    search_us: float = field(compare=False)
    one_graph: OneGraph | None = field(compare=False)

    @property
    def is_ready(self) -> bool:
        """See `_is_ready`; of the commonest search without planning it anew."""
        if self.one_graph is not None:
            return self.one_graph.segment.graph_is_loaded
        return _is_ready(self.nearest, self.selections)


class Searches:
    """The quick searches of one view, by what they ask for; those without a filter are planned
    once. Thread-safe.

    selected: what filters that were used lately select.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.selected = Selected(view)
        self._known: dict[object, Search] = {}

    def find(
        self,
        request: QueryRequest,
        nearest: Callable[[QueryRequest], Nearest],
        limit_us: float,
        graph_limit_us: float,
    ) -> Search | None:
        """The search for a request without ids, or None if it is not quick.

        graph_limit_us: of a search of one graph, which does without the interpreter's lock.
        """
        queries, dimension = request.embeddings.shape
        if queries > QUERIES_MAX or request.n_results > RESULTS_MAX:
            return None
        name = None if request.where is None else name_of(request.where)
        asked = (
            request.n_results, request.exact, request.target_recall, request.fields, dimension,
            name,
        )  # fmt: skip
        search = self._known.get(asked)
        if search is not None and not search.is_ready:
            return None  # Dropped meanwhile, to make room.
        if search is None:
            selections = self.select(request.where, name, _SEARCHED, limit_us)
            if selections is None:
                return None
            step = nearest(request)
            if not _is_ready(step, selections):
                return None
            search_us = sum(step.estimate_us(selection) for selection in selections)
            one_graph = step.one_graph(selections) if dimension == self.view.dimension else None
            search = Search(
                self.view, asked, step, request.fields, selections, search_us, one_graph
            )
            if request.where is None and len(self._known) < _PLANS_MAX:
                self._known[asked] = search
        if search.one_graph is not None:
            limit_us = graph_limit_us
        return search if search.search_us * queries <= limit_us else None

    def select(
        self, where: Where | None, name: str | None, opened: tuple[str, ...], limit_us: float
    ) -> list[Selection] | None:
        """The rows that match, if that is known or quick to find, and these attributes are open.

        name: the filter's, None without one.
        """
        found = None if name is None else self.selected.find(name)
        if found is not None:
            return found if all(item.view.segment.has_open(opened) for item in found) else None
        found = _selections(self.view, None, where, opened, limit_us)
        if name is not None and found is not None:
            self.selected.keep(name, found)
        return found


def get_selections(
    searches: Searches, request: GetRequest, limit_us: float
) -> list[Selection] | None:
    """The rows of a get that is quick, or None."""
    wanted = len(request.ids) if request.ids is not None else request.limit
    if wanted is None or wanted > RESULTS_MAX:
        return None
    if request.ids is None:
        name = None if request.where is None else name_of(request.where)
        return searches.select(request.where, name, ("record_batch",), limit_us)
    return _selections(searches.view, request.ids, request.where, ("record_batch",), limit_us)


def query_selections(
    view: View, request: QueryRequest, nearest: Nearest, limit_us: float
) -> list[Selection] | None:
    """The rows of a query that is quick, filter and search together, or None."""
    queries = len(request.embeddings)
    if queries > QUERIES_MAX or request.n_results > RESULTS_MAX:
        return None
    selections = _selections(view, request.ids, request.where, _SEARCHED, limit_us)
    if selections is None or not _is_ready(nearest, selections):
        return None
    search_us = sum(nearest.estimate_us(selection) for selection in selections)
    return selections if search_us * queries <= limit_us else None


def _selections(
    view: View,
    ids: list[str] | None,
    where: Where | None,
    opened: tuple[str, ...],
    limit_us: float,
) -> list[Selection] | None:
    if where is not None:
        nodes = _metadata_nodes(where)
        if nodes is None:
            return None
        filter_us = sum(
            nodes * (_NODE_US + _NODE_ROW_US * len(item.segment)) for item in view.segments
        )
        if filter_us > limit_us / 2:
            return None
        opened = (*opened, "metadata")
    if ids is not None:
        if len(ids) > IDS_MAX:
            return None
        opened = (*opened, "id_index")
    if not all(item.segment.has_open(opened) for item in view.segments):
        return None
    return Filter(where, None if ids is None else tuple(dict.fromkeys(ids))).run(view, Cancel())


def _is_ready(nearest: Nearest, selections: list[Selection]) -> bool:
    """Whether searching neither loads a graph nor makes codes first.

    The planner decides once more when it searches. Costs are measured once in a process's life: a
    single search might find them changed between.
    """
    for selection in selections:
        segment = selection.view.segment
        if nearest.uses_graph(selection):
            if not segment.graph_is_loaded:
                return False
        elif not _codes_are_settled(selection):
            return False
    return True


def _codes_are_settled(selection: Selection) -> bool:
    """Whether a scan uses no codes that would have to be made first."""
    if selection.codes is not None:
        return selection.codes.is_settled
    segment = selection.view.segment
    return segment.coded.is_settled or not reads_all(selection.count, len(segment))


def _metadata_nodes(where: Where) -> int | None:
    """How many nodes a filter on metadata has; None if it looks at documents or ids."""
    match where:
        case DocumentContains() | DocumentMatches() | IdIn():
            return None
        case And(children) | Or(children):
            counts = [_metadata_nodes(child) for child in children]
            return None if None in counts else 1 + sum(filter(None, counts))
        case Compare() | OneOf() | ListContains():
            return 1
