"""Taking a backup: keep a state, copy its catalog and its objects, check them, say so last."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping

from ochredb.backup.archive import (
    CATALOG_FILE,
    CHUNK_BYTES,
    MANIFEST_FILE,
    OBJECTS_FOLDER,
    BackedUpCollection,
    BackupManifest,
    Damage,
    Progress,
    StoredFile,
    claim_folder,
    object_path,
    silent,
    size_and_checksum,
    sync_folders,
    write_synced,
)
from ochredb.backup.checks import Check, checks_of
from ochredb.backup.counting import Counter
from ochredb.backup.source import Source, Started, open_store
from ochredb.catalog.copies import Contents, check_copy, contents, prune
from ochredb.catalog.sqlite import SqliteDatabase
from ochredb.clock import Clock, SystemClock
from ochredb.crash_points import reach
from ochredb.errors import Corrupt, Gone, InvalidArgument, NotFound, OchreError, Unavailable
from ochredb.storage import files
from ochredb.storage.directory import DirectoryStore

log = logging.getLogger("ochredb.backup")

_RENEWALS_PER_TTL = 4


def backup(
    source: str,
    target: str,
    *,
    headers: Mapping[str, str] | None = None,
    keep_going: bool = False,
    progress: Progress = silent,
) -> BackupManifest:
    """Back up a store into a new or empty directory, while it is read and written.

    source: a store's directory, which other processes may have open, or a server's URL.
    headers: for a server, such as `{"Authorization": "Bearer …"}`.
    keep_going: damaged objects are copied as they are, missing ones left out, and the manifest
        names them; without it a backup that finds damage is not completed.

    Raises Damage naming everything that is damaged at the source, InvalidArgument for a wrong
    source or target, Unavailable if one of them cannot be used now; what was copied then stays, and
    is recognised as incomplete.
    """
    clock = SystemClock()
    is_url = source.startswith(("http://", "https://"))
    if not is_url and _is_inside(target, source):
        raise InvalidArgument(f"{target} lies within the store {source}: choose another directory")
    opened = _open_remote(source, headers or {}, clock) if is_url else open_store(source)
    with contextlib.closing(opened):
        return take(opened, target, keep_going=keep_going, progress=progress, clock=clock)


def take(
    source: Source, target: str, *, keep_going: bool, progress: Progress, clock: Clock
) -> BackupManifest:
    """See `backup`."""
    root = claim_folder(target, "a backup")
    reach("backup.claimed")
    started = source.begin(f"{socket.gethostname()}/{os.getpid()}")
    taker = _Taker(source, started, root, progress, clock)
    try:
        held, objects = taker.copy_all()
    finally:
        try:
            source.end(started.id)
        except OchreError as error:  # It expires by itself, and there may be a worse error.
            log.warning("cannot end backup %s: %s", started.id, error)
    collections = taker.count(held)
    if taker.damaged and not keep_going:
        raise Damage(
            "the source is damaged, so the backup was not completed", list(taker.damaged.items())
        )
    manifest = BackupManifest(
        backup_id=started.id,
        store_id=started.store_id,
        created_us=started.created_us,
        catalog=taker.catalog(),
        objects=tuple(objects),
        collections=tuple(collections),
        damaged=tuple(taker.damaged.items()),
    )
    sync_folders(root)  # Before the manifest says that all this is there.
    reach("backup.folders-synced")
    write_synced(os.path.join(root, MANIFEST_FILE), [manifest.to_json()])
    reach("backup.manifest-written")
    files.sync_folder(root)
    reach("backup.done")
    return manifest


class _Unreadable(Exception):
    """One object of a source that answers otherwise."""


class _Taker:
    """One backup in progress. damaged: name and problem, in the order found."""

    def __init__(
        self, source: Source, started: Started, root: str, progress: Progress, clock: Clock
    ) -> None:
        self._source, self._started, self._root = source, started, root
        self._progress, self._clock = progress, clock
        self._renewed_s = clock.monotonic_s()
        self._done_bytes = self._total_bytes = 0
        self._catalog_path = os.path.join(root, CATALOG_FILE)
        self.damaged: dict[str, str] = {}

    def copy_all(self) -> tuple[Contents, list[StoredFile]]:
        """Copy the catalog, then every object that it refers to."""
        self._copy_catalog()
        database = SqliteDatabase(self._catalog_path)
        try:
            held = contents(database)
        finally:
            database.close()
        checks = checks_of(held)
        self._done_bytes, self._total_bytes = 0, sum(size for _, size in held.objects)
        stored = []
        for key, size in held.objects:
            check = checks[key]() if key in checks else None
            copied = self._copy_object(key, size, check)
            if copied is not None:
                stored.append(copied)
        return held, stored

    def catalog(self) -> StoredFile:
        size, checksum = size_and_checksum(self._catalog_path)
        return StoredFile(CATALOG_FILE, size, checksum)

    def count(self, held: Contents) -> list[BackedUpCollection]:
        """The collections of the copy, which is read and verified for it."""
        database = SqliteDatabase(self._catalog_path)
        counter = Counter(
            database, DirectoryStore(os.path.join(self._root, OBJECTS_FOLDER)), self._clock
        )
        found = []
        try:
            for item in held.collections:
                records: int | None = None
                try:
                    records = counter.count(item)
                except (Corrupt, NotFound, Gone) as error:
                    self.damaged.setdefault(f"collection {item.id}", str(error))
                found.append(
                    BackedUpCollection(
                        item.id,
                        item.tenant,
                        item.database,
                        item.name,
                        records,
                        item.version,
                        item.indexed_offset,
                        item.last_offset,
                    )
                )
        finally:
            database.close()
        return found

    def _copy_catalog(self) -> None:
        self._total_bytes = self._started.catalog_bytes

        def read(start: int, stop: int) -> bytes:
            return self._source.read_catalog(self._started.id, start, stop)

        size, checksum = write_synced(
            self._catalog_path, self._pieces("catalog", read, self._total_bytes, None)
        )
        reach("backup.catalog-written")
        if (size, checksum) != (self._started.catalog_bytes, self._started.catalog_checksum):
            raise Unavailable("the copy of the catalog arrived damaged: try again")
        store_id = check_copy(self._catalog_path)
        if store_id != self._started.store_id:
            raise Corrupt(f"the catalog names store {store_id} instead of {self._started.store_id}")
        prune(self._catalog_path)
        reach("backup.pruned")

    def _copy_object(self, key: str, size: int, check: Check | None) -> StoredFile | None:
        path = object_path(self._root, key)
        os.makedirs(os.path.dirname(path), exist_ok=True)

        def read(start: int, stop: int) -> bytes:
            try:
                return self._source.read_object(self._started.id, key, start, stop)
            except Unavailable as error:
                # A bad sector, if the source answers otherwise: one of its objects is lost.
                self._source.renew(self._started.id)
                raise _Unreadable(f"cannot be read: {error}") from error

        before = self._done_bytes
        try:
            found, checksum = write_synced(path, self._pieces(key, read, size, check))
            reach("backup.object-written")
        except (NotFound, _Unreadable) as error:
            self._source.renew(self._started.id)  # Raises if it is the backup that is not there.
            files.unlink_if_exists(path)
            self.damaged[key] = "is missing" if isinstance(error, NotFound) else str(error)
            return None
        finally:
            self._done_bytes = before + size
        if found != size:
            self.damaged[key] = f"has {found} bytes instead of {size}"
        elif check is not None and (problem := check.problem()) is not None:
            self.damaged[key] = problem
        return StoredFile(key, found, checksum)

    def _pieces(
        self, what: str, read: Callable[[int, int], bytes], size: int, check: Check | None
    ) -> Iterator[bytes]:
        """The content, in chunks; ends early if there is less than `size`."""
        position = 0
        while position < size:
            chunk = read(position, min(size, position + CHUNK_BYTES))
            if not chunk:
                return
            if check is not None:
                check.update(chunk)
            yield chunk
            position += len(chunk)
            self._done_bytes += len(chunk)
            self._progress(what, self._done_bytes, self._total_bytes)
            self._renew_if_due()

    def _renew_if_due(self) -> None:
        now = self._clock.monotonic_s()
        if now - self._renewed_s >= self._started.ttl_s / _RENEWALS_PER_TTL:
            self._source.renew(self._started.id)
            self._renewed_s = now


def _open_remote(url: str, headers: Mapping[str, str], clock: Clock) -> Source:
    from ochredb.backup.remote import RemoteSource  # Late: an HTTP client, for those who need it.

    return RemoteSource(url, headers, clock)


def _is_inside(path: str, folder: str) -> bool:
    inner, outer = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath((inner, outer)) == outer
