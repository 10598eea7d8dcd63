"""Every route: one table that the matcher, the server and the OpenAPI document are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote

from ochredb.types import Op
from ochredb_frontend import handlers_backups as backups
from ochredb_frontend import handlers_checks as checks
from ochredb_frontend import handlers_collections as collections
from ochredb_frontend import handlers_quarantine as quarantine
from ochredb_frontend import handlers_records as records
from ochredb_frontend import handlers_system as system
from ochredb_frontend import handlers_vacuums as vacuums
from ochredb_frontend import wire
from ochredb_frontend.messages import Request, Response

if TYPE_CHECKING:
    from ochredb_frontend.service import Frontend

Handler = Callable[["Frontend", Request], Response]
Pool = Literal["inline", "read", "write"]

PREFIX = "/api/v2"
VACUUM = PREFIX + "/vacuums/{vacuum_id}"
TENANT = PREFIX + "/tenants/{tenant}"
DATABASE = TENANT + "/databases/{database}"
COLLECTION = DATABASE + "/collections/{collection_id}"
BACKUP = PREFIX + "/backups/{backup_id}"
QUARANTINED = PREFIX + "/quarantine/{collection_id}/{offset}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One operation.

    operation: its id in OpenAPI, metrics and logs.
    pool: where it may run: "inline" never blocks; "read" and "write" have threads of their own.
    hot: served by the small dispatcher in front of the web framework.
    parse_read: for hot reads, the first half of the handler; then the answer may come inline.
    writes: for hot writes, the operation; a small one may be submitted to the log from the loop.
    request, response: names of schemas in the OpenAPI document.
    errors: statuses it may answer with, beyond those that every route shares.
    """

    method: str
    path: str
    operation: str
    handler: Handler
    tag: str
    summary: str
    description: str = ""
    pool: Pool = "read"
    hot: bool = False
    parse_read: records.ReadParser | None = None
    writes: Op | None = None
    request: str | None = None
    response: str = "Empty"
    status: int = 200
    query: tuple[str, ...] = ()
    errors: tuple[int, ...] = field(default=())


def _system(method: str, path: str, handler: Handler, summary: str, **more: Any) -> Route:
    more.setdefault("pool", "inline")
    operation = more.pop("operation", handler.__name__)
    return Route(
        method=method, path=PREFIX + path, operation=operation, handler=handler, tag="System",
        summary=summary, **more,
    )  # fmt: skip


def _vacuum(method: str, path: str, handler: Handler, summary: str, **more: Any) -> Route:
    more.setdefault("errors", (404, 501))
    return Route(
        method=method, path=path, operation=handler.__name__, handler=handler, tag="Vacuum",
        summary=summary, response="Vacuum", **more,
    )  # fmt: skip


def _namespace(method: str, path: str, handler: Handler, summary: str, **more: Any) -> Route:
    tag = "Tenant" if "tenant" in handler.__name__ else "Database"
    pool: Pool = "read" if method == "GET" else "write"
    return Route(
        method=method, path=path, operation=handler.__name__, handler=handler, tag=tag,
        summary=summary, pool=pool, **more,
    )  # fmt: skip


def _collection(method: str, path: str, handler: Handler, summary: str, **more: Any) -> Route:
    more.setdefault("pool", "read" if method == "GET" else "write")
    operation = more.pop("operation", handler.__name__)
    tag = more.pop("tag", "Collection")
    return Route(
        method=method, path=path, operation=operation, handler=handler, tag=tag, summary=summary,
        **more,
    )  # fmt: skip


def _backup(method: str, path: str, handler: Handler, summary: str, **more: Any) -> Route:
    more.setdefault("errors", (400, 404, 501))
    pool: Pool = "read" if method == "GET" else "write"
    return Route(
        method=method, path=path, operation=handler.__name__, handler=handler,
        tag=more.pop("tag", "Backup"), summary=summary, pool=pool, **more,
    )  # fmt: skip


def _quarantine(method: str, path: str, handler: Handler, summary: str, **more: Any) -> Route:
    more.setdefault("errors", (400, 404, 501))
    pool: Pool = "read" if method == "GET" else "write"
    return Route(
        method=method, path=path, operation=handler.__name__, handler=handler, tag="Quarantine",
        summary=summary, pool=pool, **more,
    )  # fmt: skip


