"""Reads: snapshot, view, operators (I4, I5, I10)."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from ochredb.cancel import Cancel
from ochredb.catalog.logs import LogTable
from ochredb.catalog.namespace import Namespace
from ochredb.catalog.versions import VersionTable
from ochredb.clock import Clock
from ochredb.configuration import index_settings
from ochredb.errors import Corrupt, Exhausted, Gone, NotFound, Unavailable
from ochredb.explain import Trace, Value
from ochredb.parts.manifest import Manifest
from ochredb.parts.open_parts import OpenParts
from ochredb.peers import Batch, GetRequest, QueryRequest, QuickRead
from ochredb.plan import cost
from ochredb.plan.nearest import Nearest
from ochredb.plan.operators import Filter, Page, Project, Selection, step
from ochredb.segment import View
from ochredb.storage.base import LocalStore
from ochredb.tail import TailMemory
from ochredb.types import Field, IndexingStatus, QueryAnswer, Records, Snapshot
from ochredb_query import quick
from ochredb_query.answer import SearchBatch, projected, search_quickly, search_view
from ochredb_query.config import QueryConfig
from ochredb_query.loaded import LoadedCollection
from ochredb_query.selected import name_of

_T = TypeVar("_T")
_ATTEMPTS_MAX = 20
_ALWAYS_LOOKED_AT = 64  # Of the collections used last, `trim` looks at so many each time ...
_TURNS = 8  # ... and at this share of the others.
_LOOKS_IN_A_ROW, _PAUSE_S = 256, 0.001  # Others want the interpreter's lock.


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
        self._turn = 0
        self._tails = TailMemory(config.tail_bytes_max)

    # -- peers.Query

    def get(self, collection_id: str, request: GetRequest, *, cancel: Cancel) -> Records:
        if not request.explain:
            return self._read(
                collection_id, cancel, lambda view, loaded: _get(view, loaded, request, cancel)
            )
        trace = Trace("Get")
        records = self._read(
            collection_id,
            cancel,
            lambda view, loaded: _get(view, loaded, request, cancel, trace),
            trace,
        )
        records.plan = trace.root
        return records

    def query(self, collection_id: str, request: QueryRequest, *, cancel: Cancel) -> QueryAnswer:
        trace = Trace("Query") if request.explain else None
        answer = self._read(
            collection_id,
            cancel,
            lambda view, loaded: self._query(view, loaded, request, cancel, trace),
            trace,
        )
        answer.plan = None if trace is None else trace.root
        return answer

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
            lambda view, loaded: (_get(view, loaded, ids_only, cancel).ids, view.last_offset),
        )

    def indexing_status(self, collection_id: str) -> IndexingStatus:
        last, indexed, unsettled, quarantined = self._logs.status(collection_id)
        waiting = min(last, last - indexed + unsettled)
        return IndexingStatus(
            num_indexed_ops=last - waiting,
            num_unindexed_ops=waiting,
            num_quarantined_ops=quarantined,
        )

    def quick(
        self, collection_id: str, request: GetRequest | QueryRequest | None
    ) -> QuickRead | None:
        loaded = self._loaded.get(collection_id)
        if loaded is None or (request is not None and request.explain):
            return None
        snapshot = self._logs.snapshot(collection_id)
        if not loaded.is_current(snapshot):
            # After a few writes of this process: catching up costs less than a pool's hand-over.
            with contextlib.suppress(Gone, Exhausted):
                loaded.refresh_if_quick(snapshot)
        view = loaded.view
        if view is None or not loaded.shows(view, snapshot):
            return None
        with self._lock:
            if collection_id in self._loaded:
                self._loaded.move_to_end(collection_id)
                loaded.touched = True
        if request is None:
            return QuickRead(lambda _cancel: view.count)
        limit_us = self._config.quick_us
        searches = loaded.searches_of(view)
        if isinstance(request, GetRequest):
            selections = quick.get_selections(searches, request, limit_us)
            if selections is None:
                return None
            return QuickRead(partial(_page, view, request, selections))
        if request.ids is None and request.n_results:
            search = searches.find(request, partial(self._nearest, loaded), limit_us)
            if search is None:
                return None
            return QuickRead(partial(search_quickly, search, request), search, request.embeddings)
        nearest = self._nearest(loaded, request)
        selections = quick.query_selections(view, request, nearest, limit_us)
        if selections is None:
            return None
        return QuickRead(partial(search_view, view, nearest, request, selections))

    def together(self, reads: Sequence[QuickRead]) -> Batch:
        return SearchBatch(reads)

    def _nearest(self, loaded: LoadedCollection, request: QueryRequest) -> Nearest:
        settings, target = loaded.settings, request.target_recall
        return Nearest(
            settings.space,
            request.n_results,
            math.ceil(settings.ef_search * cost.EF_MARGIN),
            self._config.target_recall if target is None else target,
            request.exact,
        )

    def _query(
        self,
        view: View,
        loaded: LoadedCollection,
        request: QueryRequest,
        cancel: Cancel,
        trace: Trace | None,
    ) -> QueryAnswer:
        selections = []
        if request.n_results:
            selections = _select(view, loaded, request, cancel, trace)
        nearest = self._nearest(loaded, request)
        return search_view(view, nearest, request, selections, cancel, trace)

    # -- views

    def _read(
        self,
        collection_id: str,
        cancel: Cancel,
        answer: Callable[[View, LoadedCollection], _T],
        trace: Trace | None = None,
    ) -> _T:
        """Answer from a view; if an object of it is gone, from the next version's."""
        missing: NotFound | None = None
        version = -1
        for _ in range(_ATTEMPTS_MAX):
            with step(trace, "Snapshot") as plan:
                view, loaded = self._view(collection_id, cancel)
                if plan is not None:
                    plan.details |= _explained(collection_id, view)
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
                    self._tails,
                    self._make_room,
                )
                self._loaded[collection_id] = loaded
            else:
                loaded.settings, loaded.revision = settings, info.revision
                loaded.searches = None  # Planned with the old settings.
        return loaded

    def drop(self, collection_id: str) -> None:
        """Forget a collection."""
        with self._lock:
            self._loaded.pop(collection_id, None)

    def _make_room(self, collection_id: str, needed: int) -> None:
        """Forget whole tails of others, least recently used first, until `needed` bytes fit.

        What a read still holds on to is not free. Raises Exhausted.
        """
        tails = self._tails
        if tails.has_room(needed):
            return
        with self._lock:
            others = [key for key, loaded in self._loaded.items() if loaded.has_tail]
        for other in others:
            if other != collection_id:
                self.drop(other)
                if tails.has_room(needed):
                    return
        raise Exhausted(
            f"collection {collection_id} has {needed} bytes of operations to read that are not yet"
            f" indexed, and reads of others hold {tails.size_bytes} of {tails.bytes_max}"
            if needed
            else f"the operations that reads hold in memory exceed {tails.bytes_max} bytes"
        )

    def trim(self) -> bool:
        """Forget collections, least recently used first, until the memory budget is kept.

        The last one used stays even if it alone is above the budget: it would be loaded again at
        once. Beyond their own budget, lets go of mapped pages, but not of what was read last.
        Also forgets dropped ones, and moves views of replaced versions on: they hold the tail that
        became a part. Called about once a second by the node; cost: a glance at each, and of those
        in use and an eighth of the others a snapshot and a count of what they hold. Returns whether
        any was read since the last call.
        """
        with self._lock:
            items = list(self._loaded.items())
        total, mapped, keep, was_read = 0, 0, True, False
        self._turn = (self._turn + 1) % _TURNS
        for position, (collection_id, loaded) in enumerate(reversed(items)):
            idle, loaded.was_touched, loaded.touched = not loaded.touched, loaded.touched, False
            was_read = was_read or not idle
            has_turn = not idle or position % _TURNS == self._turn
            if has_turn or loaded.measured is None:
                loaded.measured = loaded.memory_bytes, loaded.mapped_bytes
            memory_bytes, mapped_bytes = loaded.measured
            if position % _LOOKS_IN_A_ROW == _LOOKS_IN_A_ROW - 1:
                self._clock.sleep(_PAUSE_S)
            keep = keep and (total == 0 or total + memory_bytes <= self._config.memory_bytes)
            total += memory_bytes
            if not keep:
                self.drop(collection_id)
                continue
            loaded.is_resident = loaded.is_resident or not idle
            if loaded.is_resident:
                mapped += mapped_bytes
                unwanted = idle or position >= _ALWAYS_LOOKED_AT
                if unwanted and mapped > self._config.mapped_bytes:
                    loaded.is_resident = False
                    loaded.forget_pages()
            if position >= _ALWAYS_LOOKED_AT and not has_turn:
                continue
            try:
                snapshot = self._logs.snapshot(collection_id)
            except NotFound:
                self.drop(collection_id)
                continue
            # Only if nobody reads: readers refresh by themselves, and must not wait for us.
            if idle and loaded.view is not None and loaded.view.version < snapshot.version:
                loaded.measured = None
                # Replaced again meanwhile, or no room for its log: next time.
                with contextlib.suppress(Gone, Exhausted):
                    loaded.refresh(snapshot)
        return was_read

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

    def follow(self, collection_id: str, _last_offset: int) -> None:
        """Told of each append of this process: who reads what is written shall not wait for it."""
        loaded = self._loaded.get(collection_id)
        if loaded is not None and loaded.is_read:
            with contextlib.suppress(Gone, NotFound, Exhausted):  # Readers find out what it means.
                loaded.follow()


def _select(
    view: View,
    loaded: LoadedCollection,
    request: GetRequest | QueryRequest,
    cancel: Cancel,
    trace: Trace | None,
) -> list[Selection]:
    """The rows that may answer. An explained read finds them anew: its plan says how."""
    ids, where = request.ids, request.where
    if ids is not None or where is None or trace is not None:
        some_ids = None if ids is None else tuple(dict.fromkeys(ids))
        return Filter(where, some_ids).run(view, cancel, trace)
    selected, name = loaded.searches_of(view).selected, name_of(where)
    found = selected.find(name)
    if found is None:
        found = Filter(where).run(view, cancel)
        selected.keep(name, found)
    return found


def _explained(collection_id: str, view: View) -> dict[str, Value]:
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


def _get(
    view: View,
    loaded: LoadedCollection,
    request: GetRequest,
    cancel: Cancel,
    trace: Trace | None = None,
) -> Records:
    if request.limit == 0:
        return _page(view, request, [], cancel, trace)
    selections = _select(view, loaded, request, cancel, trace)
    return _page(view, request, selections, cancel, trace)


def _page(
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
