"""Vacuum: everything that background work does when it is due, done now and to the end.

In this order, because each step makes what the next one gives back: fold every log, write anew the
parts with too many dead rows, let replaced versions go, wait until no read can need them (the grace
period; nothing shortens it), delete their objects and orphans, give back the catalog's pages.

A purge counts any dead row or label as too many, and also writes the catalog anew. It needs no
marks in the log: a log that is folded is trimmed, with the objects that its fragments shared.
What still keeps something is told, not overruled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import orjson

from ochredb.catalog import shrink
from ochredb.catalog.database import Database
from ochredb.catalog.pins import PinTable
from ochredb.catalog.quarantine import QuarantineTable
from ochredb.catalog.sqlite import SqliteDatabase
from ochredb.configuration import index_settings
from ochredb.errors import Conflict, Gone, NotFound, OchreError
from ochredb.integrity.evidence import kept_aside
from ochredb.replay import read_operations
from ochredb.types import METADATA_TYPES, Snapshot
from ochredb.vacuum import Phase, VacuumReport
from ochredb_compactor.garbage import collect, find_orphans, let_go, sweep
from ochredb_compactor.service import CompactorService
from ochredb_compactor.world import World

_DEAD_SHARE_MAX = 0.05  # More, and a part is written anew.
_PAGES_PER_STEP = 250
_ATTEMPTS_MAX = 20
_LOG_ATTEMPTS_MAX = 50
_PAUSE_S = 0.1
_KEPT_BY_SERVER = (
    "the database server's write-ahead log, its standbys and its backups have what was deleted"
    " until they recycle it"
)


class Temporary(Protocol):
    """A store's unfinished files."""

    def temporary_count(self) -> int: ...

    def clean_temporary(self, older_than_us: int, keep: frozenset[str] = ...) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a vacuum works with.

    temporary: None for a store without files. directory: None for a store without one.
    """

    world: World
    compactor: CompactorService
    database: Database
    pins: PinTable
    quarantine: QuarantineTable
    temporary: Temporary | None
    directory: str | None


class Vacuum:
    """One run. progress: told how far it is; step: called often, raises to give up."""

    def __init__(
        self,
        surroundings: Surroundings,
        *,
        purge: bool,
        progress: Callable[[Phase, float, float], None],
        step: Callable[[], None],
    ) -> None:
        self._around, self._world = surroundings, surroundings.world
        self._purge, self._progress, self._step = purge, progress, step
        self._problems: list[str] = []
        self._kept: list[str] = []

    def run(self) -> VacuumReport:
        before, bytes_before = self._objects()
        collections = self._world.namespace.all_ids()
        rewritten = 0
        for done, collection in enumerate(collections):
            self._progress("compacting", done, len(collections))
            rewritten += self._compact(collection)
            self._step()
        released_us = self._let_go()
        self._wait_for_reads(released_us)
        self._delete(released_us)
        self._shrink_catalog()
        after, bytes_after = self._objects()
        return VacuumReport(
            purge=self._purge,
            collections=len(collections),
            parts_rewritten=rewritten,
            objects_deleted=len(before - after),
            bytes_before=bytes_before,
            bytes_after=bytes_after,
            problems=tuple(self._problems),
            kept=tuple(self._kept),
        )

    def _compact(self, collection: str) -> int:
        """Fold and merge; one collection that cannot be does not keep the others (I9).

        Returns how many of its parts are new.
        """
        compactor = self._around.compactor
        share = 0.0 if self._purge else _DEAD_SHARE_MAX
        try:
            before = self._part_ids(collection)
            compactor.compact_now(collection, self._step)
            compactor.rewrite_now(collection, share, self._step)
            if self._purge:
                self._forget_keys(collection)
            return len(self._part_ids(collection) - before)
        except NotFound:  # Dropped meanwhile.
            return 0
        except OchreError as error:
            self._problems.append(f"collection {collection}: {error}")
            return 0

    def _part_ids(self, collection: str) -> set[str]:
        version = self._world.logs.snapshot(collection).version
        return {item.manifest.id for item in self._world.versions.parts(collection, version)}

    def _forget_keys(self, collection: str) -> None:
        """Metadata keys that no record has any more."""
        logs = self._world.logs
        for _ in range(_ATTEMPTS_MAX):
            with contextlib.suppress(Conflict, Gone):  # Written to, or folded, meanwhile.
                snapshot = logs.snapshot(collection)
                unused = logs.keys.all(collection) - self._used_keys(snapshot)
                if unused:
                    logs.keys.forget(collection, snapshot.next_offset, unused)
                return
        self._problems.append(
            f"collection {collection} is written to all the time: names of metadata keys that no "
            "record has are left"
        )

    def _used_keys(self, snapshot: Snapshot) -> set[tuple[str, str]]:
        """(key, type) pairs that records may have: of parts exactly, of the log any type."""
        world, collection = self._world, snapshot.collection_id
        settings = index_settings(world.namespace.get_collection_by_id(collection).configuration)
        used: set[tuple[str, str]] = set()
        for item in world.versions.parts(collection, snapshot.version):
            used |= world.parts.open(item.manifest, settings).metadata.key_types
        first, last = snapshot.indexed_offset + 1, snapshot.last_offset
        log = read_operations(
            world.logs,
            world.store,
            collection,
            first,
            last,
            snapshot.dimension,
            lambda _poison: None,
        )
        for _, operations in log:
            for text in filter(None, operations.metadatas or ()):
                used |= {(key, kind) for key in orjson.loads(text) for kind in METADATA_TYPES}
        return used

    def _let_go(self) -> int:
        """Replaced versions, expired pins; returns when all that is garbage had become it."""
        world = self._world
        self._around.pins.release_expired()
        let_go(world, world.clock.now_us(), self._step)
        world.jobs.tidy()
        return world.clock.now_us()

    def _wait_for_reads(self, released_us: int) -> None:
        """A read that began before may still open what was let go: its deadline is half of this."""
        world, grace_s = self._world, self._world.config.grace_s
        if not self._has_garbage(released_us):
            return
        while (left_s := (released_us - world.ages.before_us(grace_s)) / 1e6) >= 0:
            self._progress("waiting", max(0.0, grace_s - left_s), grace_s)
            self._step()
            world.clock.sleep(min(_PAUSE_S, grace_s))

    def _has_garbage(self, now_us: int) -> bool:
        if self._world.objects.count_unreferenced() or find_orphans(self._world, now_us)[0]:
            return True
        temporary = self._around.temporary
        return self._purge and temporary is not None and temporary.temporary_count() > 0

    def _delete(self, released_us: int) -> None:
        deleted = 0

        def step() -> None:
            nonlocal deleted
            deleted += 1
            self._progress("deleting", deleted, max(deleted, total))
            self._step()

        total = self._world.objects.count_unreferenced()
        collect(self._world, step)
        sweep(self._world, step)
        pins = self._around.pins.held()
        for pin in pins:
            self._kept.append(
                f"backup {pin.id} of {pin.owner} keeps {pin.objects} objects that nothing else "
                "needs, until it ends or expires"
            )
        self._tell_quarantine()
        self._tell_kept_aside()
        left = len(find_orphans(self._world, released_us)[0])
        if left:
            self._problems.append(f"{left} objects belong to nothing and could not be deleted")
        if self._purge and self._around.temporary is not None:
            self._around.temporary.clean_temporary(released_us, frozenset(pin.id for pin in pins))

    def _tell_quarantine(self) -> None:
        """What could not be folded may hold what was deleted since; nobody can tell."""
        operations: dict[str, int] = {}
        after = ("", 0)
        while found := self._around.quarantine.list(after):
            for item in found:
                operations[item.collection] = operations.get(item.collection, 0) + item.count
            after = (found[-1].collection, found[-1].start)
        self._kept += [
            f"collection {collection} has {count} operations in quarantine, as they were written"
            for collection, count in operations.items()
        ]

    def _tell_kept_aside(self) -> None:
        """Damaged files are the last copy of what they hold: only somebody may delete them."""
        if self._around.directory is None:
            return
        try:
            names = kept_aside(self._around.directory)
        except OchreError as error:
            self._problems.append(str(error))
            return
        self._kept += [
            f"{name} was put aside because of damage; delete it when nobody needs it any more"
            for name in names
        ]

    def _shrink_catalog(self) -> None:
        database = self._around.database
        if self._purge:
            self._progress("catalog", 0, 2)
            problem = shrink.rewrite(database)
            if problem is not None:
                self._problems.append(problem)
        if not isinstance(database, SqliteDatabase):
            if self._purge:
                self._kept.append(_KEPT_BY_SERVER)
            return  # The server gives space back by itself.
        if not self._purge:
            while (pages := shrink.free_pages(database)) > 0:
                self._progress("catalog", 0, pages)
                database.release_free_pages(_PAGES_PER_STEP)
                self._step()
        for _ in range(_LOG_ATTEMPTS_MAX):
            self._progress("catalog", 1, 2)
            self._step()
            if shrink.cut_log(database):
                return
            self._world.clock.sleep(_PAUSE_S)
        self._problems.append("a long read keeps the catalog's write-ahead log")

    def _objects(self) -> tuple[set[str], int]:
        """The keys of all objects, and bytes on disk with the catalog."""
        keys, size = set(), shrink.size_bytes(self._around.database)
        for item in self._world.store.list(""):
            keys.add(item.key)
            size += item.size
        return keys, size
