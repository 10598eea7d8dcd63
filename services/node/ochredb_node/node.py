"""Everything one process runs; the only class that knows every role.

Each part is built on first use; the attributes are the dependency graph.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ochredb.ages import Ages
from ochredb.cancel import Cancel
from ochredb.catalog.database import SqliteDatabase
from ochredb.catalog.jobs import Jobs
from ochredb.catalog.logs import BacklogLimits, LogTable
from ochredb.catalog.migrate import open_directory, open_memory
from ochredb.catalog.namespace import Namespace
from ochredb.catalog.objects import ObjectTable
from ochredb.catalog.pins import PinTable
from ochredb.catalog.quarantine import QuarantineTable
from ochredb.catalog.read_only import open_read_only, read_only_reason
from ochredb.catalog.repeats import KEYS_KEPT_S
from ochredb.catalog.versions import VersionTable
from ochredb.clock import Clock, SystemClock
from ochredb.crash_points import reach
from ochredb.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from ochredb.ids import IdSource
from ochredb.parts.open_parts import OpenParts
from ochredb.plan import cost
from ochredb.processes import process_name
from ochredb.storage.base import LocalStore
from ochredb.storage.directory import DirectoryStore, ReadOnlyDirectoryStore
from ochredb.storage.memory import MemoryStore
from ochredb.storage.open_directory import check_directory, claim_alone, refuse_network
from ochredb.storage.space import Reserve
from ochredb_compactor.config import CompactorConfig
from ochredb_compactor.service import CompactorService
from ochredb_compactor.world import World
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.messages import Request, Response
from ochredb_frontend.service import Frontend
from ochredb_log.config import LogConfig
from ochredb_log.service import LogService
from ochredb_node.tidier import Tidier
from ochredb_query.config import QueryConfig
from ochredb_query.service import QueryService

if TYPE_CHECKING:
    from ochredb.backup.source import Backups
    from ochredb.quarantine import Quarantine
    from ochredb_compactor.vacuums import VacuumService

log = logging.getLogger("ochredb.node")

_STORE_ID_KEY = "store_id"
_FREE_PAGES_PER_SECOND = 2_000
_IDLE_AFTER_S = 1.0  # Without a write.
_FOLDERS_PERIOD_S = 600.0
_MEASURE_AFTER_S = 5.0  # After the start; by then first answers have been given.


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Data only. path: the store's directory, None = in memory.

    foreground: an embedded writer whose backlog is full compacts by itself instead of getting 429.
    """

    path: str | None = None
    foreground: bool = False
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    log: LogConfig = field(default_factory=LogConfig)
    backlog: BacklogLimits = field(default_factory=BacklogLimits)
    query: QueryConfig = field(default_factory=QueryConfig)
    compactor: CompactorConfig = field(default_factory=CompactorConfig)


