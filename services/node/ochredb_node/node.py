"""Everything one process runs; the only class that knows every role.

Each part is built on first use; the attributes are the dependency graph. A role that this process
does not have is never built; whoever needs it is given a peer instead.
"""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from ochredb.ages import Ages
from ochredb.cancel import Cancel
from ochredb.catalog.database import Database
from ochredb.catalog.jobs import Jobs
from ochredb.catalog.logs import LogTable
from ochredb.catalog.namespace import Namespace
from ochredb.catalog.objects import ObjectTable
from ochredb.catalog.pins import PinTable
from ochredb.catalog.quarantine import QuarantineTable
from ochredb.catalog.sqlite import SqliteDatabase
from ochredb.catalog.versions import VersionTable
from ochredb.clock import Clock, SystemClock
from ochredb.errors import InvalidArgument, Unavailable, Unimplemented
from ochredb.hints.base import Hint, HintKind
from ochredb.hints.shared import Shared
from ochredb.ids import IdSource
from ochredb.parts.manifest import Manifest
from ochredb.parts.open_parts import OpenParts
from ochredb.peers import Log, Query
from ochredb.processes import process_name
from ochredb.storage.base import RESERVED_PART, LocalStore
from ochredb.storage.directory import DirectoryStore
from ochredb.storage.local_copies import TEMPORARY_FOLDER
from ochredb.storage.space import Reserve
from ochredb_compactor.service import CompactorService
from ochredb_compactor.world import World
from ochredb_frontend.messages import Request, Response
from ochredb_frontend.service import Frontend
from ochredb_log.service import LogService
from ochredb_node.config import NodeConfig
from ochredb_node.foundation import Foundation, open_foundation
from ochredb_node.housekeeping import Housekeeping
from ochredb_node.peers import Peers
from ochredb_node.roles import Role
from ochredb_node.tidier import Tidier
from ochredb_query.service import QueryService

if TYPE_CHECKING:
    from ochredb.backup.source import Backups
    from ochredb.quarantine import Quarantine
    from ochredb_compactor.vacuums import VacuumService
    from ochredb_node.damaged import DamagedParts

__all__ = ["Node", "NodeConfig", "Peers"]

log = logging.getLogger("ochredb.node")

_Peer = TypeVar("_Peer")
_WRITTEN_S = 2.0


