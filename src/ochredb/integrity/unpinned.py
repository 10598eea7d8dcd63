"""What a check asks of a store that takes no pin: one that may only be read, or whose disk is full.

Answers as `Backups` does. Its copy of the catalog lies in the system's folder for temporary files,
and nothing keeps the objects of that state: if somebody else may write there, some may be collected
meanwhile, which `is_kept` tells from damage.
"""

from __future__ import annotations

import os
import shutil
import tempfile

from ochredb.backup.archive import size_and_checksum
from ochredb.backup.source import TTL_S, Started
from ochredb.catalog import facts
from ochredb.catalog.copies import copy_state
from ochredb.catalog.database import Database
from ochredb.catalog.read_only import open_read_only
from ochredb.catalog.seal import Seal
from ochredb.clock import Clock
from ochredb.errors import StorageFull, Unavailable
from ochredb.ids import IdSource
from ochredb.storage.base import ObjectStore
from ochredb.storage.directory import ReadOnlyDirectoryStore
from ochredb.storage.open_directory import CATALOG_FILE, refuse_network
from ochredb.storage.space import is_full


class Unpinned:
    """Of a database and a store that are open."""

    def __init__(
        self, database: Database, store: ObjectStore, store_id: str, clock: Clock, reason: str
    ) -> None:
        """reason: why nothing is pinned."""
        self.database, self.store, self.store_id = database, store, store_id
        self.reason = reason
        self._clock, self._ids = clock, IdSource(clock)
        self._folders: dict[str, str] = {}

    def begin(self, owner: str) -> Started:
        """Copy the catalog as it is now. Raises Unavailable if there is no place for that."""
        del owner
        state, created_us = self._ids.uuid7(), self._clock.now_us()
        folder = self._folders[state] = tempfile.mkdtemp(prefix="ochredb-check-")
        path = self.catalog_path(state)
        try:
            with self.database.read_consistent() as session:
                copy_state(session, path)
            size, checksum = size_and_checksum(path)
        except BaseException as error:
            self.end(state)
            if isinstance(error, StorageFull) or (isinstance(error, OSError) and is_full(error)):
                # Of the temporary files' disk, not of the store's.
                raise Unavailable(f"cannot copy the catalog to {folder}: it is full") from error
            raise
        return Started(state, self.store_id, created_us, TTL_S, size, checksum)

    def renew(self, state: str) -> None:
        """Nothing expires."""

    def end(self, state: str) -> None:
        shutil.rmtree(self._folders.pop(state), ignore_errors=True)

    def catalog_path(self, state: str) -> str:
        return os.path.join(self._folders[state], CATALOG_FILE)

    def is_kept(self, key: str) -> bool:
        """Whether the store still refers to an object."""
        with self.database.read_consistent() as session:
            return any(key == held for held, _ in facts.held_objects(session))

    def close(self) -> None:
        self.database.close()


def open_to_read(path: str, clock: Clock, reason: str) -> Unpinned:
    """A store that cannot be written, for `reason`. Raises as `open_read_only`, and Corrupt."""
    root = os.path.realpath(path)
    refuse_network(root)
    if os.statvfs(root).f_flag & os.ST_RDONLY:
        Seal(os.path.join(root, CATALOG_FILE)).hold()  # Only compares: there is no lock to hold.
    database, store_id = open_read_only(root, reason)
    store = ReadOnlyDirectoryStore(os.path.join(root, "objects"), clock=clock)
    return Unpinned(database, store, store_id, clock, reason)