def _record(verb: str, handler: Handler, summary: str, **more: Any) -> Route:
    return Route(
        method=more.pop("method", "POST"), path=f"{COLLECTION}/{verb}",
        operation=f"collection_{verb}", handler=handler, tag="Record", summary=summary, hot=True,
        errors=more.pop("errors", (400, 404)), **more,
    )  # fmt: skip


_IDEMPOTENT = " With an `Idempotency-Key` header, a repeat of the same request is applied once."

ROUTES: tuple[Route, ...] = (
    _system("GET", "/heartbeat", system.heartbeat, "Heartbeat",
            description="The server's time in nanoseconds since the epoch.",
            response="HeartbeatResponse"),
    _system("GET", "", system.heartbeat, "Heartbeat at the root",
            description="The same; the official asynchronous client asks here.",
            operation="root", response="HeartbeatResponse"),
    _system("GET", "/healthcheck", system.healthcheck, "Health check",
            description="503 while the server cannot answer reads and writes.",
            response="HealthcheckResponse"),
    _system("GET", "/version", system.version, "Version of the API", response="Version"),
    _system("GET", "/pre-flight-checks", system.pre_flight_checks, "Limits that clients obey",
            response="ChecklistResponse"),
    _system("GET", "/auth/identity", system.identity, "Who the caller is",
            operation="get_user_identity", response="GetUserIdentityResponse"),
    _system("POST", "/reset", system.reset, "Delete everything", pool="write",
            description="Only if the server was started with reset allowed.",
            response="Boolean", errors=(403,)),
    _vacuum("POST", PREFIX + "/vacuums", vacuums.create_vacuum, "Begin a vacuum", status=201,
            description="Extension. Gives back what deleted data takes; one at a time.",
            query=("purge",), errors=(400, 409, 501)),
    _vacuum("GET", VACUUM, vacuums.get_vacuum, "How far a vacuum is",
            description="Extension. Of the one that this process began last."),
    _vacuum("DELETE", VACUUM, vacuums.cancel_vacuum, "End a vacuum",
            description="Extension. Soon; what it did stays done."),
    _namespace("POST", PREFIX + "/tenants", system.create_tenant, "Create a tenant",
               request="CreateTenantPayload", errors=(409,)),
    _namespace("GET", TENANT, system.get_tenant, "Get a tenant", response="GetTenantResponse",
               errors=(404,)),
    _namespace("PATCH", TENANT, system.update_tenant, "Update a tenant",
               request="UpdateTenantPayload", errors=(404,)),
    _namespace("POST", TENANT + "/databases", system.create_database, "Create a database",
               request="CreateDatabasePayload", errors=(404, 409)),
    _namespace("GET", TENANT + "/databases", system.list_databases, "List databases",
               description="In order of name.", query=("limit", "offset"),
               response="DatabaseList"),
    _namespace("GET", DATABASE, system.get_database, "Get a database", response="Database",
               errors=(404,)),
    _namespace("DELETE", DATABASE, system.delete_database, "Delete a database",
               description="With all its collections.", errors=(404,)),
    _collection("GET", PREFIX + "/collections/{crn}", collections.get_collection_by_crn,
                "Get a collection by resource name",
                description="The resource name is `tenant:database:collection`.",
                response="Collection", errors=(404,)),
    _collection("GET", DATABASE + "/collections", collections.list_collections,
                "List collections", description="In order of creation.",
                query=("limit", "offset"), response="CollectionList"),
    _collection("POST", DATABASE + "/collections", collections.create_collection,
                "Create a collection",
                description="With `get_or_create`, an existing collection is returned unchanged.",
                request="CreateCollectionPayload", response="Collection", errors=(409,)),
    _collection("GET", DATABASE + "/collections_count", collections.count_collections,
                "Count collections", response="Count"),
    _collection("GET", DATABASE + "/collections/by-id/{collection_id}",
                collections.get_collection_by_id, "Get a collection by id",
                response="Collection", errors=(404,)),
    _collection("GET", COLLECTION, collections.get_collection, "Get a collection by name",
                description="The last segment is the collection's NAME.", response="Collection",
                errors=(404,)),
    _collection("PUT", COLLECTION, collections.update_collection,
                "Change a collection's name, metadata or configuration",
                description="`new_metadata` replaces the metadata. Absent fields are unchanged.",
                request="UpdateCollectionPayload", errors=(404, 409)),
    _collection("DELETE", COLLECTION, collections.delete_collection,
                "Delete a collection by name",
                description="The last segment is the collection's NAME.", errors=(404,)),
    _record("add", records.add, "Add records", pool="write", writes=Op.ADD, status=201,
            description="Records whose id exists already are left as they are." + _IDEMPOTENT,
            request="AddCollectionRecordsPayload"),
    _record("upsert", records.upsert, "Add or update records", pool="write", writes=Op.UPSERT,
            description="Metadata is merged key by key; null removes a key." + _IDEMPOTENT,
            request="UpsertCollectionRecordsPayload"),
    _record("update", records.update, "Update records", pool="write", writes=Op.UPDATE,
            description="Unknown ids are ignored; absent fields are unchanged." + _IDEMPOTENT,
            request="UpdateCollectionRecordsPayload"),
    _record("get", records.get, "Get records", parse_read=wire.parse_get,
            description="By id and filter, in order of first insertion.",
            request="GetRequestPayload", response="GetResponse"),
    _record("query", records.query, "Find the nearest records", parse_read=wire.parse_query,
            description="The nearest records of each query embedding among those that match.",
            request="QueryRequestPayload", response="QueryResponse"),
    _record("delete", records.delete, "Delete records", pool="write", writes=Op.DELETE,
            description="By id and filter." + _IDEMPOTENT,
            request="DeleteCollectionRecordsPayload", response="DeleteCollectionRecordsResponse"),
    _record("count", records.count, "Count records", method="GET",
            parse_read=wire.parse_count, query=("read_level",), response="Count"),
    _collection("GET", COLLECTION + "/indexing_status", records.indexing_status,
                "How much of the log is indexed", tag="Record", response="IndexStatusResponse",
                errors=(404,)),
    _collection("POST", COLLECTION + "/search", collections.search, "Hybrid search", tag="Record",
                operation="collection_search", description="Not offered yet.", pool="read",
                request="SearchRequestPayload", response="SearchResponse", errors=(501,)),
    _collection("POST", COLLECTION + "/fork", collections.fork, "Fork a collection",
                operation="fork_collection", description="Not offered yet.",
                request="ForkCollectionPayload", response="Collection", errors=(501,)),
    _collection("GET", COLLECTION + "/fork_count", collections.fork_count, "Count forks",
                description="Not offered yet.", response="ForkCountResponse", errors=(501,)),
    _collection("POST", COLLECTION + "/functions/attach", collections.attach_function,
                "Attach a function", tag="Function", description="Not offered yet.",
                request="AttachFunctionRequest", response="AttachFunctionResponse", errors=(501,)),
    _collection("GET", COLLECTION + "/functions/{function_name}",
                collections.get_attached_function, "Get an attached function", tag="Function",
                response="GetAttachedFunctionResponse", errors=(404,)),
    _collection("POST", COLLECTION + "/attached_functions/{name}/detach",
                collections.detach_function, "Detach a function", tag="Function",
                description="Not offered yet.", request="DetachFunctionRequest",
                response="DetachFunctionResponse", errors=(501,)),
    _backup("POST", PREFIX + "/backups", backups.create_backup, "Begin a backup", status=201,
            description="Extension. Keeps the state of now until the backup is ended or expires.",
            query=("owner",), response="Backup", errors=(400, 501)),
    _backup("POST", BACKUP, backups.renew_backup, "Renew a backup",
            description="Extension. It expires unless it is renewed."),
    _backup("DELETE", BACKUP, backups.delete_backup, "End a backup",
            description="Extension. Ending one that has ended is no error."),
    _backup("GET", BACKUP + "/catalog", backups.read_backup_catalog, "Read its catalog",
            description="Extension. At most 8 MiB; fewer bytes than asked for at the end.",
            query=("start", "stop"), response="Bytes"),
    _backup("GET", BACKUP + "/object", backups.read_backup_object, "Read one of its objects",
            description="Extension. At most 8 MiB; fewer bytes than asked for at the end.",
            query=("key", "start", "stop"), response="Bytes"),
    _quarantine("GET", PREFIX + "/quarantine", quarantine.list_quarantine, "List the quarantine",
                description="Extension. Operations that could not be folded, of all collections, "
                "by collection and offset; at most 1,000 from behind the place given.",
                query=("after_collection", "after_offset"), response="QuarantineList"),
    _quarantine("GET", QUARANTINED, quarantine.read_quarantine, "Read quarantined operations",
                description="Extension. A fragment of these operations, or what should be one.",
                response="Bytes"),
    _quarantine("DELETE", QUARANTINED, quarantine.drop_quarantine, "Drop quarantined operations",
                description="Extension. There is no other copy of them."),
    _backup("POST", PREFIX + "/checks", checks.create_check, "Begin a check of the whole store",
            description="Extension. One runs at a time, in the background. If asked to repair, it"
            " then builds anew what is derived and damaged; the report says which.",
            tag="Check", query=("repair",), status=201, response="Check", errors=(400, 501)),
    _backup("GET", PREFIX + "/checks/{check_id}", checks.get_check, "How far a check is",
            description="Extension. With its report when it is done; it is given up if nobody asks"
            " for a minute.", tag="Check", response="CheckState", errors=(404, 501)),
    _backup("DELETE", PREFIX + "/checks/{check_id}", checks.delete_check, "End a check",
            description="Extension. Gives it up if it runs.", tag="Check", errors=(501,)),
)  # fmt: skip

