"""Reads: snapshot, view, operators (I4, I5, I10)."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from ochredb.cancel import Cancel
from ochredb.catalog.logs import LogTable, dimension_error
from ochredb.catalog.namespace import Namespace
from ochredb.catalog.versions import VersionTable
from ochredb.clock import Clock
from ochredb.configuration import index_settings
from ochredb.errors import Corrupt, InvalidArgument, NotFound, TooLarge, Unavailable
from ochredb.parts.manifest import Manifest
from ochredb.parts.open_parts import OpenParts
from ochredb.peers import GetRequest, QueryRequest
from ochredb.plan import cost
from ochredb.plan.operators import Filter, Nearest, Page, Project, Selection
from ochredb.replay import Gone
from ochredb.segment import View
from ochredb.storage.base import LocalStore
from ochredb.types import Field, IndexingStatus, QueryAnswer, Records, Snapshot
from ochredb.where import Where
from ochredb_query import quick
from ochredb_query.config import QueryConfig
from ochredb_query.loaded import LoadedCollection

_T = TypeVar("_T")
_ATTEMPTS_MAX = 20
_ANSWER_BYTES_MAX = 256 << 20


class QueryService:
    """`ochredb.peers.Query` in this process. Thread-safe."""

    def __init__(
        self,
        logs: LogTable,
        versions: VersionTable,
        namespace: Namespace,
        store: LocalStore,
        open_parts: OpenParts,
        clock: Clock,
        config: QueryConfig,
    ) -> None:
        self._logs, self._versions, self._namespace = logs, versions, namespace
        self._store, self._open_parts = store, open_parts
        self._clock, self._config = clock, config
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, LoadedCollection] = OrderedDict()

    # -- peers.Query

    def get(self, collection_id: str, request: GetRequest, *, cancel: Cancel) -> Records:
        return self._read(collection_id, cancel, lambda view, _: _get(view, request, cancel))

    def query(self, collection_id: str, request: QueryRequest, *, cancel: Cancel) -> QueryAnswer:
        return self._read(
            collection_id, cancel, lambda view, loaded: _query(view, loaded, request, cancel)
        )

    def count(self, collection_id: str, *, cancel: Cancel) -> int:
        view, _ = self._view(collection_id, cancel)
        return view.count

    def match(
        self, collection_id: str, request: GetRequest, *, cancel: Cancel
    ) -> tuple[list[str], int]:
        ids_only = replace(request, fields=Field.NONE)
        return self._read(
            collection_id,
            cancel,
            lambda view, _: (_get(view, ids_only, cancel).ids, view.last_offset),
        )

    def indexing_status(self, collection_id: str) -> IndexingStatus:
        last, indexed, unsettled = self._logs.status(collection_id)
        waiting = min(last, last - indexed + unsettled)
        return IndexingStatus(num_indexed_ops=last - waiting, num_unindexed_ops=waiting)

    def quick(
        self, collection_id: str, request: GetRequest | QueryRequest | None
    ) -> Callable[[Cancel], Records | QueryAnswer | int] | None:
        loaded = self._loaded.get(collection_id)
        if loaded is None:
            return None
        snapshot = self._logs.snapshot(collection_id)
        view = loaded.view
        if view is None or not loaded.is_current(snapshot):
            return None
        with self._lock:
            if collection_id in self._loaded:
                self._loaded.move_to_end(collection_id)
                loaded.touched = True
        if request is None:
            return lambda _cancel: view.count
        limit_us = self._config.quick_us
        if isinstance(request, GetRequest):
            selections = quick.get_selections(view, request, limit_us)
            if selections is None:
                return None
            return partial(_page, view, request, selections)
        if not loaded.graphs_are_loaded:
            return None
        step = _nearest(loaded, request)
        selections = quick.query_selections(view, request, step, limit_us)
        if selections is None:
            return None
        return partial(_search, view, step, request, selections)

    # -- views

    def _read(
        self, collection_id: str, cancel: Cancel, answer: Callable[[View, LoadedCollection], _T]
    ) -> _T:
        """Answer from a view; if an object of it is gone, from the next version's."""
        missing: NotFound | None = None
        version = -1
        for _ in range(_ATTEMPTS_MAX):
            view, loaded = self._view(collection_id, cancel)
            if missing is not None and view.version == version:
                # A new snapshot still names what is missing: damage, not staleness (I12).
                raise Corrupt(f"collection {collection_id}: {missing}") from missing
            try:
                return answer(view, loaded)
            except NotFound as error:
                missing, version = error, view.version
                loaded.forget()
        raise Unavailable(f"collection {collection_id} changes faster than it can be read")

    def _view(self, collection_id: str, cancel: Cancel) -> tuple[View, LoadedCollection]:
        """The collection's state at a snapshot taken now: strong (I4)."""
        last_error: Exception | None = None
        previous: Snapshot | None = None
        for _ in range(_ATTEMPTS_MAX):
            cancel.check()
            try:
                snapshot = self._logs.snapshot(collection_id)
            except NotFound:
                self.drop(collection_id)
                raise
            if last_error is not None and snapshot == previous:
                # A new snapshot still names what is missing: damage, not staleness (I12).
                raise Corrupt(f"collection {collection_id}: {last_error}") from last_error
            loaded = self._load(collection_id, snapshot)
            try:
                return loaded.refresh(snapshot), loaded
            except Gone as error:
                last_error, previous = error, snapshot
                loaded.forget()
        raise Unavailable(f"collection {collection_id} changes faster than it can be read")

    def _load(self, collection_id: str, snapshot: Snapshot) -> LoadedCollection:
        with self._lock:
            loaded = self._loaded.get(collection_id)
            if loaded is not None and loaded.revision == snapshot.revision:
                self._loaded.move_to_end(collection_id)
                loaded.touched = True
                return loaded
        info = self._namespace.get_collection_by_id(collection_id)
        settings = index_settings(info.configuration)
        with self._lock:
            loaded = self._loaded.get(collection_id)
            if loaded is None:
                loaded = LoadedCollection(
                    collection_id,
                    settings,
                    info.revision,
                    self._logs,
                    self._versions,
                    self._store,
                    self._open_parts,
                )
                self._loaded[collection_id] = loaded
            else:
                loaded.settings, loaded.revision = settings, info.revision
        return loaded

    def drop(self, collection_id: str) -> None:
        """Forget a collection."""
        with self._lock:
            self._loaded.pop(collection_id, None)

    def trim(self) -> None:
        """Forget collections, least recently used first, until the memory budget is kept.

        The last one used stays even if it alone is above the budget: it would be loaded again at
        once. Also forgets dropped ones, and moves views of replaced versions on: they hold the
        tail that became a part. Called now and then by the node; cost: one look at each.
        """
        with self._lock:
            items = list(self._loaded.items())
        total, keep = 0, True
        for collection_id, loaded in reversed(items):
            try:
                snapshot = self._logs.snapshot(collection_id)
            except NotFound:
                self.drop(collection_id)
                continue
            keep = keep and (total == 0 or total + loaded.memory_bytes <= self._config.memory_bytes)
            total += loaded.memory_bytes
            if not keep:
                self.drop(collection_id)
                continue
            # Only if nobody reads: readers refresh by themselves, and must not wait for us.
            idle, loaded.touched = not loaded.touched, False
            if idle and loaded.view is not None and loaded.view.version < snapshot.version:
                with contextlib.suppress(Gone):  # Replaced again meanwhile: next time.
                    loaded.refresh(snapshot)

    def forget_pages(self) -> None:
        """Let go of the resident pages of what is mapped; they stay in the page cache."""
        with self._lock:
            items = list(self._loaded.values())
        for loaded in items:
            loaded.forget_pages()

    def prepare(self, collection_id: str, manifest: Manifest) -> None:
        """Open a part before a version names it, if its collection is loaded."""
        loaded = self._loaded.get(collection_id)
        if loaded is not None:
            # Swept because its writer was slow: the commit will say so (Conflict).
            with contextlib.suppress(NotFound):
                loaded.prepare(manifest)


