"""Reads: snapshot, view, operators (I4, I5, I10)."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from ochredb.cancel import Cancel
from ochredb.catalog.logs import LogTable
from ochredb.catalog.namespace import Namespace
from ochredb.catalog.versions import VersionTable
from ochredb.clock import Clock
from ochredb.configuration import IndexSettings, index_settings
from ochredb.errors import Corrupt, Exhausted, Gone, NotFound, Unavailable
from ochredb.explain import Trace
from ochredb.parts.manifest import Manifest
from ochredb.parts.open_parts import OpenParts
from ochredb.peers import (
    Batch,
    GetRequest,
    PartsAnswer,
    PartsRequest,
    QueryRequest,
    QuickRead,
)
from ochredb.plan.nearest import Nearest
from ochredb.plan.operators import Selection, step
from ochredb.segment import View
from ochredb.storage.base import LocalStore
from ochredb.tail import TailMemory
from ochredb.types import Field, IndexingStatus, QueryAnswer, Records, Snapshot
from ochredb_query import quick
from ochredb_query.answer import (
    SearchBatch,
    page_of,
    search_quickly,
    search_view,
    select,
    state_of,
)
from ochredb_query.config import QueryConfig
from ochredb_query.held import HeldCollections, HeldParts
from ochredb_query.loaded import LoadedCollection, Read
from ochredb_query.prefetch import Prefetcher
from ochredb_query.second_copies import SecondCopies
from ochredb_query.shares import share_of
from ochredb_query.spread import Spread

if TYPE_CHECKING:
    from ochredb_query.scatter import Scatter

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
        *,
        scatter: Scatter | None = None,
    ) -> None:
        """scatter: to the other query nodes, if large collections are to be spread over them."""
        self._logs, self._versions, self._namespace = logs, versions, namespace
        self._store, self._open_parts = store, open_parts
        self._clock, self._config = clock, config
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, LoadedCollection] = OrderedDict()
        self._turn = 0
        self._tails = TailMemory(config.tail_bytes_max)
        self._scatter = scatter
        self._held = HeldCollections(self._hold)
        self._prefetcher = Prefetcher(self._open_version)
        self._copies = SecondCopies(store, clock, scatter, config.spread_bytes, self._loaded.get)

    # -- peers.QueryNode

    def get(self, collection_id: str, request: GetRequest, *, cancel: Cancel) -> Records:
        trace = Trace("Get") if request.explain else None
        records = self._read(collection_id, cancel, lambda read: self._get(read, request), trace)
        records.plan = None if trace is None else trace.root
        return records

    def query(self, collection_id: str, request: QueryRequest, *, cancel: Cancel) -> QueryAnswer:
        trace = Trace("Query") if request.explain else None
        answer = self._read(collection_id, cancel, lambda read: self._query(read, request), trace)
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
            lambda read: (self._get(read, ids_only).ids, read.view.last_offset),
        )

    def search_parts(
        self, collection_id: str, request: PartsRequest, *, cancel: Cancel
    ) -> PartsAnswer:
        cancel.check()
        held = self._held.get(collection_id, request.snapshot.revision)
        trace = Trace("Node") if request.request.explain else None
        try:
            with step(trace, "Snapshot"):
                selected = held.at(request.snapshot, request.part_ids)
            nearest = partial(self._nearest, held.settings)
            answer = share_of(selected, request, nearest, cancel, trace)
        except NotFound as error:
            raise Gone(f"version {request.snapshot.version}: {error}") from error
        answer.plan = None if trace is None else trace.root
        return answer

    def keep_copies(self, objects: Sequence[tuple[str, int]], *, cancel: Cancel) -> None:
        cancel.check()
        self._copies.keep(objects)

    def indexing_status(self, collection_id: str, *, cancel: Cancel) -> IndexingStatus:
        cancel.check()
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
        if not self._logs.is_local or (request is not None and self._is_large(loaded)):
            return None  # An event loop must not wait for another machine.
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
            return QuickRead(partial(page_of, view, request, selections))
        if request.ids is None and request.n_results:
            nearest_of = partial(self._nearest, loaded.settings)
            search = searches.find(request, nearest_of, limit_us, self._config.beside_us)
            if search is None:
                return None
            run = partial(search_quickly, search, request)
            search_us = search.search_us * len(request.embeddings)
            return QuickRead(run, search, request.embeddings, search_us)
        nearest = self._nearest(loaded.settings, request)
        selections = quick.query_selections(view, request, nearest, limit_us)
        if selections is None:
            return None
        return QuickRead(partial(search_view, view, nearest, request, selections))

    def together(self, reads: Sequence[QuickRead]) -> Batch:
        return SearchBatch(reads)

    def _nearest(self, settings: IndexSettings, request: QueryRequest) -> Nearest:
        target = request.target_recall
        return Nearest(
            settings,
            request.n_results,
            self._config.target_recall if target is None else target,
            request.exact,
        )

    def _query(self, read: Read, request: QueryRequest) -> QueryAnswer:
        selections: list[Selection] = []
        if request.n_results:
            spread = self._spread(read) if len(request.embeddings) else None
            if spread is not None:
                return spread.query(request)
            selections = select(read.view, read.selected, request, read.cancel, read.trace)
        nearest = self._nearest(read.loaded.settings, request)
        return search_view(read.view, nearest, request, selections, read.cancel, read.trace)

    def _get(self, read: Read, request: GetRequest) -> Records:
        if request.limit == 0:
            return page_of(read.view, request, [], read.cancel, read.trace)
        spread = self._spread(read)
        if spread is not None:
            return spread.get(request)
        selections = select(read.view, read.selected, request, read.cancel, read.trace)
        return page_of(read.view, request, selections, read.cancel, read.trace)

    # -- other nodes

    def _is_large(self, loaded: LoadedCollection) -> bool:
        """Whether a collection's parts are spread over the nodes, if there are several."""
        return self._scatter is not None and loaded.stored_bytes > self._config.spread_bytes

    def _spread(self, read: Read) -> Spread | None:
        """How other nodes take part in a read; None if this one reads alone."""
        if self._scatter is None or read.is_alone or not self._is_large(read.loaded):
            return None
        sizes, names = read.loaded.part_bytes, [item.part_id for item in read.view.segments]
        owners = self._scatter.owners({name: sizes.get(name, 0) for name in names if name})
        if len(owners) == 1:
            return None
        nearest = partial(self._nearest, read.loaded.settings)
        return Spread(
            read.view, read.loaded, self._scatter, owners, nearest, read.cancel, read.trace
        )

    def _mine(self, sizes: dict[str, int]) -> tuple[str, ...]:
        """Those of a large collection's parts that this node keeps."""
        return next(iter(self._scatter.owners(sizes).values())) if self._scatter else ()

    def _hold(self, collection_id: str) -> HeldParts:
        info = self._namespace.get_collection_by_id(collection_id)
        return HeldParts(
            collection_id,
            index_settings(info.configuration),
            info.revision,
            self._logs,
            self._versions,
            self._store,
            self._open_parts,
        )

    # -- views

    def _read(
        self,
        collection_id: str,
        cancel: Cancel,
        answer: Callable[[Read], _T],
        trace: Trace | None = None,
    ) -> _T:
        """Answer from a view; if an object of it is gone, from the next version's."""
        missing: NotFound | None = None
        version, passed_over = -1, 0
        for _ in range(_ATTEMPTS_MAX):
            with step(trace, "Snapshot") as plan:
                view, loaded = self._view(collection_id, cancel)
                if plan is not None:
                    plan.details |= state_of(collection_id, view)
            if missing is not None and view.version == version:
                # A new snapshot still names what is missing: damage, not staleness (I12).
                raise Corrupt(f"collection {collection_id}: {missing}") from missing
            try:
                # Who twice could not see what others see is not asked again.
                return answer(Read(view, loaded, cancel, trace, passed_over > 1))
            except NotFound as error:
                missing, version = error, view.version
                loaded.forget()
            except Gone:
                passed_over += 1
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
                    self._open_ahead,
                )
                self._loaded[collection_id] = loaded
            else:
                loaded.settings, loaded.revision = settings, info.revision
                loaded.searches = None  # Planned with the old settings.
        return loaded

    def drop(self, collection_id: str) -> None:
        """Forget a collection."""
        self._held.drop(collection_id)
        self._forget(collection_id)

    def _forget(self, collection_id: str) -> None:
        """Only what this node's own reads need; shares for others need little memory."""
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
                self._forget(other)
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

        Graphs, likewise, part by part, have what the collections leave of it. The last one used
        stays, of either, even if it alone is above the budget: it would be loaded again at once.
        Beyond their own budget, lets go of mapped pages, but not of what was read last.
        Also forgets dropped ones, and moves views of replaced versions on: they hold the tail that
        became a part. Called about once a second by the node; cost: a glance at each, and of those
        in use and an eighth of the others a snapshot and a count of what they hold. Returns whether
        any was read since the last call.
        """
        with self._lock:
            items = list(self._loaded.items())
        was_read = self._held.trim()
        total, mapped, keep = 0, 0, True
        self._turn = (self._turn + 1) % _TURNS
        for position, (collection_id, loaded) in enumerate(reversed(items)):
            idle, loaded.was_touched, loaded.touched = not loaded.touched, loaded.touched, False
            was_read = was_read or not idle
            self._copies.look(loaded)
            has_turn = not idle or position % _TURNS == self._turn
            if has_turn or loaded.measured is None:
                loaded.measured = loaded.memory_bytes, loaded.mapped_bytes
            memory_bytes, mapped_bytes = loaded.measured
            if position % _LOOKS_IN_A_ROW == _LOOKS_IN_A_ROW - 1:
                self._clock.sleep(_PAUSE_S)
            keep = keep and (total == 0 or total + memory_bytes <= self._config.memory_bytes)
            total += memory_bytes
            if not keep:
                self._forget(collection_id)
                total -= memory_bytes
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
        self._open_parts.graphs.trim(max(0, self._config.memory_bytes - total))
        return was_read

    def close(self) -> None:
        """Stop opening what nobody has asked for. Reads go on."""
        self._prefetcher.close()
        self._copies.close()

    def forget_pages(self) -> None:
        """Let go of the resident pages of what is mapped; they stay in the page cache."""
        with self._lock:
            items = list(self._loaded.values())
        for loaded in items:
            loaded.forget_pages()

    def prepare(self, collection_id: str, manifest: Manifest) -> None:
        """Open a part before a version names it, if its collection is loaded."""
        # Swept because its writer was slow: the commit will say so (Conflict).
        with contextlib.suppress(NotFound):
            self._prepare(collection_id, [manifest], is_whole=False)

    def prefetch(self, collection_id: str, version: int) -> None:
        """Told of a version: open its parts, if its collection is read here. Returns at once."""
        if collection_id in self._loaded or self._held.find(collection_id) is not None:
            self._prefetcher.add(collection_id, version)

    def _open_ahead(self, collection_id: str, version: int) -> bool:
        """See `LoadedCollection`. In a cluster hints come before reads do."""
        return self._logs.is_local and self._prefetcher.add(collection_id, version)

    def _open_version(self, collection_id: str, version: int) -> None:
        try:
            parts = self._versions.parts(collection_id, version)
            self._prepare(collection_id, [part.manifest for part in parts], is_whole=True)
        finally:
            if (loaded := self._loaded.get(collection_id)) is not None:
                loaded.arrive(version)

    def _prepare(self, collection_id: str, manifests: list[Manifest], *, is_whole: bool) -> None:
        """Open those of a version's parts that reads will need on this node, graphs and all.

        is_whole: these are all of its parts.
        """
        loaded, held = self._loaded.get(collection_id), self._held.find(collection_id)
        is_large = loaded is None or self._is_large(loaded)
        sizes = {manifest.id: manifest.size_bytes for manifest in manifests}
        if not is_whole and loaded is not None:
            sizes = {**loaded.part_bytes, **sizes}
        mine = self._mine(sizes)
        for manifest in manifests:
            if loaded is not None and (not is_large or manifest.id in mine):
                loaded.prepare(manifest)
            elif held is not None and manifest.id in mine:
                held.prepare(manifest)

    def read_lately(self, count_max: int) -> list[str]:
        """Ids of what was read in the last second or two, latest first. Cost: 50 ns for each."""
        with self._lock:
            read = (name for name, one in reversed(self._loaded.items()) if one.is_read)
            return list(islice(read, count_max))

    def open(self, collection_id: str) -> None:
        """Have a collection as ready to be read as if it had been."""
        with contextlib.suppress(NotFound):
            self._view(collection_id, Cancel())[1].warm()

    def follow(self, collection_id: str, _last_offset: int) -> None:
        """Told of each append of this process: who reads what is written shall not wait for it."""
        loaded = self._loaded.get(collection_id)
        if loaded is not None and loaded.is_read:
            with contextlib.suppress(Gone, NotFound, Exhausted):  # Readers find out what it means.
                loaded.follow()
                loaded.code_ahead()
