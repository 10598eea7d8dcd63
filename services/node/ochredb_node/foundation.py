"""What a process's roles stand on: a catalog and an object store that belong to each other.

The catalog is in memory, SQLite in a directory, or PostgreSQL; the objects are in memory, in a
directory, or in S3 behind a cache on the local disk. What is not used is not imported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ochredb.catalog.database import Database
from ochredb.catalog.migrate import open_directory, open_memory
from ochredb.catalog.read_only import open_read_only, read_only_reason
from ochredb.clock import Clock
from ochredb.crash_points import reach
from ochredb.errors import AlreadyExists, InvalidArgument, NotFound
from ochredb.ids import IdSource
from ochredb.storage.base import LocalStore, ObjectStore
from ochredb.storage.directory import DirectoryStore, ReadOnlyDirectoryStore
from ochredb.storage.memory import MemoryStore
from ochredb.storage.open_directory import check_directory, claim_alone, refuse_network
from ochredb.storage.space import Reserve

if TYPE_CHECKING:
    from ochredb.storage.cached import CachedStore
    from ochredb.storage.s3_config import S3Config
    from ochredb_node.config import NodeConfig

log = logging.getLogger("ochredb.node")

_STORE_ID_KEY = "store_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """Open. name: where it is, for messages; without password.

    clock: the one by which its stamps and leases are judged.
    claim: a descriptor that keeps other processes out where only one may be in.
    """

    database: Database
    store_id: str
    name: str
    clock: Clock
    is_read_only: bool = False
    claim: int | None = None

    def close(self) -> None:
        self.database.close()
        if self.claim is not None:
            os.close(self.claim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Foundation:
    """A catalog and its store, open. store_name: where the objects are, for messages.

    cache: `store`, if it keeps copies of what is stored elsewhere.
    """

    catalog: Catalog
    store: LocalStore
    store_name: str
    cache: CachedStore | None = None
    close_store: Callable[[], None] = lambda: None

    @property
    def objects(self) -> ObjectStore:
        """What is stored itself: checks and backups must not be told what a copy of it holds."""
        return self.store if self.cache is None else self.cache.store

    def check_store_id(self, has_collections: Callable[[], bool]) -> None:
        """Refuse a catalog paired with another store's objects: a sweep would delete them.

        A new store's objects are marked as the catalog's. Raises InvalidArgument.
        """
        catalog = self.catalog
        expected = catalog.store_id.encode()
        try:
            found = self.store.get(_STORE_ID_KEY)
        except NotFound:
            if catalog.is_read_only or has_collections():
                raise InvalidArgument(
                    f"the objects of the catalog {catalog.name} are missing or belong to no store:"
                    f" {self.store_name} has no store id (expected {catalog.store_id})"
                ) from None
            try:
                self.store.create(_STORE_ID_KEY, expected)
                reach("store-id.created")
                return
            except AlreadyExists:  # Another process opened the new store at the same time.
                found = self.store.get(_STORE_ID_KEY)
        if found != expected:
            raise InvalidArgument(
                f"the catalog {catalog.name} belongs to store {catalog.store_id}, its objects in"
                f" {self.store_name} to store {found.decode(errors='replace')}"
            )

    def close(self) -> None:
        self.catalog.close()
        self.close_store()


def open_foundation(
    config: NodeConfig, clock: Clock, ids: IdSource, reserve: Reserve
) -> Foundation:
    """Open or create what the configuration names; nothing is left open if that fails.

    What may only be read is opened for reading (decision 0018). Raises InvalidArgument for a place
    that is not ours, Unavailable for one that cannot be used now.
    """
    catalog = _open_catalog(config, clock, ids, reserve)
    if catalog.clock is not clock:
        ids = IdSource(catalog.clock)
    try:
        return _with_store(catalog, config, ids, reserve)
    except BaseException:
        catalog.close()
        raise


def _open_catalog(config: NodeConfig, clock: Clock, ids: IdSource, reserve: Reserve) -> Catalog:
    if config.catalog_url is not None:
        from ochredb.catalog.migrate_postgres import open_postgres

        postgres, store_id = open_postgres(config.catalog_url, clock, ids, config.postgres)
        return Catalog(
            database=postgres, store_id=store_id, name=postgres.place, clock=postgres.clock
        )
    path = config.path
    if path is None:
        in_memory, store_id = open_memory(clock, ids)
        return Catalog(database=in_memory, store_id=store_id, name="in memory", clock=clock)
    if (reason := read_only_reason(path)) is not None:
        refuse_network(os.path.realpath(path))
        sqlite, store_id = open_read_only(path, reason)
        log.warning("%s is open for reading only: %s", path, reason)
        return Catalog(
            database=sqlite, store_id=store_id, name=path, clock=clock, is_read_only=True
        )
    check_directory(path, clock=clock)
    claim = claim_alone(path)
    try:
        # On a full disk SQLite needs a little space even to read.
        sqlite, store_id = reserve.freeing(
            lambda: open_directory(path, clock, ids, on_full=reserve.found_full)
        )
    except BaseException:
        if claim is not None:
            os.close(claim)
        raise
    return Catalog(database=sqlite, store_id=store_id, name=path, clock=clock, claim=claim)


def _with_store(
    catalog: Catalog, config: NodeConfig, ids: IdSource, reserve: Reserve
) -> Foundation:
    if config.s3 is not None:
        return _with_s3(catalog, config, config.s3, ids)
    clock, path = catalog.clock, config.path
    if path is None:
        return Foundation(catalog=catalog, store=MemoryStore(clock), store_name="memory")
    if config.catalog_url is not None:
        check_directory(path, clock=clock)
    root = os.path.join(path, "objects")
    kind = ReadOnlyDirectoryStore if catalog.is_read_only else DirectoryStore
    store = kind(root, clock=clock, ids=ids, on_full=reserve.found_full)
    return Foundation(catalog=catalog, store=store, store_name=root)


def _with_s3(catalog: Catalog, config: NodeConfig, s3: S3Config, ids: IdSource) -> Foundation:
    """Objects in a bucket that was tried out, behind this process's cache."""
    # Late: for those who have a bucket.
    from ochredb.storage.cached import CachedStore
    from ochredb.storage.s3 import S3Store

    if config.cache_path is None:
        raise InvalidArgument("objects in S3 need a cache_path for local copies")
    objects = S3Store(s3, catalog.clock, ids)
    try:
        objects.check(writes=not catalog.is_read_only)
        cache = CachedStore(objects, config.cache_path, config.cache_bytes, catalog.clock, ids)
    except BaseException:
        objects.close()
        raise

    def close() -> None:
        cache.close()
        objects.close()

    name = f"{s3.place}, prefix {s3.prefix}" if s3.prefix else s3.place
    return Foundation(catalog=catalog, store=cache, store_name=name, cache=cache, close_store=close)
