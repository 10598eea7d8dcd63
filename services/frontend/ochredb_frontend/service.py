"""The REST role as an object: one method per API call on parsed values, and `handle` for requests.

Synchronous and without a web framework: the embedded client calls `handle` in its own thread, the
server calls it in a pool (`app.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ochredb import configuration
from ochredb.cancel import Cancel
from ochredb.catalog.namespace import DatabaseInfo, Namespace
from ochredb.clock import Clock, SystemClock
from ochredb.errors import Conflict, Forbidden, Unimplemented
from ochredb.hints.limits import Limits
from ochredb.ids import IdSource
from ochredb.peers import Batch, GetRequest, Log, Query, QueryRequest, QuickRead
from ochredb.types import (
    Appended,
    CollectionInfo,
    Field,
    IndexingStatus,
    Op,
    Operations,
    QueryAnswer,
)
from ochredb.where import Where
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.messages import Request, Response, error_response
from ochredb_frontend.routes import ROUTES, Matcher
from ochredb_frontend.wire import Answer, Deletion, Read, Write

if TYPE_CHECKING:
    from ochredb.backup.source import Backups
    from ochredb.integrity.mend_parts import Rebuild
    from ochredb.integrity.running import Checks
    from ochredb.quarantine import Quarantine
    from ochredb.vacuum import Vacuums

_FACTS_MAX = 10_000
_CONDITIONAL_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class QuickAnswer:
    """A parsed read that is ready to run, and its encoding."""

    read: Read
    quick: QuickRead

    def run(self, cancel: Cancel) -> bytes:
        return self.read.encode(self.quick.run(cancel))


@dataclass(frozen=True, slots=True)
class QuickAnswers:
    """Several parsed reads that are searched as one batch, and their encoding."""

    reads: list[Read]
    batch: Batch

    def encoded(self, cancel: Cancel) -> list[bytes]:
        """An answer for each read, after `batch.search`."""
        answers = self.batch.answers(cancel)
        return [read.encode(answer) for read, answer in zip(self.reads, answers, strict=True)]


class Frontend:
    """Stateless but for a bounded cache of immutable facts; safe to call from any thread.

    ready: whether the roles behind answer; the health check asks it. open_backups,
    open_quarantine: give what backups and the quarantine's calls ask. limits: of each tenant; a
    server applies them.
    """

    def __init__(
        self,
        namespace: Namespace,
        log: Log,
        query: Query,
        config: FrontendConfig | None = None,
        *,
        clock: Clock | None = None,
        open_vacuums: Callable[[], Vacuums] | None = None,
        ready: Callable[[], bool] = lambda: True,
        open_backups: Callable[[], Backups] | None = None,
        open_quarantine: Callable[[], Quarantine] | None = None,
        limits: Limits | None = None,
        rebuild_part: Rebuild | None = None,
    ) -> None:
        self._open_vacuums = open_vacuums
        self.config = config or FrontendConfig()
        self.clock = clock or SystemClock()
        self.ready, self.limits = ready, limits
        self._open_backups = open_backups
        self._open_quarantine, self._rebuild_part = open_quarantine, rebuild_part
        self._namespace, self._log, self._query = namespace, log, query
        self._matcher = Matcher(ROUTES)
        self._facts_lock = threading.Lock()
        # Collection id -> its schema. Which indexes a schema enables is fixed at creation, and ids
        # are never used again, so an entry is never wrong; reads of a dropped collection fail in
        # the query role.
        self._schemas: dict[str, dict[str, Any]] = {}

    def handle(self, request: Request) -> Response:
        """Answer one request; every exception becomes a response."""
        try:
            matched = self._matcher.match(request.method, request.path)
            if isinstance(matched, Response):
                return matched
            route, request.parameters = matched
            return route.handler(self, request)
        except Exception as error:
            return error_response(error)

    @property
    def vacuums(self) -> Vacuums:
        """Raises Unimplemented where no compactor is at hand."""
        if self._open_vacuums is None:
            raise Unimplemented("this process does not compact")
        return self._open_vacuums()

    # -- system

    def heartbeat_ns(self) -> int:
        return self.clock.now_us() * 1000

    def reset(self) -> None:
        if not self.config.allow_reset:
            raise Forbidden("Reset is disabled by config")
        self._namespace.reset()
        with self._facts_lock:
            self._schemas.clear()

    @property
    def backups(self) -> Backups:
        """Raises Unimplemented for a store that is not in a directory."""
        if self._open_backups is None:
            raise Unimplemented("a database in memory cannot be backed up")
        return self._open_backups()

    @property
    def quarantine(self) -> Quarantine:
        """Raises Unimplemented where nothing is folded."""
        if self._open_quarantine is None:
            raise Unimplemented("this server has no quarantine")
        return self._open_quarantine()

    @cached_property
    def checks(self) -> Checks:
        """The checks of this store; imported by the first of them."""
        from ochredb.integrity.running import Checks

        ids = IdSource(self.clock)
        return Checks(lambda: self.backups, self.clock, ids, self._rebuild_part)

    # -- tenants and databases

    def create_tenant(self, name: str) -> None:
        self._namespace.create_tenant(name)

    def get_tenant(self, name: str) -> dict[str, Any]:
        return self._namespace.get_tenant(name)

    def update_tenant(self, name: str, resource_name: str) -> None:
        self._namespace.set_resource_name(name, resource_name)

    def create_database(self, tenant: str, name: str) -> None:
        self._namespace.create_database(tenant, name)

    def get_database(self, tenant: str, name: str) -> DatabaseInfo:
        return self._namespace.get_database(tenant, name)

    def list_databases(self, tenant: str, limit: int | None, offset: int) -> list[DatabaseInfo]:
        return self._namespace.list_databases(tenant, limit, offset)

    def delete_database(self, tenant: str, name: str) -> None:
        self._namespace.delete_database(tenant, name)

    # -- collections

    def create_collection(
        self,
        tenant: str,
        database: str,
        name: str,
        *,
        configuration: dict[str, Any],
        schema: dict[str, Any],
        metadata: dict[str, Any] | None,
        get_or_create: bool,
    ) -> CollectionInfo:
        return self._namespace.create_collection(
            tenant,
            database,
            name,
            configuration=configuration,
            schema=schema,
            metadata=metadata,
            get_or_create=get_or_create,
        )

    def get_collection(self, tenant: str, database: str, name: str) -> CollectionInfo:
        return self._namespace.get_collection(tenant, database, name)

    def get_collection_by_id(self, collection_id: str) -> CollectionInfo:
        return self._namespace.get_collection_by_id(collection_id)

    def list_collections(
        self, tenant: str, database: str, limit: int | None, offset: int
    ) -> list[CollectionInfo]:
        return self._namespace.list_collections(tenant, database, limit, offset)

    def count_collections(self, tenant: str, database: str) -> int:
        return self._namespace.count_collections(tenant, database)

    def update_collection(
        self,
        collection_id: str,
        *,
        new_name: str | None,
        new_metadata: dict[str, Any] | None,
        change_configuration: Callable[[CollectionInfo], tuple[dict[str, Any], dict[str, Any]]]
        | None,
    ) -> None:
        if new_name is None and new_metadata is None and change_configuration is None:
            self._namespace.get_collection_by_id(collection_id)  # Only whether it exists.
            return
        self._namespace.update_collection(
            collection_id,
            new_name=new_name,
            new_metadata=new_metadata,
            change_configuration=change_configuration,
        )

    def delete_collection(self, tenant: str, database: str, name: str) -> None:
        self._namespace.delete_collection(tenant, database, name)

    def indexing_status(self, collection_id: str, cancel: Cancel) -> IndexingStatus:
        return self._query.indexing_status(collection_id, cancel=cancel)

    # -- records

    def write(self, write: Write, cancel: Cancel) -> None:
        """add, upsert or update. Returns after it is durable and visible."""
        if not write.operations.ids:
            self._namespace.get_collection_by_id(write.collection_id)  # Only whether it exists.
            return
        self._log.append(
            write.collection_id,
            write.operations,
            idempotency_key=write.idempotency_key,
            cancel=cancel,
        )

    def submit(
        self, write: Write, cancel: Cancel, deliver: Callable[[Appended | BaseException], None]
    ) -> None:
        """The same without waiting, of at least one operation: see `ochredb.peers.Log.submit`."""
        self._log.submit(
            write.collection_id,
            write.operations,
            idempotency_key=write.idempotency_key,
            cancel=cancel,
            deliver=deliver,
        )

    def read(self, read: Read, cancel: Cancel) -> bytes:
        """get, query or count: the encoded answer."""
        if read.where is not None:
            self._check_filterable(read.collection_id, read.where)
        answer: Answer
        if read.request is None:
            answer = self._query.count(read.collection_id, cancel=cancel)
        elif isinstance(read.request, GetRequest):
            answer = self._query.get(read.collection_id, read.request, cancel=cancel)
        elif len(read.request.embeddings) == 0:
            self._namespace.get_collection_by_id(read.collection_id)  # Only whether it exists.
            answer = QueryAnswer([], [])
        else:
            answer = self._query.query(read.collection_id, read.request, cancel=cancel)
        return read.encode(answer)

    def read_together(self, reads: Sequence[Read], cancel: Cancel) -> list[bytes]:
        """The encoded answers of searches that differ in their query vectors alone."""
        first = reads[0].request
        assert isinstance(first, QueryRequest)
        vectors = [
            read.request.embeddings for read in reads if isinstance(read.request, QueryRequest)
        ]
        if first.where is not None:
            self._check_filterable(reads[0].collection_id, first.where)
        request = replace(first, embeddings=np.concatenate(vectors))
        answer = self._query.query(reads[0].collection_id, request, cancel=cancel)
        answers = answer.split([len(some) for some in vectors])
        return [read.encode(own) for read, own in zip(reads, answers, strict=True)]

    def quick(self, read: Read) -> QuickAnswer | None:
        """A read that answers within about a millisecond without blocking, or None."""
        if isinstance(read.request, QueryRequest) and len(read.request.embeddings) == 0:
            return None
        if read.where is not None:
            schema = self._schema(read.collection_id)
            if schema is None:
                return None
            configuration.check_filterable(schema, read.where)
        found = self._query.quick(read.collection_id, read.request)
        return None if found is None else QuickAnswer(read, found)

    def together(self, reads: Sequence[QuickAnswer]) -> QuickAnswers:
        """Quick reads of one group as one batch."""
        return QuickAnswers(
            [read.read for read in reads], self._query.together([read.quick for read in reads])
        )

    def delete(self, deletion: Deletion, cancel: Cancel) -> int:
        """Delete by ids or filter. Returns the number of ids given, or the number that matched."""
        if deletion.where is not None:
            return self._delete_matching(deletion, deletion.where, cancel)
        if deletion.ids is None:
            self._namespace.get_collection_by_id(deletion.collection_id)  # Only if it exists.
            return 0
        self._log.append(
            deletion.collection_id,
            Operations(op=Op.DELETE, ids=deletion.ids),
            idempotency_key=deletion.idempotency_key,
            cancel=cancel,
        )
        return len(deletion.ids)

    def _delete_matching(self, deletion: Deletion, where: Where, cancel: Cancel) -> int:
        """Read what matches, then delete it on the condition that nothing was written meanwhile."""
        collection_id = deletion.collection_id
        self._check_filterable(collection_id, where)
        request = GetRequest(ids=deletion.ids, where=where, limit=deletion.limit, fields=Field.NONE)
        key = deletion.idempotency_key
        if key is not None:
            # What matched the first time may not match now: the key is bound to the request.
            first = self._log.repeated(collection_id, key, deletion.request_hash, cancel=cancel)
            if first is not None:
                return first.last_offset - first.first_offset + 1
        for _ in range(_CONDITIONAL_ROUNDS):
            ids, last_offset = self._query.match(collection_id, request, cancel=cancel)
            if not ids:
                if key is None:
                    return 0
                first = self._log.record_nothing(
                    collection_id, key, deletion.request_hash, cancel=cancel
                )
                return first.last_offset - first.first_offset + 1
            try:
                appended = self._log.append(
                    collection_id,
                    Operations(op=Op.DELETE, ids=ids),
                    idempotency_key=key,
                    request_hash=deletion.request_hash,
                    expect_last_offset=last_offset,
                    cancel=cancel,
                )
            except Conflict:
                continue
            return appended.last_offset - appended.first_offset + 1

        # Too busy to get in between two writes: match while no other write can land.
        def evaluate() -> Operations:
            matched, _ = self._query.match(collection_id, request, cancel=cancel)
            return Operations(op=Op.DELETE, ids=matched)

        appended = self._log.append_evaluated(
            collection_id,
            evaluate,
            idempotency_key=key,
            request_hash=deletion.request_hash,
            cancel=cancel,
        )
        return appended.last_offset - appended.first_offset + 1

    # -- immutable facts

    def _check_filterable(self, collection_id: str, where: Where) -> None:
        schema = self._schema(collection_id) or self._learn_schema(collection_id)
        configuration.check_filterable(schema, where)

    def _schema(self, collection_id: str) -> dict[str, Any] | None:
        return self._schemas.get(collection_id)

    def _learn_schema(self, collection_id: str) -> dict[str, Any]:
        schema = self._namespace.get_collection_by_id(collection_id).schema
        with self._facts_lock:
            if len(self._schemas) >= _FACTS_MAX:
                self._schemas.pop(next(iter(self._schemas)))
            self._schemas[collection_id] = schema
        return schema
