"""Namespace, Log and Query in memory, just enough to test what stands in front of them.

Records are kept and returned; filters are not evaluated: `World.matching` says which ids match.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import orjson

from ochredb.cancel import Cancel
from ochredb.catalog.namespace import DatabaseInfo, Namespace
from ochredb.errors import AlreadyExists, Conflict, InvalidArgument, NotFound
from ochredb.explain import PlanStep
from ochredb.peers import GetRequest, QueryRequest, QuickRead
from ochredb.types import (
    Appended,
    CollectionInfo,
    Field,
    Float32s,
    IndexingStatus,
    Op,
    Operations,
    QueryAnswer,
    Records,
)
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.service import Frontend


class World:
    """What the three fakes share."""

    def __init__(self) -> None:
        self.tenants: dict[str, str | None] = {"default_tenant": None}
        self.databases: dict[tuple[str, str], DatabaseInfo] = {}
        self.collections: dict[str, CollectionInfo] = {}
        self.records: dict[str, dict[str, dict[str, Any]]] = {}
        self.appended: list[tuple[str, Operations, str | None, int | None]] = []
        self.requests: list[GetRequest | QueryRequest] = []
        self.matching: Callable[[str], bool] = lambda _id: True
        self.conflicts = 0  # So many conditional appends fail first.
        self.quick = False
        self.together: list[int] = []  # The sizes of batches of quick reads.
        self.before_answer: Callable[[Cancel], None] = lambda _cancel: None
        self.lock = threading.Lock()
        self.next_id = 0
        self.add_database("default_tenant", "default_database")

    def uuid(self) -> str:
        self.next_id += 1
        return f"00000000-0000-7000-8000-{self.next_id:012d}"

    def add_database(self, tenant: str, name: str) -> None:
        self.databases[tenant, name] = DatabaseInfo(self.uuid(), name, tenant)

    def require(self, collection_id: str) -> CollectionInfo:
        if collection_id not in self.collections:
            raise NotFound(f"Collection [{collection_id}] does not exist.")
        return self.collections[collection_id]


class FakeNamespace:
    """Names in dictionaries."""

    def __init__(self, world: World) -> None:
        self._world = world

    def create_tenant(self, name: str) -> None:
        if name in self._world.tenants:
            raise AlreadyExists(f"Tenant [{name}] already exists")
        self._world.tenants[name] = None

    def get_tenant(self, name: str) -> dict[str, Any]:
        if name not in self._world.tenants:
            raise NotFound(f"Tenant [{name}] not found")
        return {"name": name, "resource_name": self._world.tenants[name]}

    def set_resource_name(self, name: str, resource_name: str) -> None:
        self.get_tenant(name)
        self._world.tenants[name] = resource_name

    def create_database(self, tenant: str, name: str) -> None:
        self.get_tenant(tenant)
        if (tenant, name) in self._world.databases:
            raise AlreadyExists(f"Database [{name}] already exists")
        self._world.add_database(tenant, name)

    def get_database(self, tenant: str, name: str) -> DatabaseInfo:
        if (tenant, name) not in self._world.databases:
            raise NotFound(f"Database [{name}] not found. Are you sure it exists?")
        return self._world.databases[tenant, name]

    def list_databases(self, tenant: str, limit: int | None, offset: int) -> list[DatabaseInfo]:
        found = [info for key, info in sorted(self._world.databases.items()) if key[0] == tenant]
        return found[offset:][:limit]

    def delete_database(self, tenant: str, name: str) -> None:
        if (tenant, name) not in self._world.databases:
            raise NotFound(f"Database [{name}] not found")
        del self._world.databases[tenant, name]

    def create_collection(
        self, tenant: str, database: str, name: str, *, get_or_create: bool, **more: Any
    ) -> CollectionInfo:
        if (tenant, database) not in self._world.databases:
            raise InvalidArgument(f"Database [{database}] does not exist")
        for info in self._world.collections.values():
            if (info.tenant, info.database, info.name) == (tenant, database, name):
                if get_or_create:
                    return info
                raise AlreadyExists(f"Collection [{name}] already exists")
        info = CollectionInfo(
            id=self._world.uuid(), name=name, tenant=tenant, database=database, dimension=None,
            revision=0, **more,
        )  # fmt: skip
        self._world.collections[info.id] = info
        self._world.records[info.id] = {}
        return info

    def get_collection(self, tenant: str, database: str, name: str) -> CollectionInfo:
        for info in self._world.collections.values():
            if (info.tenant, info.database, info.name) == (tenant, database, name):
                return info
        raise NotFound(f"Collection [{name}] does not exist")

    def get_collection_by_id(self, collection_id: str) -> CollectionInfo:
        return self._world.require(collection_id)

    def list_collections(
        self, tenant: str, database: str, limit: int | None, offset: int
    ) -> list[CollectionInfo]:
        found = [
            info for info in self._world.collections.values()
            if (info.tenant, info.database) == (tenant, database)
        ]  # fmt: skip
        return found[offset:][:limit]

    def count_collections(self, tenant: str, database: str) -> int:
        return len(self.list_collections(tenant, database, None, 0))

    def update_collection(
        self,
        collection_id: str,
        *,
        new_name: str | None = None,
        new_metadata: dict[str, Any] | None = None,
        change_configuration: Callable[[CollectionInfo], tuple[dict[str, Any], dict[str, Any]]]
        | None = None,
    ) -> CollectionInfo:
        info = self._world.require(collection_id)
        taken = {other.name for other in self._world.collections.values()} - {info.name}
        if new_name in taken:
            raise AlreadyExists(f"Collection [{new_name}] already exists")
        configuration, schema = info.configuration, info.schema
        if change_configuration is not None:
            configuration, schema = change_configuration(info)
        changed = CollectionInfo(
            id=info.id,
            name=new_name or info.name,
            tenant=info.tenant,
            database=info.database,
            configuration=configuration,
            schema=schema,
            metadata=info.metadata if new_metadata is None else new_metadata,
            dimension=info.dimension,
            revision=info.revision + 1,
        )
        self._world.collections[info.id] = changed
        return changed

    def delete_collection(self, tenant: str, database: str, name: str) -> str:
        info = self.get_collection(tenant, database, name)
        del self._world.collections[info.id], self._world.records[info.id]
        return info.id

    def reset(self) -> None:
        self._world.__init__()  # type: ignore[misc]  # back to the beginning, in place


class FakeLog:
    """Applies operations to the world's records; upsert and update replace whole fields."""

    THREAD = "submitted"

    def __init__(self, world: World) -> None:
        self._world = world

    def append(
        self,
        collection_id: str,
        operations: Operations,
        *,
        idempotency_key: str | None = None,
        request_hash: bytes | None = None,
        request_id: str | None = None,
        expect_last_offset: int | None = None,
        cancel: Cancel,
    ) -> Appended:
        world = self._world
        world.before_answer(cancel)
        with world.lock:
            world.require(collection_id)
            if expect_last_offset is not None and world.conflicts > 0:
                world.conflicts -= 1
                raise Conflict("another writer came first")
            world.appended.append((collection_id, operations, idempotency_key, expect_last_offset))
            records = world.records[collection_id]
            for index, record_id in enumerate(operations.ids):
                if operations.op is Op.DELETE:
                    records.pop(record_id, None)
                elif operations.op is Op.UPSERT or (operations.op is Op.ADD) != (
                    record_id in records
                ):
                    records.setdefault(record_id, {}).update(_fields(operations, index))
            last = sum(len(entry[1]) for entry in world.appended)
            return Appended(last - len(operations) + 1, last)

    def submit(
        self,
        collection_id: str,
        operations: Operations,
        *,
        idempotency_key: str | None = None,
        request_id: str | None = None,
        cancel: Cancel,
        deliver: Callable[[Appended | BaseException], None],
    ) -> None:
        def run() -> None:
            try:
                outcome: Appended | BaseException = self.append(
                    collection_id, operations, idempotency_key=idempotency_key, cancel=cancel
                )
            except Exception as error:
                outcome = error
            deliver(outcome)

        threading.Thread(target=run, name=self.THREAD, daemon=True).start()

    def append_evaluated(
        self,
        collection_id: str,
        evaluate: Callable[[], Operations],
        *,
        idempotency_key: str | None = None,
        request_hash: bytes | None = None,
        request_id: str | None = None,
        cancel: Cancel,
    ) -> Appended:
        return self.append(collection_id, evaluate(), cancel=cancel)

    def repeated(
        self, collection_id: str, key: str, request_hash: bytes, *, cancel: Cancel
    ) -> Appended | None:
        self._world.before_answer(cancel)
        return None

    def record_nothing(
        self, collection_id: str, key: str, request_hash: bytes, *, cancel: Cancel
    ) -> Appended:
        self._world.before_answer(cancel)
        self._world.require(collection_id)
        return Appended(1, 0)


