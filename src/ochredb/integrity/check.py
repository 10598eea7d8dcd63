"""Checking a whole store, while it is read and written.

A pin keeps one state, as for a backup: its catalog is copied and looked through, then every object
that it refers to is read once and compared with its checksums. Memory: a few MB, and some hundred
bytes per object.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from ochredb.backup.archive import CHUNK_BYTES, Progress, silent
from ochredb.backup.checks import BlocksCheck, Check, WholeCheck, checks_of
from ochredb.backup.source import Backups, open_store
from ochredb.catalog import facts
from ochredb.catalog.copies import check_copy, contents
from ochredb.catalog.read_only import read_only_reason
from ochredb.catalog.sqlite import SqliteDatabase
from ochredb.checksum import BLOCK_BYTES, xxh3
from ochredb.clock import Clock, SystemClock
from ochredb.errors import (
    Corrupt,
    Forbidden,
    InvalidArgument,
    NotFound,
    OchreError,
    OtherFormat,
    StorageFull,
)
from ochredb.ids import uuid7_time_us
from ochredb.integrity.report import Finding, Report
from ochredb.integrity.unpinned import Unpinned, open_to_read
from ochredb.parts.manifest import TRUTH, Manifest, SectionPlace
from ochredb.storage.open_directory import CATALOG_FILE, MARKER_FILE
from ochredb.storage.space import has_no_room

_RENEWALS_PER_TTL = 4
_SECTOR_BYTES = 512  # Pages are some of them.
_ORPHAN_AGE_US = 3600 * 1_000_000  # Younger ones are likely somebody's upload.
_ORPHAN_PREFIXES = ("deleted/", "fragments/", "parts/")
# What reading rows of a damaged catalog may raise.
_UNREADABLE = (OchreError, sqlite3.Error, TypeError, ValueError, AttributeError, OverflowError)


def check(
    source: str, *, headers: Mapping[str, str] | None = None, progress: Progress = silent
) -> Report:
    """Verify a store: a directory, which other processes may have open, or a server's URL.

    headers: for a server, such as `{"Authorization": "Bearer …"}`.

    A store that may only be read, or whose disk is full, is checked without a pin.

    Raises InvalidArgument for what is no store, Unavailable if it cannot be read now. Damage is
    never an exception.
    """
    clock = SystemClock()
    if source.startswith(("http://", "https://")):
        # Late: an HTTP client, for those who need it.
        from ochredb.integrity.remote import check_remote

        return check_remote(source, headers or {}, clock, progress)
    torn = _torn_bytes(_catalog(source))  # Opened, it may be made longer.
    try:
        opened = _opened(source, clock)
    except OchreError as error:
        problem = _catalog_problem(source, error)
        if problem is None:
            raise
        return _unopened(problem)
    with contextlib.closing(opened):
        return check_store(opened, clock, progress, torn)


def _catalog(source: str) -> str:
    return os.path.join(source, CATALOG_FILE)


def _opened(source: str, clock: Clock) -> Backups | Unpinned:
    reason = read_only_reason(source)
    if reason is None and has_no_room(source) and os.path.isfile(_catalog(source)):
        reason = "its disk is full"  # To open it would take what a server may need to start.
    if reason is not None:
        return open_to_read(source, clock, reason)
    try:
        return open_store(source, clock=clock, as_it_is=True)
    except StorageFull as error:  # SQLite needs a little space even to read.
        return open_to_read(source, clock, str(error))


def check_store(
    backups: Backups | Unpinned,
    clock: Clock,
    progress: Progress = silent,
    torn_bytes: int | None = None,
) -> Report:
    """Verify a store that is open. See `check`. torn_bytes: of a catalog that ended in a page."""
    try:
        return _check(backups, clock, progress, torn_bytes)
    except (StorageFull, Forbidden) as error:  # Of the pin, or of the copy of the catalog.
        if isinstance(backups, Unpinned):
            raise
        unpinned = Unpinned(backups.database, backups.store, backups.store_id, clock, str(error))
        return _check(unpinned, clock, progress, torn_bytes)


def _check(
    backups: Backups | Unpinned, clock: Clock, progress: Progress, torn_bytes: int | None
) -> Report:
    run = _Check(backups, clock, progress)
    if torn_bytes is not None:
        # SQLite takes what is missing for zeros.
        run.find(facts.CATALOG, f"it has {torn_bytes} bytes, which are no whole pages")
    if isinstance(backups.database, SqliteDatabase) and backups.database.seal is not None:
        problem = backups.database.seal.problem()
        if problem is not None:
            run.find(facts.CATALOG, problem)
    try:
        started = backups.begin(f"check/{socket.gethostname()}/{os.getpid()}")
    except Corrupt as error:
        return _unopened(str(error))
    try:
        return run.report(started.id, started.ttl_s)
    finally:
        with contextlib.suppress(OchreError):  # The pin expires by itself.
            backups.end(started.id)


def _torn_bytes(path: str) -> int | None:
    """The size of a file that ends within a page; None of others. Not opened for it."""
    with contextlib.suppress(OSError):
        size = os.stat(path).st_size
        return size if size % _SECTOR_BYTES else None
    return None


def _unopened(problem: str) -> Report:
    finding = Finding(facts.CATALOG, f"{problem}; nothing else could be checked")
    return Report(
        store_id=None, collections=0, objects=0, size_bytes=0, elapsed_s=0.0, findings=(finding,)
    )


def _catalog_problem(path: str, error: OchreError) -> str | None:
    """What is wrong with the catalog, if that is why a store could not be opened."""
    if isinstance(error, OtherFormat):
        return None
    if isinstance(error, Corrupt):
        return str(error)
    if isinstance(error.__cause__, sqlite3.DatabaseError):
        code = getattr(error.__cause__, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
        if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            return str(error)
    names = set(os.listdir(path)) if os.path.isdir(path) else set()
    if isinstance(error, InvalidArgument) and MARKER_FILE in names and "objects" in names:
        return str(error) if CATALOG_FILE in names else f"{CATALOG_FILE} is missing"
    return None


@dataclass
class _Check:
    """One check in progress."""

    backups: Backups | Unpinned
    clock: Clock
    progress: Progress
    findings: list[Finding] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)
    _holders: dict[str, list[str]] = field(default_factory=dict)

    def report(self, pin: str, ttl_s: float) -> Report:
        started_s = self.clock.monotonic_s()
        path = self.backups.catalog_path(pin)
        self._check_store_id()
        with self._reading_catalog():
            check_copy(path)
        database = SqliteDatabase(path)
        checks: dict[str, Callable[[], Check]] = {}
        manifests: dict[str, Manifest] = {}
        quarantine: list[facts.SetAside] = []
        objects: list[tuple[str, int]] = []
        set_aside: dict[str, int] = {}
        try:
            with database.read_consistent() as session:
                with self._reading_catalog():
                    self._names = facts.full_names(session)
                    self._holders = facts.holders(session)
                    objects = facts.held_objects(session)
                    quarantine = facts.set_aside(session)
                    set_aside = facts.set_aside_objects(session)
                with self._reading_catalog():
                    for found in facts.contradictions(session):
                        names = () if found.collection is None else (found.collection,)
                        place = facts.LOG if found.in_payload else facts.CATALOG
                        self.find(place, found.problem, names)
            with self._reading_catalog():
                held = contents(database)
                checks = checks_of(held)
                checks |= {key: partial(WholeCheck, value) for key, value in set_aside.items()}
                manifests = {info.key: m for m in held.manifests for info in m.objects}
        finally:
            database.close()
        total = sum(size for _, size in objects)
        self._check_objects(objects, checks, manifests, total, pin, ttl_s)
        return Report(
            store_id=self.backups.store_id,
            collections=len(self._names),
            objects=len(objects),
            size_bytes=total + os.path.getsize(path),
            elapsed_s=round(self.clock.monotonic_s() - started_s, 3),
            findings=tuple(self.findings),
            notes=(*self._unpinned(), *self._orphans({key for key, _ in objects}, pin)),
            quarantine=tuple(quarantine),
        )

    def find(
        self,
        place: str,
        problem: str,
        collections: tuple[str, ...] | list[str] = (),
        sections: tuple[str, ...] | None = None,
    ) -> None:
        """sections: of a part, those that are hit."""
        derived = sections is not None and not set(TRUTH).intersection(sections)
        names = tuple(self._names.get(item, item) for item in collections)
        self.findings.append(Finding(place, problem, names, sections or (), derived))

    @contextlib.contextmanager
    def _reading_catalog(self) -> Iterator[None]:
        """What cannot be read of a damaged catalog is a finding, and the check goes on."""
        try:
            yield
        except _UNREADABLE as error:
            self.find(facts.CATALOG, f"it cannot be read: {error}")

    def _check_store_id(self) -> None:
        try:
            found = self.backups.store.get("store_id")
        except NotFound:
            self.find("store_id", "is missing")
            return
        if found != self.backups.store_id.encode():
            told = found[:80].decode(errors="replace")
            self.find("store_id", f"names store {told} instead of {self.backups.store_id}")

    def _check_objects(
        self,
        objects: list[tuple[str, int]],
        checks: dict[str, Callable[[], Check]],
        manifests: dict[str, Manifest],
        total: int,
        pin: str,
        ttl_s: float,
    ) -> None:
        done, renewed_s = 0, self.clock.monotonic_s()
        self.progress("objects", done, total)
        for key, size in objects:
            check = checks[key]() if key in checks else None
            before = done
            try:
                problem = None
                for chunk in self._chunks(key, size):
                    if check is not None:
                        check.update(chunk)
                    done += len(chunk)
                    self.progress(key, done, total)
                    now = self.clock.monotonic_s()
                    if now - renewed_s > ttl_s / _RENEWALS_PER_TTL:
                        self.backups.renew(pin)
                        renewed_s = now
                if done - before == size:
                    problem = None if check is None else check.problem()
                if problem is None:
                    problem = self._size_problem(key, size, done - before)
            except NotFound:
                problem = "is missing" if self.backups.is_kept(key) else None
            except OchreError as error:
                problem = f"cannot be read: {error}"
            done = before + size
            if problem is not None:
                sections = self._sections_hit(key, check, manifests.get(key))
                self.find(key, problem, self._holders.get(key, []), sections)

    def _chunks(self, key: str, size: int) -> Iterator[bytes]:
        """The object's bytes up to `size`; fewer if it is shorter."""
        for start in range(0, size, CHUNK_BYTES):
            stop = min(size, start + CHUNK_BYTES)
            try:
                yield self.backups.store.get_range(key, start, stop)
            except ValueError:
                return

    def _sections_hit(
        self, key: str, check: Check | None, manifest: Manifest | None
    ) -> tuple[str, ...] | None:
        """The sections of a part that lie in what is damaged of one of its objects."""
        if manifest is None:
            return None
        number = next(n for n, info in enumerate(manifest.objects) if info.key == key)
        wrong = check.wrong_blocks if isinstance(check, BlocksCheck) else None
        return tuple(
            name
            for name, place in manifest.sections.items()
            if place.object == number
            and (
                not wrong
                or any(
                    place.start < (block + 1) * BLOCK_BYTES and block * BLOCK_BYTES < place.stop
                    for block in wrong
                )
            )
            and not self._passes_alone(key, place, manifest.truth_checksums.get(name))
        )

    def _passes_alone(self, key: str, place: SectionPlace, checksum: int | None) -> bool:
        """Whether a section is right though blocks that it shares with others are not."""
        if checksum is None:
            return False
        try:
            return xxh3(self.backups.store.get_range(key, place.start, place.stop)) == checksum
        except (NotFound, ValueError):
            return False

    def _size_problem(self, key: str, size: int, found: int) -> str | None:
        if found != size:
            return f"is shorter than its {size} bytes"
        try:
            self.backups.store.get_range(key, size, size + 1)
        except ValueError:
            return None
        return f"is longer than its {size} bytes"

    def _unpinned(self) -> Iterator[str]:
        if isinstance(self.backups, Unpinned):
            yield f"nothing kept the objects while they were read: {self.backups.reason}"

    def _orphans(self, known: set[str], pin: str) -> Iterator[str]:
        """Old objects that nothing refers to: garbage collection takes them."""
        state_us = uuid7_time_us(pin)
        count = size = 0
        for prefix in _ORPHAN_PREFIXES:
            for item in self.backups.store.list(prefix):
                if item.key not in known and item.modified_us < state_us - _ORPHAN_AGE_US:
                    count += 1
                    size += item.size
        if count:
            yield f"{count} objects ({size} bytes) belong to nothing; they will be collected"
