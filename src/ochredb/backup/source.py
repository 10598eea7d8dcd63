"""What a backup asks of a store: a state that is kept, and its bytes, chunk by chunk.

`Backups` is a store of this machine, opened or opened anew; `ochredb.backup.remote` asks a server
the same questions. Nothing is held between two calls but a pin in the catalog and a copy of the
catalog in the store's folder for temporary files, so any process with the store may answer any of
them, and what a dead backup leaves behind goes by itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from ochredb.ages import Ages
from ochredb.backup.archive import CHUNK_BYTES, size_and_checksum
from ochredb.catalog.copies import copy_state
from ochredb.catalog.database import Database
from ochredb.catalog.migrate import open_directory
from ochredb.catalog.pins import PinTable
from ochredb.clock import Clock, SystemClock
from ochredb.crash_points import reach
from ochredb.errors import InvalidArgument, NotFound, StorageFull, Unavailable
from ochredb.ids import IdSource, uuid7_time_us
from ochredb.storage import files
from ochredb.storage.base import RESERVED_PART, ObjectStore
from ochredb.storage.directory import DirectoryStore
from ochredb.storage.open_directory import CATALOG_FILE, check_directory
from ochredb.storage.space import is_full

TTL_S = 120.0  # A pin that is not renewed expires after this.
READ_BYTES_MAX = 2 * CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class Started:
    """A backup that was begun. catalog_checksum: xxh3-64, unsigned. ttl_s: renew within it."""

    id: str
    store_id: str
    created_us: int
    ttl_s: float
    catalog_bytes: int
    catalog_checksum: int


class Source(Protocol):
    """A store that can be backed up. Raises NotFound for a backup that has expired."""

    def begin(self, owner: str) -> Started:
        """Keep the current state. Raises Exhausted if too many backups run."""
        ...

    def read_catalog(self, backup_id: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the state's catalog; at most `READ_BYTES_MAX`."""
        ...

    def read_object(self, backup_id: str, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object of the state; fewer if the object is shorter."""
        ...

    def renew(self, backup_id: str) -> None:
        """Keep the state for `ttl_s` from now."""
        ...

    def end(self, backup_id: str) -> None:
        """Let go of the state; one that has ended is no error."""
        ...

    def close(self) -> None: ...


class Backups:
    """A Source: a store, through connections that are open already.

    What one process of a cluster has begun only that one can go on with: the copy of the catalog is
    a file of its host.
    """

    def __init__(
        self,
        folder: str,
        database: Database,
        store: ObjectStore,
        store_id: str,
        clock: Clock,
        ids: IdSource,
        *,
        ttl_s: float = TTL_S,
        ages: Ages | None = None,
    ) -> None:
        """folder: for copies of the catalog; whoever owns it sweeps what is forgotten there."""
        self.store, self.store_id = store, store_id
        self._folder = folder
        self._clock, self._ids, self._ttl_s = clock, ids, ttl_s
        self._pins = PinTable(database, clock, ages)
        self.database = database

    def begin(self, owner: str) -> Started:
        backup_id = self._ids.uuid7()
        path = self.catalog_path(backup_id)
        created_us = self._clock.now_us()
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with self._pins.take(backup_id, owner, self._ttl_s) as state:
                copy_state(state, path)
            reach("backup.catalog-copied")
            # Copying a large catalog takes its time, of which the holder has had nothing.
            self._pins.renew(backup_id, self._ttl_s)
            size, checksum = size_and_checksum(path)
        except BaseException as error:
            self.end(backup_id)
            if isinstance(error, OSError):
                kind = StorageFull if is_full(error) else Unavailable
                raise kind(f"cannot copy the catalog: {error.strerror}") from error
            raise
        return Started(backup_id, self.store_id, created_us, self._ttl_s, size, checksum)

    def read_catalog(self, backup_id: str, start: int, stop: int) -> bytes:
        _check_range(start, stop)
        self._pins.check(backup_id)
        path = self.catalog_path(backup_id)
        try:
            with files.opened(path) as descriptor:
                os.utime(path)  # The sweep of temporary files takes what nobody touches.
                stop = min(stop, files.size_of(descriptor))
                return files.read_range(descriptor, start, stop) if start < stop else b""
        except FileNotFoundError as error:
            raise NotFound(f"the catalog of backup [{backup_id}] is gone") from error
        except OSError as error:
            raise Unavailable(f"cannot read {path}: {error.strerror}") from error

    def read_object(self, backup_id: str, key: str, start: int, stop: int) -> bytes:
        _check_range(start, stop)
        self._pins.check_holds(backup_id, key)
        try:
            return self.store.get_range(key, start, stop)
        except ValueError:  # Shorter than the catalog says: the receiver's check will name it.
            size = next((item.size for item in self.store.list(key) if item.key == key), 0)
            return self.store.get_range(key, start, size) if start < size else b""

    def renew(self, backup_id: str) -> None:
        self._pins.renew(backup_id, self._ttl_s)

    def is_kept(self, _key: str) -> bool:
        """Whether an object of the state that is kept must be there."""
        return True

    def end(self, backup_id: str) -> None:
        self._pins.release(backup_id)
        files.unlink_if_exists(self.catalog_path(backup_id))
        reach("backup.copy-removed")

    def close(self) -> None:
        self.database.close()

    def catalog_path(self, backup_id: str) -> str:
        """Where the copy of the catalog lies. Raises InvalidArgument for what is no backup's id."""
        try:
            uuid7_time_us(backup_id)  # It comes from outside, and becomes a path.
        except ValueError:
            raise InvalidArgument(f"not a backup id: {backup_id!r}") from None
        return os.path.join(self._folder, backup_id)


def open_store(
    path: str,
    *,
    clock: Clock | None = None,
    ids: IdSource | None = None,
    ttl_s: float = TTL_S,
    as_it_is: bool = False,
) -> Backups:
    """The store in a directory, which other processes may have open; `close` it at the end.

    as_it_is: whether objects and catalog belong together is left to the caller.

    Raises InvalidArgument if there is none, Unavailable if it cannot be used now.
    """
    clock = clock or SystemClock()
    ids = ids or IdSource(clock)
    if not os.path.exists(os.path.join(path, CATALOG_FILE)):
        raise InvalidArgument(f"{path} is no OchreDB directory: it has no {CATALOG_FILE}")
    check_directory(path)
    root = os.path.realpath(path)
    database, store_id = open_directory(root, clock, ids)
    store = DirectoryStore(os.path.join(root, "objects"), clock=clock, ids=ids)
    try:
        if not as_it_is and store.get("store_id") != store_id.encode():
            raise InvalidArgument(f"the objects of {path} belong to another store")
    except BaseException as error:
        database.close()
        if isinstance(error, NotFound):
            raise InvalidArgument(f"the objects of {path} are missing") from error
        raise
    folder = os.path.join(root, "objects", RESERVED_PART)
    return Backups(folder, database, store, store_id, clock, ids, ttl_s=ttl_s)


def _check_range(start: int, stop: int) -> None:
    if not 0 <= start <= stop or stop - start > READ_BYTES_MAX:
        raise InvalidArgument(f"a range has 0 to {READ_BYTES_MAX} bytes, not {start} to {stop}")
