"""`ochredb.peers.QueryNode` whose reads wait for their turn: what a node offers to others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ochredb.cancel import Cancel
from ochredb.errors import Unimplemented
from ochredb.peers import (
    Batch,
    GetRequest,
    PartsAnswer,
    PartsRequest,
    QueryNode,
    QueryRequest,
    QuickRead,
)
from ochredb.types import IndexingStatus, QueryAnswer, Records
from ochredb_query.admission import Admission

_TENANTS_KEPT = 100_000


class AdmittedQuery:
    """Thread-safe. Reads of the process's own frontend go past it, through a pool of their own."""

    def __init__(
        self, query: QueryNode, tenant_of: Callable[[str], str], admission: Admission
    ) -> None:
        """tenant_of: a collection's tenant, which never changes. Raises NotFound."""
        self._query, self._tenant_of, self._admission = query, tenant_of, admission
        self._lock = threading.Lock()
        self._tenants: dict[str, str] = {}

    def get(self, collection_id: str, request: GetRequest, *, cancel: Cancel) -> Records:
        # A page costs about the same whatever its length, a filter over everything does not.
        kind = (collection_id, "get", request.where is None and request.ids is None)
        with self._admission.turn(self._tenant(collection_id), kind, 1.0, cancel):
            return self._query.get(collection_id, request, cancel=cancel)

    def query(self, collection_id: str, request: QueryRequest, *, cancel: Cancel) -> QueryAnswer:
        kind = (collection_id, "query", request.where is None, request.exact)
        units = float(max(1, len(request.embeddings)))
        with self._admission.turn(self._tenant(collection_id), kind, units, cancel):
            return self._query.query(collection_id, request, cancel=cancel)

    def count(self, collection_id: str, *, cancel: Cancel) -> int:
        kind = (collection_id, "count")
        with self._admission.turn(self._tenant(collection_id), kind, 1.0, cancel):
            return self._query.count(collection_id, cancel=cancel)

    def match(
        self, collection_id: str, request: GetRequest, *, cancel: Cancel
    ) -> tuple[list[str], int]:
        kind = (collection_id, "match")
        with self._admission.turn(self._tenant(collection_id), kind, 1.0, cancel):
            return self._query.match(collection_id, request, cancel=cancel)

    def search_parts(
        self, collection_id: str, request: PartsRequest, *, cancel: Cancel
    ) -> PartsAnswer:
        """Never waits: it belongs to a read that has its turn on another node, which waits for it.

        If it queued here, two nodes full of reads could wait for each other for ever.
        """
        return self._query.search_parts(collection_id, request, cancel=cancel)

    def keep_copies(self, objects: Sequence[tuple[str, int]], *, cancel: Cancel) -> None:
        """Only noted: not worth a turn."""
        self._query.keep_copies(objects, cancel=cancel)

    def indexing_status(self, collection_id: str, *, cancel: Cancel) -> IndexingStatus:
        """One statement of the catalog: not worth a turn."""
        return self._query.indexing_status(collection_id, cancel=cancel)

    def quick(
        self,
        collection_id: str,  # noqa: ARG002
        request: GetRequest | QueryRequest | None,  # noqa: ARG002
    ) -> QuickRead | None:
        return None

    def together(self, reads: Sequence[QuickRead]) -> Batch:  # noqa: ARG002
        raise Unimplemented("there are no quick reads here")

    def _tenant(self, collection_id: str) -> str:
        tenant = self._tenants.get(collection_id)
        if tenant is None:
            tenant = self._tenant_of(collection_id)
            with self._lock:
                if len(self._tenants) >= _TENANTS_KEPT:
                    self._tenants.pop(next(iter(self._tenants)))
                self._tenants[collection_id] = tenant
        return tenant
