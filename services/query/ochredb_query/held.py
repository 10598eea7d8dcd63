"""Parts that are searched for other nodes: which of their rows live at a snapshot that one took.

The tail's own rows are searched by the node that asks. Here the log only ends rows: an update,
upsert or delete of an id ends its row, and that can be told part by part, without the other parts
and without keeping the log (`ochredb.materialise.replaced_ids`). When it happened is kept with it,
so readers a little behind one another get their own snapshots, each exactly.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from ochredb.catalog.logs import LogTable
from ochredb.catalog.versions import VersionPart, VersionTable
from ochredb.configuration import IndexSettings
from ochredb.errors import Gone, NotFound
from ochredb.materialise import replaced_ids
from ochredb.parts.ids import Names
from ochredb.parts.manifest import Manifest
from ochredb.parts.open_parts import OpenParts
from ochredb.parts.reader import Part
from ochredb.poison import Poison
from ochredb.replay import read_operations
from ochredb.segment import SegmentView, View
from ochredb.storage.base import LocalStore
from ochredb.types import Bools, Int64s, Snapshot
from ochredb_query.selected import Selected

log = logging.getLogger("ochredb.query")

_VERSIONS_MAX = 2  # Kept: readers of the one before are still on their way.
_VIEWS_MAX = 4
_COLLECTIONS_MAX = 1_000
_BATCH_IDS = 4_000  # That share one look-up in the parts.


class _HeldPart:
    """One part of one version, and the rows that the log has ended since.

    last_offset: up to which the log was looked at, always the end of a fragment.
    """

    def __init__(self, part: Part, live: Bools | None, live_count: int, offset: int) -> None:
        self.part, self.last_offset = part, offset
        self._live, self._live_count = live, live_count
        self._rows: list[Int64s] = []  # Ended, and by which offsets: ascending.
        self._offsets: list[Int64s] = []

    def end(self, ids: Names, offsets: Int64s) -> None:
        """ids[i] was replaced or deleted at offsets[i]."""
        rows = self.part.find_ids(ids)
        here = rows >= 0
        if here.any():
            self._rows.append(rows[here])
            self._offsets.append(offsets[here])

    def view(self, last_offset: int) -> SegmentView:
        """The rows that live at `last_offset`, up to which the log has been looked at."""
        live, count = self._live, self._live_count
        if self._rows and self._offsets[0][0] <= last_offset:
            if len(self._rows) > 1:
                self._rows = [np.concatenate(self._rows)]
                self._offsets = [np.concatenate(self._offsets)]
            ended = self._rows[0][: self._offsets[0].searchsorted(last_offset, "right")]
            live = np.ones(len(self.part), np.bool_) if live is None else live.copy()
            live[ended] = False
            count = int(np.count_nonzero(live))
        return SegmentView(self.part, live, count, self.part.id)


class _HeldVersion:
    def __init__(self, parts: Sequence[VersionPart], prepared: dict[str, Part]) -> None:
        self.stored = {item.manifest.id: item for item in parts}
        self.prepared = prepared  # Only so that they stay open.
        self.held: dict[str, _HeldPart] = {}
        self.touched = True


class HeldParts:
    """Some parts of one collection. Thread-safe."""

    def __init__(
        self,
        collection_id: str,
        settings: IndexSettings,
        revision: int,
        logs: LogTable,
        versions: VersionTable,
        store: LocalStore,
        open_parts: OpenParts,
    ) -> None:
        self.collection_id = collection_id
        self.settings, self.revision = settings, revision
        self._logs, self._table, self._store = logs, versions, store
        self._open_parts = open_parts
        self._lock = threading.Lock()
        self._versions: dict[int, _HeldVersion] = {}
        self._prepared: dict[str, Part] = {}
        self._views: OrderedDict[tuple[int, int, tuple[str, ...]], Selected] = OrderedDict()
        self._touched = self._is_resident = True  # Since it was looked at: read, pages mapped.

    def at(self, snapshot: Snapshot, part_ids: tuple[str, ...]) -> Selected:
        """A view of these parts alone, exactly at the snapshot, and what filters select of it.

        Raises Gone.
        """
        key = (snapshot.version, snapshot.last_offset, part_ids)
        with self._lock:
            self._touched = True
            known = self._views.get(key)
            if known is not None:
                self._views.move_to_end(key)
                self._versions[snapshot.version].touched = True
                return known
        with self._logs.reading(), self._lock:
            try:
                version = self._version(snapshot.version)
                version.touched = True
                found = Selected(self._view(version, snapshot, part_ids))
            except NotFound as error:
                raise Gone(f"version {snapshot.version}: {error}") from error
            self._views[key] = found
            while len(self._views) > _VIEWS_MAX:
                self._views.popitem(last=False)
            return found

    def _version(self, number: int) -> _HeldVersion:
        version = self._versions.get(number)
        if version is None:
            parts = self._table.parts(self.collection_id, number)
            if not parts:
                raise Gone(f"version {number} of collection {self.collection_id} was dropped")
            version = self._versions[number] = _HeldVersion(parts, self._prepared)
            self._prepared = {}
            while len(self._versions) > _VERSIONS_MAX:
                self._forget_version(min(self._versions))
        return version

    def _forget_version(self, number: int) -> None:
        del self._versions[number]
        for key in [key for key in self._views if key[0] == number]:
            del self._views[key]

    def _view(self, version: _HeldVersion, snapshot: Snapshot, part_ids: tuple[str, ...]) -> View:
        parts = [self._part(version, part_id, snapshot) for part_id in part_ids]
        for offset in {
            part.last_offset for part in parts if part.last_offset < snapshot.last_offset
        }:
            behind = [part for part in parts if part.last_offset == offset]
            try:
                self._extend(behind, offset + 1, snapshot)
            except BaseException:  # Half looked at: start again next time.
                for part in behind:
                    version.held.pop(part.part.id, None)
                raise
        views = [part.view(snapshot.last_offset) for part in parts]
        segments = tuple(view for view in views if view.live_count)
        return View(
            version=snapshot.version,
            indexed_offset=snapshot.indexed_offset,
            last_offset=snapshot.last_offset,
            dimension=snapshot.dimension,
            segments=segments,
            count=sum(view.live_count for view in segments),
        )

    def _part(self, version: _HeldVersion, part_id: str, snapshot: Snapshot) -> _HeldPart:
        held = version.held.get(part_id)
        if held is None:
            stored = version.stored.get(part_id)
            if stored is None:
                raise Gone(f"version {snapshot.version} has no part {part_id}")
            part = self._open_parts.open(stored.manifest, self.settings)
            live = stored.live_mask(self._store)
            held = _HeldPart(part, live, stored.live_rows, snapshot.indexed_offset)
            version.held[part_id] = held
        return held

    def _extend(self, parts: list[_HeldPart], first: int, snapshot: Snapshot) -> None:
        """Look at the log from `first` up to the snapshot, for parts that all begin there."""
        fragments = read_operations(
            self._logs,
            self._store,
            self.collection_id,
            first,
            snapshot.last_offset,
            snapshot.dimension,
            self._skipped,
        )
        ids: list[str] = []
        offsets: list[Int64s] = []
        for first_offset, operations in fragments:
            if replaced := replaced_ids(operations):
                ids += replaced
                offsets.append(np.arange(first_offset, first_offset + len(replaced)))
            if len(ids) >= _BATCH_IDS:
                _end(parts, ids, offsets)
                ids, offsets = [], []
        if ids:
            _end(parts, ids, offsets)
        for part in parts:
            part.last_offset = snapshot.last_offset

    def _skipped(self, poison: Poison) -> None:
        log.warning(
            "collection %s: operations %d to %d cannot be folded and are skipped: %s",
            self.collection_id, poison.start, poison.stop, poison.reason,
        )  # fmt: skip

    def prepare(self, manifest: Manifest) -> None:
        """Open a part of a coming version, graph and all, before reads need it."""
        with self._lock:
            if manifest.id in self._prepared:
                return
        part = self._open_parts.open(manifest, self.settings)
        part.warm()
        with self._lock:
            self._prepared[manifest.id] = part

    def trim(self) -> bool:
        """See `HeldCollections.trim`."""
        with self._lock:
            for number in sorted(self._versions)[:-1]:
                if not self._versions[number].touched:
                    self._forget_version(number)
            for version in self._versions.values():
                version.touched = False
            was_read, self._touched = self._touched, False
            is_resident, self._is_resident = self._is_resident, was_read
        if is_resident and not was_read:
            self.forget_pages()
        return was_read

    def forget_pages(self) -> None:
        """See `QueryService.forget_pages`."""
        with self._lock:
            parts = [held.part for item in self._versions.values() for held in item.held.values()]
        for part in parts:
            part.forget_pages()


class HeldCollections:
    """Of which collections parts are searched for other nodes. Thread-safe."""

    def __init__(self, open_one: Callable[[str], HeldParts]) -> None:
        """open_one: a collection by its id, with its settings of now. Raises NotFound."""
        self._open_one = open_one
        self._lock = threading.Lock()
        self._held: OrderedDict[str, HeldParts] = OrderedDict()

    def find(self, collection_id: str) -> HeldParts | None:
        return self._held.get(collection_id)

    def get(self, collection_id: str, revision: int) -> HeldParts:
        """With settings of this revision or later. Raises NotFound."""
        with self._lock:
            held = self._held.get(collection_id)
            if held is not None and held.revision >= revision:
                self._held.move_to_end(collection_id)
                return held
        opened = self._open_one(collection_id)
        with self._lock:
            held = self._held.get(collection_id)
            if held is not None:
                if held.revision < opened.revision:
                    held.settings, held.revision = opened.settings, opened.revision
                return held
            self._held[collection_id] = opened
            while len(self._held) > _COLLECTIONS_MAX:
                self._held.popitem(last=False)
            return opened

    def drop(self, collection_id: str) -> None:
        with self._lock:
            self._held.pop(collection_id, None)

    def trim(self) -> bool:
        """Let go of what was not used since the last call: of old versions, and of mapped pages.

        Called about once a second. Returns whether anything was read since.
        """
        with self._lock:
            held = list(self._held.values())
        was_read = False
        for each in held:
            was_read = each.trim() or was_read
        return was_read


def _end(parts: list[_HeldPart], ids: list[str], offsets: list[Int64s]) -> None:
    names, places = Names(ids), np.concatenate(offsets)
    for part in parts:
        part.end(names, places)
