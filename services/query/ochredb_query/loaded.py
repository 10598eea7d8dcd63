"""One collection in memory: the parts of a version, the folded tail, the view that reads work on.

Refreshing is incremental: new fragments are folded onto what is there; a new version opens only the
parts that are new. Concurrent reads share one refresh. A view once taken stays valid.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ochredb.cancel import Cancel
from ochredb.catalog.logs import LogTable
from ochredb.catalog.versions import VersionTable
from ochredb.configuration import IndexSettings
from ochredb.errors import Exhausted, Gone, NotFound
from ochredb.explain import Trace
from ochredb.materialise import Fold
from ochredb.parts.manifest import Manifest
from ochredb.parts.open_parts import OpenParts
from ochredb.parts.reader import Part
from ochredb.poison import Poison
from ochredb.replay import read_operations
from ochredb.segment import SegmentView, View
from ochredb.storage.base import LocalStore
from ochredb.tail import ROW_BYTES, TailMemory, TailSegment
from ochredb.types import Snapshot
from ochredb_query.quick import Searches
from ochredb_query.selected import Selected

log = logging.getLogger("ochredb.query")

QUICK_OPERATIONS_MAX = 160  # Of writers beside readers: each read folds what four of them wrote.
_FOLLOWED_MAX = 3  # Times that a writer catches up with what others wrote meanwhile.
_OVERHEAD_BYTES = 32_768  # Python objects of an idle loaded collection, measured roughly.
_PART_BYTES = 4_096  # The same of an open part.


@dataclass(frozen=True, slots=True)
class Read:
    """One attempt at a read. is_alone: other nodes are not asked."""

    view: View
    loaded: LoadedCollection
    cancel: Cancel
    trace: Trace | None
    is_alone: bool

    def selected(self) -> Selected:
        return self.loaded.searches_of(self.view).selected


class LoadedCollection:
    """Thread-safe. `view` is the newest one; `settings` belong to `revision`."""

    def __init__(
        self,
        collection_id: str,
        settings: IndexSettings,
        revision: int,
        logs: LogTable,
        versions: VersionTable,
        store: LocalStore,
        open_parts: OpenParts,
        memory: TailMemory,
        make_room: Callable[[str, int], None],
        open_ahead: Callable[[str, int], bool] = lambda _collection, _version: False,
    ) -> None:
        """make_room: given this collection's id and a number of bytes, frees memory of tails of
        other collections until there is room, or raises Exhausted.

        open_ahead: have the parts of a version opened by another thread, which calls `arrive`;
        whether there is one.
        """
        self._memory, self._make_room = memory, make_room
        self._open_ahead = open_ahead
        self._ahead = self._arrived = -1  # The versions of the last of these calls.
        self.collection_id = collection_id
        self.settings, self.revision = settings, revision
        self._logs, self._versions, self._store = logs, versions, store
        self._open_parts = open_parts
        self._lock = threading.Lock()
        self._fold: Fold | None = None
        self._parts: dict[str, Part] = {}
        self._deleted_keys: dict[str, str] = {}  # Of parts whose deleted rows are an object.
        self._prepared: dict[str, Part] = {}
        self.view: View | None = None
        self.searches: Searches | None = None  # Of `view`, or of one before it.
        self._own_share: tuple[View, tuple[str, ...], Selected] | None = None  # Likewise.
        self.part_bytes: dict[str, int] = {}  # Of each part of the newest version that was opened.
        self.stored_bytes = 0  # Of all.
        self.touched = True  # Read since the flag was last cleared.
        self.measured: tuple[int, int] | None = None  # (memory, mapped) bytes, when last asked.
        self.was_touched = False  # Before that, since it was cleared the time before.
        self.copied_version, self.copied_until_s = -1, 0.0  # See `SecondCopies.look`.
        self.is_resident = True  # Mapped pages may be resident: they were not let go since a read.

    def searches_of(self, view: View) -> Searches:
        """What was planned and selected for a view, kept if it is the newest."""
        searches = self.searches
        if searches is None or searches.view is not view:
            searches = Searches(view)
            if self.view is view:
                self.searches = searches
        return searches

    def own_share(self, view: View, part_ids: tuple[str, ...]) -> Selected:
        """What filters select of a view's tail and of some of its parts, kept likewise."""
        kept = self._own_share
        if kept is not None and kept[0] is view and kept[1] == part_ids:
            return kept[2]
        selected = Selected(view.of(part_ids, with_tail=True))
        if self.view is view:
            self._own_share = view, part_ids, selected
        return selected

    def is_current(self, snapshot: Snapshot) -> bool:
        """Whether the newest view shows the snapshot exactly, under its configuration."""
        view = self.view
        return view is not None and self.shows(view, snapshot)

    def shows(self, view: View, snapshot: Snapshot) -> bool:
        """The same of a view that the caller holds."""
        return (
            view.last_offset == snapshot.last_offset
            and self.revision == snapshot.revision
            and self._serves(view, snapshot)
        )

    def _serves(self, view: View, snapshot: Snapshot) -> bool:
        """Whether reads at the snapshot go by the view's parts: by older ones while its are opened.

        Which parts hold the rows makes no difference to what is read (I5).
        """
        version = snapshot.version
        return view.version == version or (
            view.version < version == self._ahead and version > self._arrived
        )

    def refresh_is_quick(self, snapshot: Snapshot) -> bool:
        """Whether `refresh` would only fold a few operations, all in memory.

        So few take about half a millisecond: less than a pool's hand-over beside busy writers.
        """
        view = self.view
        return (
            view is not None
            and self._serves(view, snapshot)
            and self.revision == snapshot.revision
            and snapshot.last_offset - view.last_offset <= QUICK_OPERATIONS_MAX
            and all(part.has_open(("id_index", "record_batch")) for part in self._parts.values())
            and self._logs.recent.holds(
                self.collection_id, view.last_offset + 1, snapshot.last_offset
            )
        )

    def refresh(self, snapshot: Snapshot) -> View:
        """A view at the snapshot or later.

        Raises Gone if the snapshot is too old to be read, Exhausted if the log beyond its parts
        does not fit into memory.
        """
        with self._logs.reading(), self._lock:
            return self._refresh(snapshot)

    def refresh_if_quick(self, snapshot: Snapshot) -> None:
        """Catch up if that is quick and nobody else is at it; for an event loop."""
        with self._logs.reading():
            if self._lock.acquire(blocking=False):
                try:
                    if self.refresh_is_quick(snapshot):
                        self._refresh(snapshot)
                finally:
                    self._lock.release()

    def follow(self) -> None:
        """Catch up with many new operations, unless somebody is at it; after a write.

        So those who read need not. Few operations are left to them, which they fold in one go, and
        so is a new version, which may take long to open.
        """
        for _ in range(_FOLLOWED_MAX):
            snapshot = self._logs.snapshot(self.collection_id)
            with self._logs.reading():
                if not self._lock.acquire(blocking=False):
                    return
                try:
                    view = self.view
                    if view is None or self.revision != snapshot.revision:
                        return
                    if not self._serves(view, snapshot):
                        return
                    if snapshot.last_offset - view.last_offset <= QUICK_OPERATIONS_MAX:
                        return
                    self._refresh(snapshot)
                finally:
                    self._lock.release()

    def code_ahead(self) -> None:
        """Make what scans of the newest tail will use, if others used such; after a write.

        Cost: of each 4 MiB of vectors once, 3 ms.
        """
        view = self.view
        if view is None or not any(item.segment.coded.size_bytes for item in view.segments):
            return
        for item in view.segments:
            if isinstance(item.segment, TailSegment):
                item.segment.code_ahead(self.settings.space)

    def _refresh(self, snapshot: Snapshot) -> View:
        view = self.view
        stays = self._stays(snapshot)
        if view is not None and (stays or view.version >= snapshot.version):
            if view.last_offset >= snapshot.last_offset:
                return view
        fold = self._fold
        if fold is None or (fold.version != snapshot.version and not stays):
            if fold is not None and fold.version > snapshot.version:
                raise Gone("the snapshot is older than what is loaded")
            fold = self._open_version(snapshot)
            if fold.last_offset == snapshot.indexed_offset < snapshot.last_offset:
                self._admit()
        if fold.dimension is None:
            fold.dimension = snapshot.dimension
        self.searches = self._own_share = None  # They hold the old view.
        try:
            self._extend(fold, snapshot)
        except NotFound as error:
            self._fold = self.view = None
            raise Gone(f"version {snapshot.version}: {error}") from error
        except BaseException:
            self._fold = self.view = None  # Half-folded: start again next time.
            raise
        self._fold = fold
        self.view = fold.freeze()
        return self.view

    def _stays(self, snapshot: Snapshot) -> bool:
        """Whether to go on over the parts that are open, while those of a newer version are opened.

        Only what the log still holds can be folded onto them.
        """
        fold, version = self._fold, snapshot.version
        if fold is None or fold.version >= version or fold.last_offset < snapshot.indexed_offset:
            return False
        if version <= self._arrived:
            return False
        if version != self._ahead:
            names = [part.manifest.id for part in self._versions.parts(self.collection_id, version)]
            if all(name in self._parts or name in self._prepared for name in names):
                return False  # Nothing to wait for.
            if not self._open_ahead(self.collection_id, version):
                return False
            self._ahead = version
        return True

    def arrive(self, version: int) -> None:
        """The parts of a version are open, or cannot be: from now on reads go by them."""
        self._arrived = max(version, self._arrived)
        with contextlib.suppress(Gone, NotFound, Exhausted):  # Readers find out what it means.
            snapshot = self._logs.snapshot(self.collection_id)
            if self._fold is not None and self.revision == snapshot.revision:
                self.refresh(snapshot)

    def _admit(self) -> None:
        """Before a whole log is read into memory. Raises Exhausted if it does not fit."""
        rows, size_bytes = self._logs.tail_size(self.collection_id)
        needed = size_bytes + rows * ROW_BYTES
        try:
            self._make_room(self.collection_id, needed)
        except Exhausted:
            if self._fold is None:
                raise
            self._fold = self.view = None  # The state before, unless a read holds it.
            self._make_room(self.collection_id, needed)

    def _extend(self, fold: Fold, snapshot: Snapshot) -> None:
        fragments = read_operations(
            self._logs,
            self._store,
            self.collection_id,
            fold.last_offset + 1,
            snapshot.last_offset,
            snapshot.dimension,
            self._skipped,
        )
        for _ in fold.apply_all(fragments):
            if not self._memory.has_room():
                self._make_room(self.collection_id, 0)

    def _skipped(self, poison: Poison) -> None:
        log.warning(
            "collection %s: operations %d to %d cannot be folded and are skipped: %s",
            self.collection_id, poison.start, poison.stop, poison.reason,
        )  # fmt: skip

    def _open_version(self, snapshot: Snapshot) -> Fold:
        version_parts = self._versions.parts(self.collection_id, snapshot.version)
        if snapshot.version > 0 and snapshot.indexed_offset > 0 and not version_parts:
            # All rows dead leaves a version without parts; a dropped version looks the same.
            if self._logs.snapshot(self.collection_id).version != snapshot.version:
                raise Gone(f"version {snapshot.version} was dropped")
        parts: dict[str, Part] = {}
        base = []
        for item in version_parts:
            part = self._parts.get(item.manifest.id) or self._prepared.get(item.manifest.id)
            try:
                part = part or self._open_parts.open(item.manifest, self.settings)
                live = item.live_mask(self._store)
            except NotFound as error:
                raise Gone(f"version {snapshot.version}: {error}") from error
            parts[item.manifest.id] = part
            base.append(SegmentView(part, live, item.live_rows, item.manifest.id))
        self._parts, self._prepared = parts, {}
        self._deleted_keys = {
            item.manifest.id: item.deleted_key
            for item in version_parts
            if item.deleted_key is not None
        }
        self.part_bytes = {name: part.manifest.size_bytes for name, part in parts.items()}
        self.stored_bytes = sum(self.part_bytes.values())
        before, version, indexed = self._fold, snapshot.version, snapshot.indexed_offset
        moved = None if before is None else before.moved(version, indexed, base)
        return moved or Fold(version, indexed, base, self._memory)

    def prepare(self, manifest: Manifest) -> None:
        """Open a part that a coming version will name, graph and all, before reads need it."""
        part = self._parts.get(manifest.id) or self._prepared.get(manifest.id)
        if part is not None and part.has_open(("vectors",)):
            return
        part = part or self._open_parts.open(manifest, self.settings)
        part.warm()
        self._prepared[manifest.id] = part

    def warm(self) -> None:
        """Open what a first nearest-neighbour query will need of each part. Raises NotFound."""
        for part in list(self._parts.values()):
            part.warm()

    def forget_pages(self) -> None:
        """See `QueryService.forget_pages`."""
        for part in list(self._parts.values()):
            part.forget_pages()

    def forget(self) -> None:
        """Drop what is held in memory; the next read loads it again."""
        with self._lock:
            self._fold = self.view = self.searches = self._own_share = None
            self._parts, self._prepared = {}, {}

    def stored_objects(self) -> dict[str, list[tuple[str, int]]]:
        """Keys and sizes of what each part of the newest version is made of.

        0: not known, and small.
        """
        parts, deleted_keys = self._parts, self._deleted_keys
        objects = {
            name: [(info.key, info.size) for info in part.manifest.objects]
            for name, part in parts.items()
        }
        for name, key in deleted_keys.items():
            objects.get(name, []).append((key, 0))
        return objects

    @property
    def has_tail(self) -> bool:
        fold = self._fold
        return fold is not None and fold.tail_rows > 0

    @property
    def is_read(self) -> bool:
        """Whether it was read within the last second or two, as `trim` counts them."""
        return self.touched or self.was_touched

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the objects that reading this collection may map."""
        return sum(part.manifest.size_bytes for part in list(self._parts.values()))

    @property
    def memory_bytes(self) -> int:
        """Estimated heap bytes that forgetting would free, without graphs."""
        fold, searches = self._fold, self.searches
        tail = 0 if fold is None else fold.tail_bytes
        if (view := self.view) is not None:
            tail += sum(
                item.segment.coded.size_bytes for item in view.segments if item.part_id is None
            )
        masks = 0 if searches is None else searches.selected.size_bytes
        if (own_share := self._own_share) is not None:
            masks += own_share[2].size_bytes
        return _OVERHEAD_BYTES + tail + masks + _PART_BYTES * len(self._parts)
