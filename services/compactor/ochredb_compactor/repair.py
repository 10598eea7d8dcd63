"""Repair: what is damaged is put back, built anew, or given up, in this order.

1. Put back: where one flipped bit explains the damage, the bytes are again what was written.
2. Build anew: a part of which only derived sections are damaged is rewritten, as by a merge.
3. Give up, only if that was asked for: rows of a part, or a request of the log, that cannot be
   read. The others are rewritten without them. The damaged bytes are kept
   (`ochredb.integrity.evidence`), and every record that is gone is named, there before it is gone.

Other processes may read and write meanwhile: it commits as merges do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ochredb.catalog.fragment_rows import FragmentPlace
from ochredb.catalog.jobs import Lease
from ochredb.catalog.versions import VersionPart
from ochredb.checksum import signed, xxh3
from ochredb.configuration import IndexSettings, index_settings
from ochredb.errors import Corrupt, NotFound, OchreError
from ochredb.fragment import decode, encode
from ochredb.integrity.evidence import Evidence
from ochredb.integrity.mend import flipped_bit, mended_object
from ochredb.parts import deleted as deleted_rows
from ochredb.parts.manifest import TRUTH, ObjectInfo
from ochredb.parts.reader import Part
from ochredb.parts.verified import VerifiedObject
from ochredb.parts.whole import ids_of, whole_rows
from ochredb.parts.writer import PartRows
from ochredb.storage.directory import DirectoryStore
from ochredb.types import Bools, Op, Operations
from ochredb_compactor.merge import merge, replace_rows
from ochredb_compactor.scheduler import MergePlan
from ochredb_compactor.world import World

_PAGE_FRAGMENTS = 128
_NO_ID = "-"  # Of an operation that does nothing.

Leases = Callable[[str, str], AbstractContextManager[Lease | None]]


@dataclass(frozen=True, slots=True)
class Lost:
    """A record, or an operation of the log, that is gone. What could not be read is None.

    offset: of an operation, its place in the log; of a record, its seq.
    """

    id: str | None
    offset: int | None


@dataclass(frozen=True, slots=True)
class Repaired:
    """What became of one damaged thing. outcome: put back | built anew | given up | left.

    lost: what is gone; of what was left, what would be.
    """

    collection: str
    place: str
    outcome: str
    told: str
    lost: tuple[Lost, ...] = ()


def repair(
    world: World,
    leases: Leases,
    collection_ids: Sequence[str],
    evidence: Evidence,
    accept_loss: bool,
    step: Callable[[str], None],
) -> list[Repaired]:
    """Mend what is damaged of these collections, of a store in a directory.

    accept_loss: give up what cannot be read. step: told what is looked at; it may raise.
    """
    assert isinstance(world.store, DirectoryStore)
    run = Repair(world, world.store, evidence, leases, accept_loss, step)
    for collection_id in collection_ids:
        try:
            run.run(collection_id)
        except OchreError as error:  # The others may be mended all the same (I9).
            run.done.append(Repaired(collection_id, "collection", "left", str(error)))
    return run.done


@dataclass
class Repair:
    """One run over all collections."""

    world: World
    store: DirectoryStore
    evidence: Evidence
    leases: Leases
    accept_loss: bool
    step: Callable[[str], None]
    done: list[Repaired] = field(default_factory=list)

    def run(self, collection: str) -> None:
        """Look at everything that a collection needs, and mend what is damaged."""
        for place in self._fragments(collection):
            self._mend_fragment(collection, place)
        version = self.world.logs.snapshot(collection).version
        settings = index_settings(
            self.world.namespace.get_collection_by_id(collection).configuration
        )
        for item in self.world.versions.parts(collection, version):
            if self._mend_bitmap(collection, item):
                self._mend_part(collection, item, settings)

    def _tell(
        self, collection: str, place: str, outcome: str, told: str, lost: tuple[Lost, ...] = ()
    ) -> None:
        self.done.append(Repaired(collection, place, outcome, told, lost))

    def _keep_loss(self, collection: str, place: str, told: str, lost: tuple[Lost, ...]) -> None:
        self.evidence.keep_loss(asdict(Repaired(collection, place, "giving up", told, lost)))

    # -- parts

    def _mend_part(self, collection: str, item: VersionPart, settings: IndexSettings) -> None:
        manifest = item.manifest
        bad = [n for n, info in enumerate(manifest.objects) if self._is_damaged(info)]
        truth = {manifest.sections[name].object for name in TRUTH}
        put_back = False
        for number in [number for number in bad if number in truth]:
            info = manifest.objects[number]
            content = self._content(info.key)
            if content is None:
                continue
            right = mended_object(content, info, partial(self.step, info.key))
            if right is not None:
                self.evidence.keep_object(info.key)
                self.store.put_back(info.key, right)
                self._tell(collection, info.key, "put back", "it is as it was written")
                bad.remove(number)
                put_back = True
        if not bad:
            if put_back:  # Who has the part open goes on with the damaged file: move them on.
                self._rebuild(collection, item, f"parts/{manifest.id}")
            return
        keys = ", ".join(manifest.objects[number].key for number in bad)
        part = Part(self.store, manifest, settings)
        whole = whole_rows(part)
        live = item.live_mask(self.store)
        live = np.ones(len(part), np.bool_) if live is None else live
        if bool(whole[live].all()) and truth.isdisjoint(bad):
            self._rebuild(collection, item, keys)
        else:
            self._salvage(collection, item, part, whole, live, keys)

    def _is_damaged(self, info: ObjectInfo) -> bool:
        self.step(info.key)
        try:
            return bool(VerifiedObject(self.store, info).wrong_blocks().any())
        except (Corrupt, NotFound):
            return True

    def _content(self, key: str) -> bytes | None:
        try:
            return self.store.get(key)
        except NotFound:
            return None

    def _rebuild(self, collection: str, item: VersionPart, keys: str) -> None:
        manifest = item.manifest
        with self.leases(collection, "merge") as lease:
            if lease is None:
                self._tell(collection, keys, "left", "another process works on it: try again")
                return
            plan = MergePlan((manifest.id,), None, manifest.has_graph)
            merge(self.world, lease, plan, lambda: self.step(keys), settles=True)
        self._tell(collection, keys, "built anew", "from the records and vectors, which are whole")

    def _salvage(
        self,
        collection: str,
        item: VersionPart,
        part: Part,
        whole: Bools,
        live: Bools,
        keys: str,
    ) -> None:
        lost = _lost(part, np.flatnonzero(live & ~whole))
        kept = live & whole
        told = f"{len(lost)} of {int(live.sum())} records cannot be read"
        if lost and not self.accept_loss:
            self._tell(collection, keys, "left", told, lost)
            return
        with self.leases(collection, "merge") as lease:
            if lease is None:
                self._tell(collection, keys, "left", "another process works on it: try again")
                return
            for info in item.manifest.objects:
                self.evidence.keep_object(info.key)
            if lost:
                self._keep_loss(collection, keys, told, lost)
            rows = _rows(part, np.flatnonzero(kept)) if kept.any() else None
            replace_rows(self.world, lease, item, kept, rows, lambda: self.step(keys))
        outcome = "given up" if lost else "built anew"
        self._tell(collection, keys, outcome, told if lost else "every record is whole", lost)

    # -- deleted rows

    def _mend_bitmap(self, collection: str, item: VersionPart) -> bool:
        """Whether it is known which rows of the part live."""
        key = item.deleted_key
        try:
            item.live_mask(self.store)
            return True
        except (Corrupt, NotFound) as error:
            problem = str(error)
        if key is not None and (content := self._content(key)) is not None:
            right = _mended_bitmap(content, item.manifest.rows, lambda: self.step(key))
            if right is not None:
                self.evidence.keep_object(key)
                self.store.put_back(key, right)
                self._tell(collection, key, "put back", "it is as it was written")
                return True
        self._tell(
            collection, key or f"deleted rows of {item.manifest.id}", "left",
            f"{problem}: which {item.deleted_count} records were deleted is not known;"
            " restore a backup, or drop the collection",
        )  # fmt: skip
        return False

    # -- the log

    def _fragments(self, collection: str) -> Iterator[FragmentPlace]:
        snapshot = self.world.logs.snapshot(collection)
        first, last = snapshot.indexed_offset + 1, snapshot.last_offset
        while first <= last:
            places = self.world.logs.fragments(collection, first, last, _PAGE_FRAGMENTS)
            if not places:
                return
            yield from places
            first = places[-1].stop + 1

    def _mend_fragment(self, collection: str, place: FragmentPlace) -> None:
        name = place.object_key or "catalog"
        self.step(name)
        data = self._fragment_bytes(place)
        if data is not None and signed(xxh3(data)) == place.checksum:
            return
        where = f"{name}: operations {place.start} to {place.stop}"
        right = None
        if data is not None:
            checksum = place.checksum & ((1 << 64) - 1)
            right = flipped_bit(data, checksum, lambda: self.step(name))
        lost = _lost_operations(place, data)
        if right is None and not self.accept_loss:
            self._tell(collection, where, "left", "they cannot be read", lost)
            return
        if place.object_key is not None:
            self.evidence.keep_object(place.object_key)
        else:
            self.evidence.keep_bytes(f"fragments/{collection}/{place.start}", data or b"")
        if right is not None:
            # Inline, also if it was in an object, which other requests may share.
            self.world.logs.replace_fragment(collection, place, right, place.checksum)
            self._tell(collection, where, "put back", "they are as they were written")
            return
        self._keep_loss(collection, where, "they cannot be read", lost)
        nothing = Operations(op=Op.NOOP, ids=[_NO_ID] * (place.stop - place.start + 1))
        payload = encode(nothing).to_pybytes()
        self.world.logs.replace_fragment(collection, place, payload, signed(xxh3(payload)))
        self._tell(collection, where, "given up", "they cannot be read", lost)

    def _fragment_bytes(self, place: FragmentPlace) -> bytes | None:
        if place.payload is not None:
            return place.payload
        content = self._content(place.object_key or "")
        return None if content is None else content[place.byte_start : place.byte_stop]


def _lost(part: Part, rows: Any) -> tuple[Lost, ...]:
    """By row: id and seq, as far as they can be read."""
    if not len(rows):
        return ()
    readable = whole_rows(part, ("records",))
    names = dict.fromkeys(rows.tolist())
    seqs = dict.fromkeys(rows.tolist())
    for row in rows.tolist():
        found = ids_of(part, np.array([row]))
        names[row] = found[0] if found else None
    if readable[rows].any():
        values = part.open_records().column("seq").to_numpy()
        seqs.update((row, int(values[row])) for row in rows[readable[rows]].tolist())
    return tuple(Lost(names[row], seqs[row]) for row in rows.tolist())


def _lost_operations(place: FragmentPlace, data: bytes | None) -> tuple[Lost, ...]:
    """By offset. The ids are what the damaged bytes say, if they can be decoded at all."""
    names: list[str | None] = [None] * (place.stop - place.start + 1)
    if data is not None:
        try:
            found = decode(data).ids
        except (Corrupt, UnicodeDecodeError):
            found = []
        if len(found) == len(names):
            names = list(found)
    return tuple(Lost(name, place.start + i) for i, name in enumerate(names))


def _rows(part: Part, rows: Any) -> PartRows:
    """Whole rows of a part, of which others are damaged. Memory: a copy of them."""
    batch = part.open_records()
    picks = {name: batch.column(name).take(rows) for name in batch.schema.names}
    stored, place = part.truth("vectors"), part.manifest.sections["vectors"]
    assert stored is not None, "no row is whole without its vector"
    vectors = np.frombuffer(stored.view[place.start : place.stop], np.float32)
    return PartRows(
        seqs=picks["seq"].to_numpy(),
        ids=picks["id"],
        documents=picks["document"],
        uris=picks["uri"],
        metadatas=picks["metadata"],
        vectors=vectors.reshape(len(part), -1)[rows],
    )


def _mended_bitmap(content: bytes, rows: int, step: Callable[[], None]) -> bytes | None:
    """The bitmap with its flipped bit flipped back; None if there is none."""
    right = deleted_rows.mended(content, lambda data, checksum: flipped_bit(data, checksum, step))
    if right is None:
        return None
    try:
        deleted_rows.decode(right, rows)
    except Corrupt:
        return None
    return right