V1 = Route(
    method="*", path="/api/v1", operation="v1", handler=system.v1_gone, tag="System",
    summary="Version 1 of the API is gone", pool="inline",
)  # fmt: skip


class _Node:
    """One position of a path: children by literal segment, one child for a parameter."""

    __slots__ = ("children", "methods", "parameter")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.parameter: _Node | None = None
        self.methods: dict[str, tuple[Route, tuple[str, ...]]] = {}


class Matcher:
    """Finds the route of a method and a path as sent. Cost: about 2 µs."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._root = _Node()
        for route in routes:
            node, names = self._root, []
            for segment in route.path.split("/"):
                if segment.startswith("{"):
                    names.append(segment[1:-1])
                    node.parameter = node.parameter or _Node()
                    node = node.parameter
                else:
                    node = node.children.setdefault(segment, _Node())
            assert route.method not in node.methods, f"two routes: {route.method} {route.path}"
            node.methods[route.method] = (route, tuple(names))

    def match(self, method: str, path: str) -> tuple[Route, dict[str, str]] | Response:
        """The route and the decoded parameters, or an empty 404 or 405. HEAD counts as GET."""
        if path.startswith("/api/v1/"):
            return V1, {}
        wanted = "GET" if method == "HEAD" else method
        segments = path.split("/")
        allowed: set[str] = set()
        for node, values in _walk(self._root, segments, 0, ()):
            found = node.methods.get(wanted)
            if found is not None:
                route, names = found
                return route, dict(zip(names, map(unquote, values), strict=True))
            allowed.update(node.methods)
            if "GET" in node.methods:
                allowed.add("HEAD")
        if not allowed:
            return Response(404, content_type=None)
        return Response(405, headers=(("allow", ",".join(sorted(allowed))),), content_type=None)


def _walk(
    node: _Node, segments: list[str], position: int, values: tuple[str, ...]
) -> Iterable[tuple[_Node, tuple[str, ...]]]:
    """Ends of all ways through the tree that spell the path, literals first."""
    if position == len(segments):
        if node.methods:
            yield node, values
        return
    segment = segments[position]
    child = node.children.get(segment)
    if child is not None:
        yield from _walk(child, segments, position + 1, values)
    if node.parameter is not None and segment:
        yield from _walk(node.parameter, segments, position + 1, (*values, segment))
