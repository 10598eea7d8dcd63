"""Tenants, databases and collections: names and what is configured about them.

Messages are those of rest-contract section 3; official clients match their text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from ochredb.catalog import mark
from ochredb.catalog import objects as object_table
from ochredb.catalog.core import (
    BindParameter,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
    upsert,
)
from ochredb.catalog.database import Database, Row, Session, check_key, whole
from ochredb.catalog.schema import (
    collection_keys,
    collections,
    databases,
    fragments,
    idempotency,
    jobs,
    logs,
    quarantine,
    tenants,
)
from ochredb.catalog.statement import Statement
from ochredb.clock import Clock
from ochredb.errors import AlreadyExists, Corrupt, InvalidArgument, NotFound
from ochredb.ids import IdSource
from ochredb.storage.space import Reserve
from ochredb.types import CollectionInfo

DEFAULT_TENANT = "default_tenant"
DEFAULT_DATABASE = "default_database"
_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class DatabaseInfo:
    """A database as clients see it."""

    id: str
    name: str
    tenant: str


_name: BindParameter[Any] = bindparam("name")
_tenant: BindParameter[Any] = bindparam("tenant")
_id: BindParameter[Any] = bindparam("id")
_limit: BindParameter[Any] = bindparam("limit")
_offset: BindParameter[Any] = bindparam("offset")

_GET_TENANT = Statement(
    select(tenants.c.name, tenants.c.resource_name).where(tenants.c.name == _name)
)
_INSERT_TENANT = Statement(upsert(tenants).on_conflict_do_nothing())
_SET_RESOURCE = Statement(
    update(tenants).where(tenants.c.name == _name).values(resource_name=bindparam("resource"))
)
_GET_DATABASE = Statement(
    select(databases.c.id, databases.c.name, databases.c.tenant).where(
        databases.c.tenant == _tenant, databases.c.name == _name
    )
)
# Whatever changes what is in a database: two that create one name wait for each other.
_LOCK_DATABASE = Statement(
    select(databases.c.id)
    .where(databases.c.tenant == _tenant, databases.c.name == _name)
    .with_for_update()
)
_LOCK_DATABASES = Statement(select(databases.c.id).order_by(databases.c.id).with_for_update())
_LIST_DATABASES = Statement(
    select(databases.c.id, databases.c.name, databases.c.tenant)
    .where(databases.c.tenant == _tenant)
    .order_by(databases.c.name)
    .limit(_limit)
    .offset(_offset)
)
_INSERT_DATABASE = Statement(upsert(databases).on_conflict_do_nothing())
_DELETE_DATABASE = Statement(delete(databases).where(databases.c.id == _id))

_JOINED = (
    select(
        collections.c.id,
        collections.c.name,
        databases.c.tenant,
        databases.c.name.label("database"),
        collections.c.configuration,
        collections.c.schema,
        collections.c.metadata,
        logs.c.dimension,
        logs.c.revision,
    )
    .join(databases, databases.c.id == collections.c.database_id)
    .join(logs, logs.c.collection == collections.c.id)
)
_GET_BY_NAME = Statement(
    _JOINED.where(
        databases.c.tenant == _tenant,
        databases.c.name == bindparam("database"),
        collections.c.name == _name,
    )
)
_GET_BY_ID = Statement(_JOINED.where(collections.c.id == _id))
# As one value it lets an index give the order. What is skipped before a page is only its ids.
_database_id = (
    select(databases.c.id)
    .where(databases.c.tenant == _tenant, databases.c.name == bindparam("database"))
    .scalar_subquery()
)
_page = (
    select(collections.c.id)
    .where(collections.c.database_id == _database_id)
    .order_by(collections.c.created_us, collections.c.id)
    .limit(_limit)
    .offset(_offset)
)
_LIST = Statement(
    _JOINED.where(collections.c.id.in_(_page)).order_by(collections.c.created_us, collections.c.id)
)
_COUNT = Statement(
    select(func.count()).select_from(collections).where(collections.c.database_id == _database_id)
)
_KEYS = Statement(
    select(collection_keys.c.key, collection_keys.c.type).where(collection_keys.c.collection == _id)
)
_KEYS_OF_PAGE = Statement(
    select(collection_keys.c.collection, collection_keys.c.key, collection_keys.c.type).where(
        collection_keys.c.collection.in_(_page)
    )
)
_IDS_OF_DATABASE = Statement(select(collections.c.id).where(collections.c.database_id == _id))
_ALL_IDS = Statement(select(collections.c.id))
_INSERT_COLLECTION = Statement(insert(collections))
_INSERT_LOG = Statement(insert(logs))
_UPDATE_COLLECTION = Statement(
    update(collections)
    .where(collections.c.id == _id)
    .values(
        name=bindparam("new_name"),
        metadata=bindparam("new_metadata"),
        configuration=bindparam("new_configuration"),
        schema=bindparam("new_schema"),
    )
)
LOCK_LOG = Statement(
    select(logs.c.collection).where(logs.c.collection == bindparam("collection")).with_for_update()
)
_GROW_REVISION = Statement(
    update(logs).where(logs.c.collection == _id).values(revision=logs.c.revision + 1)
)
_DROPS = [
    Statement(delete(table).where(column == bindparam("collection")))
    for table, column in (
        (collections, collections.c.id),
        (logs, logs.c.collection),
        (collection_keys, collection_keys.c.collection),
        (fragments, fragments.c.collection),
        (jobs, jobs.c.collection),
        (quarantine, quarantine.c.collection),
        (idempotency, idempotency.c.collection),
    )
]
_DELETE_DATABASES = Statement(delete(databases))
_DELETE_TENANTS = Statement(delete(tenants))


class Namespace:
    """Blocking, thread-safe; each change is one transaction."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        ids: IdSource,
        *,
        reserve: Reserve | None = None,
        on_drop: Callable[[str], None] = lambda _collection: None,
    ) -> None:
        """on_drop: told of each collection that was dropped; it must not fail."""
        self._db, self._clock, self._ids = database, clock, ids
        self._on_drop = on_drop
        self._reserve = reserve or Reserve()

    @whole
    def ensure_defaults(self) -> None:
        """Create the default tenant and database in a new store. Any number may call at once."""
        with self._db.read() as session:
            if session.one(_GET_DATABASE, tenant=DEFAULT_TENANT, name=DEFAULT_DATABASE):
                return
        with self._db.write("defaults-create") as session:
            # A dropped default database stays dropped; only a store without tenants is new.
            if session.one(_GET_TENANT, name=DEFAULT_TENANT) is None:
                self._insert_defaults(session)

    def _insert_defaults(self, session: Session) -> None:
        session.run(_INSERT_TENANT, name=DEFAULT_TENANT, resource_name=None)
        session.run(
            _INSERT_DATABASE, id=self._ids.uuid7(), tenant=DEFAULT_TENANT, name=DEFAULT_DATABASE
        )

    # -- tenants and databases

    @whole
    def create_tenant(self, name: str) -> None:
        check_key(self._db, "name", name)
        with self._db.write("tenant-create") as session:
            if session.run(_INSERT_TENANT, name=name, resource_name=None) == 0:
                raise AlreadyExists(f"Tenant [{name}] already exists")

    def get_tenant(self, name: str) -> dict[str, Any]:
        with self._db.read() as session:
            row = session.one(_GET_TENANT, name=name)
        if row is None:
            raise NotFound(f"Tenant [{name}] not found")
        return {"name": row[0], "resource_name": row[1]}

    @whole
    def set_resource_name(self, name: str, resource_name: str) -> None:
        with self._db.write("tenant-update") as session:
            if session.run(_SET_RESOURCE, name=name, resource=resource_name) == 0:
                raise NotFound(f"Tenant [{name}] not found")

    @whole
    def create_database(self, tenant: str, name: str) -> None:
        with self._db.write("database-create") as session:
            if session.one(_GET_TENANT, name=tenant) is None:
                raise NotFound(f"Tenant [{tenant}] not found")
            database_id = self._ids.uuid7()
            if session.run(_INSERT_DATABASE, id=database_id, tenant=tenant, name=name) == 0:
                raise AlreadyExists(f"Database [{name}] already exists")

    def get_database(self, tenant: str, name: str) -> DatabaseInfo:
        with self._db.read() as session:
            row = session.one(_GET_DATABASE, tenant=tenant, name=name)
        if row is None:
            raise NotFound(f"Database [{name}] not found. Are you sure it exists?")
        return DatabaseInfo(*row)

    def list_databases(
        self, tenant: str, limit: int | None = None, offset: int = 0
    ) -> list[DatabaseInfo]:
        limit = _UNLIMITED if limit is None else limit
        with self._db.read() as session:
            rows = session.all(_LIST_DATABASES, tenant=tenant, limit=limit, offset=offset)
        return [DatabaseInfo(*row) for row in rows]

    def delete_database(self, tenant: str, name: str) -> None:
        """Drop it and all of its collections."""
        self._tell(self._reserve.freeing(lambda: self._delete_database(tenant, name)))

    @whole
    def _delete_database(self, tenant: str, name: str) -> list[str]:
        with self._db.write("database-drop") as session:
            row = session.one(_LOCK_DATABASE, tenant=tenant, name=name)
            if row is None:
                raise NotFound(f"Database [{name}] not found")
            dropped = self._drop(session, session.all(_IDS_OF_DATABASE, id=row[0]))
            session.run(_DELETE_DATABASE, id=row[0])
            return dropped

    # -- collections

    @whole
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
        """Raises AlreadyExists, or InvalidArgument if the database does not exist."""
        if get_or_create:
            with self._db.read_consistent() as session:
                known = self._by_name(session, tenant, database, name)
            if known is not None:
                return known
        self._reserve.check()
        with self._db.write("collection-create") as session:
            parent = session.one(_LOCK_DATABASE, tenant=tenant, name=database)
            if parent is None:
                raise InvalidArgument(f"Database [{database}] does not exist")
            known = self._by_name(session, tenant, database, name)
            if known is not None:
                if get_or_create:
                    return known
                raise AlreadyExists(f"Collection [{name}] already exists")
            collection_id, now = self._ids.uuid7(), self._clock.now_us()
            session.run(
                _INSERT_COLLECTION,
                id=collection_id,
                database_id=parent[0],
                name=name,
                configuration=_text(configuration),
                schema=_text(schema),
                metadata=None if metadata is None else _text(metadata),
                created_us=now,
            )
            session.run(
                _INSERT_LOG,
                collection=collection_id,
                state="live",
                dimension=None,
                revision=0,
                version=0,
                next_offset=1,
                indexed_offset=0,
                floor_offset=0,
                tail_bytes=0,
                time_us=now,
                unsettled_rows=0,
            )
        return CollectionInfo(
            id=collection_id,
            name=name,
            tenant=tenant,
            database=database,
            configuration=configuration,
            schema=schema,
            metadata=metadata,
            dimension=None,
            revision=0,
        )

    def get_collection(self, tenant: str, database: str, name: str) -> CollectionInfo:
        with self._db.read_consistent() as session:
            info = self._by_name(session, tenant, database, name)
        if info is None:
            raise NotFound(f"Collection [{name}] does not exist")
        return info

    def get_collection_by_id(self, collection_id: str) -> CollectionInfo:
        with self._db.read_consistent() as session:
            row = session.one(_GET_BY_ID, id=collection_id)
            if row is None:
                raise NotFound(f"Collection [{collection_id}] does not exist.")
            return _info(row, session.all(_KEYS, id=collection_id))

    def list_collections(
        self, tenant: str, database: str, limit: int | None = None, offset: int = 0
    ) -> list[CollectionInfo]:
        """In order of creation."""
        limit = _UNLIMITED if limit is None else limit
        with self._db.read_consistent() as session:
            page = {"tenant": tenant, "database": database, "limit": limit, "offset": offset}
            keys: defaultdict[str, list[Row]] = defaultdict(list)
            for collection, *key in session.all(_KEYS_OF_PAGE, **page):
                keys[collection].append(tuple(key))
            return [_info(row, keys[row[0]]) for row in session.all(_LIST, **page)]

    def all_ids(self) -> list[str]:
        """The ids of all collections of all databases."""
        with self._db.read() as session:
            return [collection for (collection,) in session.all(_ALL_IDS)]

    def count_collections(self, tenant: str, database: str) -> int:
        with self._db.read() as session:
            row = session.one(_COUNT, tenant=tenant, database=database)
        return int(row[0]) if row else 0

    @whole
    def update_collection(
        self,
        collection_id: str,
        *,
        new_name: str | None = None,
        new_metadata: dict[str, Any] | None = None,
        change_configuration: Callable[[CollectionInfo], tuple[dict[str, Any], dict[str, Any]]]
        | None = None,
    ) -> CollectionInfo:
        """Rename, replace the metadata, and change configuration and schema; None = unchanged."""
        with self._db.write("collection-update") as session:
            if new_name is not None:
                row = session.one(_GET_BY_ID, id=collection_id)
                if row is not None:  # Two that take one name wait for each other.
                    session.one(_LOCK_DATABASE, tenant=row[2], name=row[3])
            session.one(LOCK_LOG, collection=collection_id)
            row = session.one(_GET_BY_ID, id=collection_id)
            if row is None:
                raise NotFound(f"Collection [{collection_id}] does not exist.")
            info = _info(row, session.all(_KEYS, id=collection_id))
            if new_name is not None and new_name != info.name:
                if self._by_name(session, info.tenant, info.database, new_name):
                    raise AlreadyExists(f"Collection [{new_name}] already exists")
            configuration, schema = info.configuration, info.schema
            if change_configuration is not None:
                configuration, schema = change_configuration(info)
            # Every value was null: nothing is left, as after a record's last key is removed.
            metadata = info.metadata if new_metadata is None else new_metadata or None
            session.run(
                _UPDATE_COLLECTION,
                id=collection_id,
                new_name=info.name if new_name is None else new_name,
                new_metadata=None if metadata is None else _text(metadata),
                new_configuration=_text(configuration),
                new_schema=_text(schema),
            )
            session.run(_GROW_REVISION, id=collection_id)
            changed = session.one(_GET_BY_ID, id=collection_id)
            assert changed is not None
            return _info(changed, session.all(_KEYS, id=collection_id))

    def delete_collection(self, tenant: str, database: str, name: str) -> str:
        """Drop it, its log and its references; returns its id."""
        dropped = self._reserve.freeing(lambda: self._delete_collection(tenant, database, name))
        self._tell([dropped])
        return dropped

    @whole
    def _delete_collection(self, tenant: str, database: str, name: str) -> str:
        with self._db.write("collection-drop") as session:
            row = session.one(_GET_BY_NAME, tenant=tenant, database=database, name=name)
            dropped = [] if row is None else self._drop(session, [(row[0],)])
            if not dropped:  # Or somebody else was quicker.
                raise NotFound(f"Collection [{name}] does not exist")
            return dropped[0]

    def reset(self) -> None:
        """Drop everything through the catalog; objects are collected as garbage later."""
        self._tell(self._reserve.freeing(self._reset))

    @whole
    def _reset(self) -> list[str]:
        with self._db.write("reset") as session:
            session.all(_LOCK_DATABASES)  # Nobody creates a collection meanwhile.
            dropped = self._drop(session, session.all(_ALL_IDS))
            session.run(_DELETE_DATABASES)
            session.run(_DELETE_TENANTS)
            self._insert_defaults(session)
            return dropped

    def _tell(self, dropped: Sequence[str]) -> None:
        for collection_id in dropped:
            self._on_drop(collection_id)

    def _drop(self, session: Session, rows: Sequence[Row]) -> list[str]:
        """Drop collections by their ids; returns those that were still there."""
        named = [{"collection": collection} for (collection,) in sorted(rows)]
        locked = session.each(LOCK_LOG, named)  # All of them, before any of their objects.
        found = [one for one, log in zip(named, locked, strict=True) if log]
        mark.forget(session)
        dropped = [one["collection"] for one in found]
        object_table.release_collections(session, dropped, self._clock.now_us())
        for statement in _DROPS:
            session.run_many(statement, found)
        return dropped

    def _by_name(
        self, session: Session, tenant: str, database: str, name: str
    ) -> CollectionInfo | None:
        row = session.one(_GET_BY_NAME, tenant=tenant, database=database, name=name)
        return None if row is None else _info(row, session.all(_KEYS, id=row[0]))


def _text(value: dict[str, Any]) -> str:
    return orjson.dumps(value).decode()


def _info(row: Row, keys: list[Row]) -> CollectionInfo:
    try:
        configuration, schema = orjson.loads(row[4]), orjson.loads(row[5])
        metadata = None if row[6] is None else orjson.loads(row[6])
    except orjson.JSONDecodeError as error:
        raise Corrupt(f"the catalog's row of collection {row[0]} is damaged: {error}") from error
    return CollectionInfo(
        id=row[0],
        name=row[1],
        tenant=row[2],
        database=row[3],
        configuration=configuration,
        schema=schema,
        metadata=metadata,
        dimension=row[7],
        revision=row[8],
        key_types=frozenset((key, kind) for key, kind in keys),
    )