def _filter(ids: list[str] | None, where: Where | None) -> Filter:
    return Filter(where, None if ids is None else tuple(dict.fromkeys(ids)))


def _get(view: View, request: GetRequest, cancel: Cancel) -> Records:
    if request.limit == 0:
        return _page(view, request, [], cancel)
    selections = _filter(request.ids, request.where).run(view, cancel)
    return _page(view, request, selections, cancel)


def _page(view: View, request: GetRequest, selections: list[Selection], cancel: Cancel) -> Records:
    hits = Page(request.limit, request.offset).run(view, selections)
    cancel.check()
    return Project(request.fields).run(view, hits)


def _nearest(loaded: LoadedCollection, request: QueryRequest) -> Nearest:
    settings = loaded.settings
    ef = math.ceil(settings.ef_search * cost.EF_MARGIN)
    return Nearest(settings.space, request.n_results, ef, request.exact)


def _query(
    view: View, loaded: LoadedCollection, request: QueryRequest, cancel: Cancel
) -> QueryAnswer:
    selections = _filter(request.ids, request.where).run(view, cancel) if request.n_results else []
    return _search(view, _nearest(loaded, request), request, selections, cancel)


def _search(
    view: View,
    step: Nearest,
    request: QueryRequest,
    selections: list[Selection],
    cancel: Cancel,
) -> QueryAnswer:
    dimension = request.embeddings.shape[1]
    if view.dimension is not None and len(request.embeddings) and dimension != view.dimension:
        raise dimension_error(view.dimension, dimension)
    if request.ids and request.n_results and view.count and not _any_lives(view, request.ids):
        # Official clients' tests want an error here; of several ids, the ones that live answer.
        raise InvalidArgument("Error finding id: none of the given ids exists in the collection")
    project = Project(request.fields)
    answer = QueryAnswer(records=[], distances=[])
    size_bytes = 0
    for query in request.embeddings:
        cancel.check()
        hits = step.run(query, view, selections, cancel)
        assert hits.distances is not None
        answer.records.append(project.run(view, hits))
        answer.distances.append(hits.distances)
        # One large document may answer every query vector: a small request, a huge answer.
        size_bytes += answer.records[-1].size_bytes
        if size_bytes > _ANSWER_BYTES_MAX:
            raise TooLarge(
                f"query_embeddings: the answer is larger than the maximum of {_ANSWER_BYTES_MAX} "
                "bytes; ask for fewer results, fewer vectors or less in `include`"
            )
    return answer


def _any_lives(view: View, ids: list[str]) -> bool:
    return any(bool((rows >= 0).any()) for rows in view.find_ids(ids))
