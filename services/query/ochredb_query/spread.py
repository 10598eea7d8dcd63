"""A read of a large collection by the node that was asked: its own share, the others', the merge.

It holds no more of the others' parts than what the tail needs (ids, and the records that it
changes): sections are fetched when they are first used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ochredb.cancel import Cancel
from ochredb.explain import PlanStep, Trace
from ochredb.peers import GetRequest, PartsAnswer, PartsRequest, QueryRequest
from ochredb.plan.nearest import Nearest
from ochredb.plan.operators import step
from ochredb.segment import View
from ochredb.types import QueryAnswer, Records, Snapshot
from ochredb_query.answer import check_dimension, check_size, none_lives
from ochredb_query.loaded import LoadedCollection
from ochredb_query.selected import Selected
from ochredb_query.shares import merged, pages_of, share_of

if TYPE_CHECKING:
    from ochredb_query.scatter import Scatter, Share


@dataclass(frozen=True, slots=True)
class Spread:
    """A read of one view whose parts several nodes own.

    owners: the parts of each, this node's first. nearest: the search that a query asks for.
    """

    view: View
    loaded: LoadedCollection
    scatter: Scatter
    owners: Mapping[str, tuple[str, ...]]
    nearest: Callable[[QueryRequest], Nearest]
    cancel: Cancel
    trace: Trace | None

    def get(self, request: GetRequest) -> Records:
        if request.offset == 0:
            shares = self._gather(self._requests(request))
            return self._merged(shares, request, request.limit).records
        # Which rows come before the page is known when all have said which rows they have.
        stop = None if request.limit is None else request.offset + request.limit
        keys = replace(request, offset=0, limit=stop)
        shares = self._gather(self._requests(keys, keys_only=True))
        pages = pages_of([share.answer for share in shares], request)
        # Each page is of the rows of these parts together: they stay together.
        asked = [
            (share.node, replace(share.request, request=page, keys_only=False))
            for number, (share, page) in enumerate(zip(shares, pages, strict=True))
            if number == 0 or page.limit
        ]
        shares = self._gather(asked)
        return self._merged(shares, request, request.limit).records

    def query(self, request: QueryRequest) -> QueryAnswer:
        """Of at least one vector and one result."""
        check_dimension(self.view, request)
        # Another node may be set to another target.
        target_recall = self.nearest(request).target_recall
        shares = self._gather(self._requests(replace(request, target_recall=target_recall)))
        if request.ids and self.view.count and not any(each.answer.any_lives for each in shares):
            raise none_lives()
        whole = self._merged(shares, request, request.n_results)
        check_size(whole.records.size_bytes)
        distances = whole.distances
        assert distances is not None
        return QueryAnswer(
            records=whole.records.split(whole.splits),
            distances=[distances[start:stop] for start, stop in pairwise(whole.splits)],
        )

    def _requests(
        self, request: GetRequest | QueryRequest, *, keys_only: bool = False
    ) -> list[tuple[str, PartsRequest]]:
        view = self.view
        snapshot = Snapshot(
            collection_id=self.loaded.collection_id,
            state="live",
            revision=self.loaded.revision,
            dimension=view.dimension,
            version=view.version,
            indexed_offset=view.indexed_offset,
            next_offset=view.last_offset + 1,
            floor_offset=view.indexed_offset,
        )
        return [
            (
                name,
                PartsRequest(
                    snapshot=snapshot, part_ids=part_ids, request=request, keys_only=keys_only
                ),
            )
            for name, part_ids in self.owners.items()
        ]

    def _gather(self, requests: list[tuple[str, PartsRequest]]) -> list[Share]:
        (_, own), *others = requests
        with step(self.trace, "Scatter") as plan:
            shares = self.scatter.gather(
                self.loaded.collection_id, own, others, self._local, self.cancel
            )
            if plan is not None:
                plan.details["nodes"] = len({share.node for share in shares})
                plan.details["parts"] = sum(len(share.request.part_ids) for share in shares)
                plan.steps += [_explained(share) for share in shares]
        return shares

    def _local(self, request: PartsRequest, with_tail: bool) -> PartsAnswer:
        """A share by this node, of its own view."""
        trace = None if self.trace is None else Trace("Node")
        if with_tail:
            selected = self.loaded.own_share(self.view, request.part_ids)
        else:
            selected = Selected(self.view.of(request.part_ids, with_tail=False))
        answer = share_of(selected, request, self.nearest, self.cancel, trace)
        answer.plan = None if trace is None else trace.root
        return answer

    def _merged(
        self, shares: list[Share], request: GetRequest | QueryRequest, count: int | None
    ) -> PartsAnswer:
        with step(self.trace, "Merge") as plan:
            whole = merged([share.answer for share in shares], request.fields, count)
            if plan is not None:
                plan.details["rows_in"] = sum(len(share.answer.seqs) for share in shares)
                plan.details["rows_out"] = len(whole.seqs)
        return whole


def _explained(share: Share) -> PlanStep:
    """The plan of a share as its node made it; its time is the node's own."""
    plan = share.answer.plan or PlanStep("Node")
    plan.details = {
        "node": share.node,
        "parts": len(share.request.part_ids),
        "rows_out": len(share.answer.seqs),
        "round_trip_us": round(share.time_us, 1),
        **plan.details,
    }
    return plan