class Node:
    """One process's roles on one store. `start` opens the store, `close` folds and closes it."""

    def __init__(
        self,
        config: NodeConfig,
        *,
        clock: Clock | None = None,
        ids: IdSource | None = None,
        tidy: Callable[[bool], None] = lambda _idle: None,
    ) -> None:
        """tidy: called about once a second, with whether nothing was read or written meanwhile."""
        self.config = config
        self._tidy = tidy
        self.clock = clock or SystemClock()
        self.ids = ids or IdSource(self.clock)
        self.owner = process_name(self.ids)
        self.reserve, self.ages = Reserve(config.path), Ages(self.clock)
        self._database: SqliteDatabase | None = None
        self._store_id = ""
        self._started = self._closed = self._read_only = False
        self._tidier: Tidier | None = None
        self._claim: int | None = None  # Keeps others out where only one may be in.
        self._housekept_s = self._folders_s = 0.0
        self._measure_due_s = math.inf

    # -- components

    @property
    def database(self) -> SqliteDatabase:
        assert self._database is not None, "the node was not started"
        return self._database

    @cached_property
    def store(self) -> LocalStore:
        if self.config.path is None:
            return MemoryStore(self.clock)
        root = os.path.join(self.config.path, "objects")
        kind = ReadOnlyDirectoryStore if self._read_only else DirectoryStore
        return kind(root, clock=self.clock, ids=self.ids, on_full=self.reserve.found_full)

    @cached_property
    def logs(self) -> LogTable:
        return LogTable(self.database, self.clock, self.config.backlog)

    @cached_property
    def versions(self) -> VersionTable:
        return VersionTable(self.database, self.clock)

    @cached_property
    def namespace(self) -> Namespace:
        return Namespace(self.database, self.clock, self.ids, reserve=self.reserve)

    @cached_property
    def open_parts(self) -> OpenParts:
        return OpenParts(self.store)

    # -- roles

    @cached_property
    def log(self) -> LogService:
        return LogService(
            self.database,
            self.logs,
            self.store,
            self.ids,
            self.config.log,
            on_append=self._appended,
            make_room=self.compactor.fold_now if self.config.foreground else None,
            reserve=self.reserve,
        )

    def _appended(self, collection_id: str, last_offset: int) -> None:
        self.compactor.hint(collection_id, last_offset)
        self.query.follow(collection_id, last_offset)

    @cached_property
    def query(self) -> QueryService:
        return QueryService(
            self.logs,
            self.versions,
            self.namespace,
            self.store,
            self.open_parts,
            self.clock,
            self.config.query,
        )

    @cached_property
    def world(self) -> World:
        """What background work stands on."""
        return World(
            store=self.store,
            logs=self.logs,
            versions=self.versions,
            namespace=self.namespace,
            objects=ObjectTable(self.database),
            jobs=Jobs(self.database, self.clock),
            clock=self.clock,
            ids=self.ids,
            parts=self.open_parts,
            config=self.config.compactor,
            reserve=self.reserve,
            before_commit=self.query.prepare,
        )

    @cached_property
    def compactor(self) -> CompactorService:
        return CompactorService(
            self.world, self.owner, on_idle=self._housekeep, on_quiet=self.query.forget_pages
        )

    @cached_property
    def vacuums(self) -> VacuumService:
        """Vacuums of this store by this process; imported by the first of them."""
        from ochredb_compactor.vacuum import Surroundings
        from ochredb_compactor.vacuums import VacuumService

        surroundings = Surroundings(
            world=self.world,
            compactor=self.compactor,
            database=self.database,
            pins=PinTable(self.database, self.clock),
            quarantine=QuarantineTable(self.database, self.clock),
            temporary=self.store if isinstance(self.store, DirectoryStore) else None,
        )
        return VacuumService(surroundings)

    @cached_property
    def backups(self) -> Backups:
        """What backups of this store ask; imported by the first of them."""
        from ochredb.backup.source import Backups

        assert self.config.path is not None
        return Backups(
            self.config.path,
            self.database,
            self.store,
            self._store_id,
            self.clock,
            self.ids,
            ages=self.ages,
        )

    @cached_property
    def quarantine(self) -> Quarantine:
        """What could not be folded; imported when somebody asks."""
        from ochredb.quarantine import Quarantine

        table = QuarantineTable(self.database, self.clock)
        return Quarantine(table, self.namespace, self.store)

    @cached_property
    def frontend(self) -> Frontend:
        return Frontend(
            self.namespace,
            self.log,
            self.query,
            self.config.frontend,
            clock=self.clock,
            open_vacuums=lambda: self.vacuums,
            ready=lambda: self._started and not self._closed,
            open_backups=None if self.config.path is None else lambda: self.backups,
            open_quarantine=lambda: self.quarantine,
        )

    # -- life

    def start(self, *, background: bool = True) -> None:
        """Open or create the store and start the background threads.

        What may only be read is opened for reading (decision 0018); then writes raise Forbidden.

        Raises InvalidArgument for a directory that is not ours, Unavailable for one that cannot be
        used now; nothing is left open.
        """
        path = self.config.path
        try:
            if path is None:
                self._database, self._store_id = open_memory(self.clock, self.ids)
            elif (reason := read_only_reason(path)) is not None:
                self._read_only = True
                refuse_network(os.path.realpath(path))
                self._database, self._store_id = open_read_only(path, reason)
                log.warning("%s is open for reading only: %s", path, reason)
            else:
                check_directory(path, clock=self.clock)
                self._claim = claim_alone(path)
                # On a full disk SQLite needs a little space even to read.
                self._database, self._store_id = self.reserve.freeing(
                    lambda: open_directory(
                        path, self.clock, self.ids, on_full=self.reserve.found_full
                    )
                )
            self._check_store_id()
            if not self._read_only:
                self.namespace.ensure_defaults()
        except BaseException:
            if self._database is not None:
                self._database.close()
            self._release_claim()
            raise
        self._started = True
        if background and self._read_only:
            self._tidier = Tidier(self.query, self.database, self._tidy)
        elif background:
            self.reserve.take_back()
            self._measure_due_s = self.clock.monotonic_s() + _MEASURE_AFTER_S
            self.compactor.start()

    def _check_store_id(self) -> None:
        """Refuse a catalog paired with another store's objects: a sweep would delete them."""
        expected = self._store_id.encode()
        try:
            found = self.store.get(_STORE_ID_KEY)
        except NotFound:
            if self._read_only or self.logs.has_collections():
                raise InvalidArgument(
                    f"the objects of {self.config.path} are missing or belong to no store "
                    f"(expected store id {self._store_id})"
                ) from None
            try:
                self.store.create(_STORE_ID_KEY, expected)
                reach("store-id.created")
                return
            except AlreadyExists:  # Another process opened the new store at the same time.
                found = self.store.get(_STORE_ID_KEY)
        if found != expected:
            raise InvalidArgument(
                f"the catalog of {self.config.path} belongs to store {self._store_id}, "
                f"its objects to store {found.decode(errors='replace')}"
            )

    def copy_after_fork(self) -> Node:
        """Of a node in memory, in a fork's child: other roles, as locks of these may be held by
        threads that stayed behind, on the child's copy of the memory."""
        copied = Node(self.config, clock=self.clock, ids=self.ids, tidy=self._tidy)
        copied._database, copied._store_id = self._database, self._store_id
        copied.store = self.store
        copied._started = True
        copied.compactor.start()
        return copied

    def close(self) -> None:
        """Stop the threads, fold what is quickly folded, checkpoint, close. Idempotent."""
        if self._closed or not self._started:
            return
        self._closed = True
        try:
            self.log.close()
            if self._tidier is not None:
                self._tidier.stop()
            if "vacuums" in self.__dict__:
                self.vacuums.stop()
            self.compactor.stop()
            self.database.checkpoint()
        except Unavailable as error:  # A full disk: what is acknowledged is durable without this.
            log.warning("closed without a checkpoint: %s", error)
        finally:
            self.database.close()
            self._release_claim()

    def _release_claim(self) -> None:
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def _housekeep(self) -> None:
        """About once a second, from the folding thread."""
        self.reserve.take_back()
        self.database.check_format()
        was_read = self.query.trim()
        self._tidy(not was_read and self.compactor.since_append_s() > _IDLE_AFTER_S)
        self.logs.recent.age()
        # Half a checkpoint would only eat what is kept for deletes.
        if self.reserve.has_room(self.database.wal_bytes()) and self.database.checkpoint():
            self.database.release_free_pages(_FREE_PAGES_PER_SECOND)
        now = self.clock.monotonic_s()
        if now >= self._measure_due_s:
            self._measure_due_s = math.inf
            cost.measure(self.clock)
        if now - self._housekept_s > 10.0:
            self._housekept_s = now
            PinTable(self.database, self.clock, self.ages).release_expired()
            self.logs.expire_idempotency(KEYS_KEPT_S + self.ages.slack_s(KEYS_KEPT_S))
            self.database.release_free_pages(_FREE_PAGES_PER_SECOND)
            if isinstance(self.store, DirectoryStore):
                self.store.clean_temporary(self.ages.before_us(600.0))
                if now - self._folders_s > _FOLDERS_PERIOD_S:
                    self._folders_s = now
                    self.store.remove_empty_folders()

    # -- embedded

    def handle(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """One request in the caller's thread; `path` as in a URL, percent-encoded."""
        if self._closed:
            raise Unavailable("the database was closed")
        response: Response = self.frontend.handle(
            Request(
                method=method,
                path=path,
                query_string=query,
                headers=headers,
                body=body,
                cancel=Cancel(clock=self.clock),
            )
        )
        answer_headers = dict(response.headers)
        if response.content_type is not None:
            answer_headers["content-type"] = response.content_type
        return response.status, answer_headers, response.body