@dataclass
class FakeBatch:
    reads: Sequence[QuickRead]
    searched: bool = False

    def search(self) -> None:
        self.searched = True

    def answers(self, cancel: Cancel) -> list[QueryAnswer]:
        assert self.searched
        answers = [read.run(cancel) for read in self.reads]
        return [answer for answer in answers if isinstance(answer, QueryAnswer)]


class FakeQuery:
    """Returns records in order of insertion; all distances are exact."""

    def __init__(self, world: World) -> None:
        self._world = world

    def get(self, collection_id: str, request: GetRequest, *, cancel: Cancel) -> Records:
        self._world.before_answer(cancel)
        self._world.requests.append(request)
        ids = self._ids(collection_id, request.ids)
        stop = None if request.limit is None else request.offset + request.limit
        records = self._records(collection_id, ids[request.offset : stop], request.fields)
        if request.explain:
            records.plan = PlanStep("Get", {"rows_out": len(records.ids)}, 1.25)
        return records

    def query(self, collection_id: str, request: QueryRequest, *, cancel: Cancel) -> QueryAnswer:
        self._world.before_answer(cancel)
        self._world.requests.append(request)
        ids = self._ids(collection_id, request.ids)
        records = self._world.records[collection_id]
        answer = QueryAnswer([], [])
        for vector in request.embeddings:
            if ids and len(vector) != len(records[ids[0]]["embedding"]):
                raise InvalidArgument(
                    "Collection expecting embedding with dimension of"
                    f" {len(records[ids[0]]['embedding'])}, got {len(vector)}"
                )
            distances = [float(((records[i]["embedding"] - vector) ** 2).sum()) for i in ids]
            order = np.argsort(distances, kind="stable")[: request.n_results]
            nearest = [ids[row] for row in order]
            answer.records.append(self._records(collection_id, nearest, request.fields))
            found: Float32s = np.array([distances[row] for row in order], dtype=np.float32)
            answer.distances.append(found)
        if request.explain:
            answer.plan = PlanStep("Query", {"exact": request.exact}, 2.0, [PlanStep("Nearest")])
        return answer

    def count(self, collection_id: str, *, cancel: Cancel) -> int:
        self._world.before_answer(cancel)
        return len(self._ids(collection_id, None))

    def match(
        self, collection_id: str, request: GetRequest, *, cancel: Cancel
    ) -> tuple[list[str], int]:
        ids = [i for i in self._ids(collection_id, request.ids) if self._world.matching(i)]
        return ids[: request.limit], len(self._world.appended)

    def indexing_status(self, collection_id: str, *, cancel: Cancel) -> IndexingStatus:
        self._world.before_answer(cancel)
        self._world.require(collection_id)
        return IndexingStatus(num_indexed_ops=3, num_unindexed_ops=1)

    def quick(
        self, collection_id: str, request: GetRequest | QueryRequest | None
    ) -> QuickRead | None:
        if not self._world.quick:
            return None
        if request is None:
            return QuickRead(lambda cancel: self.count(collection_id, cancel=cancel))
        if isinstance(request, GetRequest):
            get = request
            return QuickRead(lambda cancel: self.get(collection_id, get, cancel=cancel))
        query = request
        return QuickRead(
            lambda cancel: self.query(collection_id, query, cancel=cancel),
            (collection_id, query.n_results, query.fields),
            query.embeddings,
        )

    def together(self, reads: Sequence[QuickRead]) -> FakeBatch:
        self._world.together.append(len(reads))
        return FakeBatch(reads)

    def _ids(self, collection_id: str, wanted: list[str] | None) -> list[str]:
        self._world.require(collection_id)
        return [i for i in self._world.records[collection_id] if wanted is None or i in set(wanted)]

    def _records(self, collection_id: str, ids: list[str], fields: Field) -> Records:
        rows = [self._world.records[collection_id][i] for i in ids]
        return Records(
            ids=ids,
            documents=[r.get("document") for r in rows] if Field.DOCUMENT in fields else None,
            uris=[r.get("uri") for r in rows] if Field.URI in fields else None,
            metadatas=[r.get("metadata") for r in rows] if Field.METADATA in fields else None,
            embeddings=(
                np.array([r["embedding"] for r in rows], dtype=np.float32)
                if Field.EMBEDDING in fields
                else None
            ),
        )


def _fields(operations: Operations, index: int) -> dict[str, Any]:
    embedded = operations.embedded
    fields: dict[str, Any] = {}
    if operations.embeddings is not None and (embedded is None or embedded[index]):
        fields["embedding"] = operations.embeddings[index]
    for name, column in (
        ("document", operations.documents),
        ("uri", operations.uris),
        ("metadata", operations.metadatas),
    ):
        if column is not None and column[index] is not None:
            fields[name] = column[index]
    return fields


def make_frontend(config: FrontendConfig | None = None) -> tuple[Frontend, World]:
    """A frontend over an empty world with the default tenant and database."""
    world = World()
    namespace = cast(Namespace, FakeNamespace(world))
    return Frontend(namespace, FakeLog(world), FakeQuery(world), config), world


def body(value: Any) -> bytes:
    return orjson.dumps(value)