class Node:
    """One process's roles on one store. `start` opens the store, `close` folds and closes it."""

    def __init__(
        self,
        config: NodeConfig,
        *,
        clock: Clock | None = None,
        ids: IdSource | None = None,
        peers: Peers | None = None,
        tidy: Callable[[bool], None] = lambda _idle: None,
        delegate: Callable[[bool], bool] = lambda _is_large: False,
    ) -> None:
        """tidy: called about once a second, with whether nothing was read or written meanwhile.

        delegate: see `CompactorService`.
        """
        self.config = config
        self._tidy, self._delegate = tidy, delegate
        self._peers = peers or Peers()
        self.clock = clock or SystemClock()
        self.ids = ids or IdSource(self.clock)
        self.owner = process_name(self.ids)
        self.reserve, self.ages = Reserve(config.path), Ages(self.clock)
        self._foundation: Foundation | None = None
        self._started = self._closed = self._draining = False
        self._tidier: Tidier | None = None
        self._damaged: DamagedParts | None = None
        self._appended_s = -math.inf

    # -- components

    @property
    def foundation(self) -> Foundation:
        assert self._foundation is not None, "the node was not started"
        return self._foundation

    @property
    def database(self) -> Database:
        return self.foundation.catalog.database

    @property
    def sqlite(self) -> SqliteDatabase:
        """The catalog, for what only SQLite has. Raises Unimplemented for another one."""
        if not isinstance(self.database, SqliteDatabase):
            raise Unimplemented(f"the catalog {self.foundation.catalog.name} is not SQLite")
        return self.database

    @property
    def store(self) -> LocalStore:
        return self.foundation.store

    def has(self, role: Role) -> bool:
        return role in self.config.roles

    @property
    def compacts(self) -> bool:
        """Whether threads of this process fold, merge and collect."""
        return self.config.compacts

    @property
    def _writes(self) -> bool:
        """Whether it adds to SQLite's write-ahead log by itself, more than a few rows."""
        return self.has(Role.LOG) or self.has(Role.COMPACTOR)

    @cached_property
    def logs(self) -> LogTable:
        return LogTable(self.database, self.clock, self.config.backlog, hot=self.shared.hot)

    @cached_property
    def shared(self) -> Shared:
        """What is told to other processes, and heard from them."""
        shared = Shared(
            self.config.redis,
            self.config.limits,
            store_id=self.foundation.catalog.store_id,
            owner=self.owner,
            clock=self.clock,
            rng=random.Random(self.owner),
        )
        hints = shared.hints
        hints.subscribe(HintKind.APPENDED, self._appended)
        if self.has(Role.QUERY) and self.config.redis is not None:
            hints.subscribe(HintKind.VERSION, lambda *told: self.query.prefetch(*told))
            hints.subscribe(HintKind.DROPPED, lambda collection, _: self.query.drop(collection))
        return shared

    @cached_property
    def versions(self) -> VersionTable:
        return VersionTable(self.database, self.clock)

    @cached_property
    def namespace(self) -> Namespace:
        def dropped(collection_id: str) -> None:
            self.shared.hints.publish(Hint(HintKind.DROPPED, collection_id))

        return Namespace(self.database, self.clock, self.ids, reserve=self.reserve, on_drop=dropped)

    @cached_property
    def open_parts(self) -> OpenParts:
        return OpenParts(self.store, self.config.query.memory_bytes)

    # -- roles

    @cached_property
    def log(self) -> LogService:
        return LogService(
            self.database,
            self.logs,
            self.store,
            self.ids,
            self.config.log,
            on_append=self._tell_appended,
            make_room=self.compactor.fold_now if self.config.foreground else None,
            reserve=self.reserve,
        )

    def _tell_appended(self, collection_id: str, last_offset: int) -> None:
        self.shared.hints.publish(Hint(HintKind.APPENDED, collection_id, last_offset))

    def _appended(self, collection_id: str, last_offset: int) -> None:
        if self.compacts:
            self.compactor.hint(collection_id, last_offset)
        else:
            self._appended_s = self.clock.monotonic_s()
            if self._peers.compactor is not None and self.config.hurries:
                self._peers.compactor.hint(collection_id, last_offset)
        if self.has(Role.QUERY):
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
            scatter=self._peers.scatter,
        )

    @property
    def log_peer(self) -> Log:
        """Who appends for this process's frontend."""
        if self.has(Role.LOG):
            return self.log
        return _found(self._peers.log, Role.LOG)

    @property
    def query_peer(self) -> Query:
        """Who reads for this process's frontend."""
        if self.has(Role.QUERY):
            return self.query
        return _found(self._peers.query, Role.QUERY)

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
            hints=self.shared.hints,
            before_commit=self.query.prepare if self.has(Role.QUERY) else _no_reader,
        )

    @cached_property
    def compactor(self) -> CompactorService:
        """Has threads only if `compacts`; its work may be asked for in any process."""
        return CompactorService(
            self.world,
            self.owner,
            on_idle=self._housekeep,
            on_quiet=self.query.forget_pages if self.has(Role.QUERY) else lambda: None,
            delegate=self._delegate,
        )

    @cached_property
    def housekeeping(self) -> Housekeeping:
        return Housekeeping(
            database=self.database,
            store=self.store,
            logs=self.logs,
            query=self.query if self.has(Role.QUERY) else None,
            reserve=self.reserve,
            ages=self.ages,
            clock=self.clock,
            appends=self.has(Role.LOG),
            compacts=self.compacts,
            is_read_only=self.foundation.catalog.is_read_only,
            since_append_s=self._since_append_s,
            tidy=lambda idle: self._tidy(idle),
        )

    def _housekeep(self) -> None:
        self.housekeeping.turn()
        if self._damaged is not None:
            self._damaged.turn()

    def _open_damaged(self) -> DamagedParts | None:
        """None: nobody is known who could mend what this process finds."""
        compactor = self.compactor if self.has(Role.COMPACTOR) else self._peers.compactor
        if self.foundation.catalog.is_read_only or compactor is None:
            return None
        from ochredb_node.damaged import DamagedParts

        return DamagedParts(self.open_parts, compactor, self.clock)

    def _since_append_s(self) -> float:
        if self.compacts:
            return self.compactor.since_append_s()
        return self.clock.monotonic_s() - self._appended_s

    @property
    def is_at_work(self) -> bool:
        """Whether records are written, or another process folds, merges or collects."""
        return self._since_append_s() < _WRITTEN_S or any(
            job.running and not job.owner.startswith(self.owner) for job in self.world.jobs.status()
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
            directory=self.config.path,
        )
        return VacuumService(surroundings)

    @property
    def _backup_folder(self) -> str | None:
        """For files that are gone after a while; None if this process has none."""
        if self.config.path is not None:
            return os.path.join(self.config.path, "objects", RESERVED_PART)
        cache = self.config.cache_path
        return None if cache is None else os.path.join(cache, TEMPORARY_FOLDER)

    @cached_property
    def backups(self) -> Backups:
        """What backups of this store ask; imported by the first of them."""
        from ochredb.backup.source import Backups

        assert self._backup_folder is not None
        return Backups(
            self._backup_folder,
            self.database,
            self.foundation.objects,
            self.foundation.catalog.store_id,
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
            self.log_peer,
            self.query_peer,
            self.config.frontend,
            clock=self.clock,
            open_vacuums=lambda: self.vacuums,
            ready=lambda: self.is_ready,
            open_backups=None if self._backup_folder is None else lambda: self.backups,
            open_quarantine=lambda: self.quarantine,
            limits=self.shared.limits,
            rebuild_part=lambda part_id, step: self.compactor.rebuild_part(part_id, step),
        )

    # -- life

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent here."""
        return self._started and not self._draining and not self._closed

    def drain(self) -> None:
        """From now on say that requests should go elsewhere; those that come are answered."""
        self._draining = True

    def start(self, *, background: bool = True) -> None:
        """Open or create the store and start the background threads.

        What may only be read is opened for reading (decision 0018); then writes raise Forbidden.

        Raises InvalidArgument for a place that is not ours, or a frontend without the peers that it
        needs; Unavailable for a place that cannot be used now; nothing is left open.
        """
        if self.has(Role.FRONTEND):
            for role, peer in ((Role.LOG, self._peers.log), (Role.QUERY, self._peers.query)):
                if not self.has(role):
                    _found(peer, role)
        self._foundation = open_foundation(self.config, self.clock, self.ids, self.reserve)
        is_read_only = self._foundation.catalog.is_read_only
        self._go_by(self._foundation.catalog.clock)
        try:
            self._foundation.check_store_id(self.logs.has_collections)
            if not is_read_only:
                self.namespace.ensure_defaults()
        except BaseException:
            self._foundation.close()
            raise
        self._started = True
        if not background:
            return
        if not is_read_only:
            self.reserve.take_back()
        self.shared.start()
        self.housekeeping.start()
        if self.compacts and not is_read_only:
            self.compactor.start()
        else:
            self._damaged = self._open_damaged()
            self._tidier = Tidier(self._housekeep)

    def _go_by(self, clock: Clock) -> None:
        """All that is built from now on judges time as the catalog does."""
        if clock is not self.clock:
            self.clock, self.ids, self.ages = clock, IdSource(clock), Ages(clock)

    def copy_after_fork(self) -> Node:
        """Of a node in memory, in a fork's child: other roles, as locks of these may be held by
        threads that stayed behind, on the child's copy of the memory."""
        copied = Node(self.config, clock=self.clock, ids=self.ids, tidy=self._tidy)
        copied._foundation = self._foundation
        copied._started = True
        copied.compactor.start()
        return copied

    def close(self) -> None:
        """Stop the threads, fold what is quickly folded, checkpoint, close. Idempotent."""
        if self._closed or not self._started:
            return
        self._closed = True
        try:
            with ExitStack() as closing:  # Last first, and each one whatever another raises.
                closing.callback(self.foundation.close)
                if isinstance(self.database, SqliteDatabase) and self._writes:
                    closing.callback(self.database.checkpoint)
                if "compactor" in self.__dict__:
                    closing.callback(self.compactor.stop)
                if "vacuums" in self.__dict__:
                    closing.callback(self.vacuums.stop)
                if self._damaged is not None:
                    closing.callback(self._damaged.close)
                if self._tidier is not None:
                    closing.callback(self._tidier.stop)
                if self.has(Role.QUERY):
                    closing.callback(self.query.close)
                closing.callback(self.shared.close)
                if self.has(Role.LOG):
                    closing.callback(self.log.close)
        except Unavailable as error:  # A full disk: what is acknowledged is durable without this.
            log.warning("closed without a checkpoint: %s", error)

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


def _no_reader(_collection_id: str, _part: Manifest) -> None:
    """No reader of this process wants to open a part before its version is committed."""


def _found(peer: _Peer | None, role: Role) -> _Peer:
    if peer is None:
        raise InvalidArgument(f"a frontend without the {role.value} role needs a peer that has it")
    return peer
