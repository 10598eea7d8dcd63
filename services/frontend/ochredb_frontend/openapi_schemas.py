"""Schemas of the OpenAPI document: every request and response of the API, by name."""

from __future__ import annotations

from typing import Any

JsonSchema = dict[str, Any]

STRING: JsonSchema = {"type": "string"}
BOOLEAN: JsonSchema = {"type": "boolean"}
NUMBER: JsonSchema = {"type": "number", "format": "float"}
U32: JsonSchema = {"type": "integer", "format": "int64", "minimum": 0, "maximum": 4294967295}


def _ref(name: str) -> JsonSchema:
    return {"$ref": f"#/components/schemas/{name}"}


def _array(items: JsonSchema) -> JsonSchema:
    return {"type": "array", "items": items}


def _nullable(schema: JsonSchema) -> JsonSchema:
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    return {"oneOf": [{"type": "null"}, schema]}


def _object(
    description: str = "", required: tuple[str, ...] = (), /, **properties: JsonSchema
) -> JsonSchema:
    schema: JsonSchema = {"type": "object", "properties": properties}
    if description:
        schema["description"] = description
    if required:
        schema["required"] = list(required)
    return schema


def _described(schema: JsonSchema, description: str, example: Any = None) -> JsonSchema:
    more: JsonSchema = {"description": description}
    if example is not None:
        more["example"] = example
    return {**schema, **more}


_VECTOR = _array(NUMBER)
_NULLABLE_STRINGS = _array(_nullable(STRING))
_METADATAS = _array(_nullable(_ref("Metadata")))
_UPDATE_METADATAS = _array(_nullable(_ref("UpdateMetadata")))
_RECORD_COLUMNS = {
    "documents": _nullable(_NULLABLE_STRINGS),
    "uris": _nullable(_NULLABLE_STRINGS),
}
_FILTERS = {
    "where": _described({}, "A filter on metadata and documents.", {"year": {"$gte": 2020}}),
    "where_document": _described({}, "A filter on documents.", {"$contains": "ochre"}),
}
_EXPLAIN = _described(
    {"type": "boolean", "default": False},
    "Extension: answer with the executed plan too, under `plan`.",
)
_PLAN = _described(_ref("PlanStep"), "What was executed; only if `explain` was asked for.")
_IDS = _described(_array(STRING), "Non-empty strings.", ["a", "b"])
_HNSW = {
    "ef_search": U32,
    "max_neighbors": U32,
    "num_threads": U32,
    "resize_factor": {"type": "number"},
    "sync_threshold": U32,
    "batch_size": U32,
}
_SPACE: JsonSchema = {"type": "string", "enum": ["l2", "cosine", "ip"]}

SCHEMAS: dict[str, JsonSchema] = {
    "ErrorResponse": _object(
        "What went wrong. `error` names a kind of error, `message` says what to mend.",
        ("error", "message"), error=STRING, message=STRING,
    ),
    "Empty": _object("An empty object."),
    "Boolean": BOOLEAN,
    "Count": {"type": "integer", "minimum": 0},
    "Version": _described(STRING, "The version of the REST API.", "1.0.0"),
    "HeartbeatResponse": {
        "type": "object",
        "required": ["nanosecond heartbeat"],
        "properties": {"nanosecond heartbeat": {"type": "integer", "format": "int64"}},
    },
    "HealthcheckResponse": _object(
        "Whether reads and writes are answered.", ("is_executor_ready", "is_log_client_ready"),
        is_executor_ready=BOOLEAN, is_log_client_ready=BOOLEAN,
    ),
    "ChecklistResponse": _object(
        "Limits that a client should obey; the server enforces them.",
        ("max_batch_size", "supports_base64_encoding"),
        max_batch_size=U32, supports_base64_encoding=BOOLEAN,
    ),
    "GetUserIdentityResponse": _object(
        "", ("user_id", "tenant", "databases"),
        user_id=STRING, tenant=STRING, databases=_array(STRING),
    ),
    "CreateTenantPayload": _object("", ("name",), name={"type": "string", "minLength": 3}),
    "GetTenantResponse": _object("", ("name",), name=STRING, resource_name=_nullable(STRING)),
    "UpdateTenantPayload": _object("", ("resource_name",), resource_name=STRING),
    "CreateDatabasePayload": _object("", ("name",), name=_ref("Name")),
    "Database": _object("", ("id", "name", "tenant"), id=_ref("Uuid"), name=STRING, tenant=STRING),
    "DatabaseList": _array(_ref("Database")),
    "Vacuum": _object(
        "A vacuum: how far it is and, once it is done, what it did.",
        ("id", "purge", "state", "phase", "done", "total", "error", "report"),
        id=_ref("Uuid"), purge=BOOLEAN,
        state={"type": "string", "enum": ["running", "done", "failed", "cancelled"]},
        phase={"type": "string", "enum": ["compacting", "waiting", "deleting", "catalog"]},
        done=NUMBER, total=NUMBER, error=_nullable(STRING), report=_nullable(_ref("VacuumReport")),
    ),
    "VacuumReport": _object(
        "What a vacuum did; `complete` unless there were problems or, of a purge, something kept.",
        ("purge", "collections", "parts_rewritten", "objects_deleted", "bytes_before",
         "bytes_after", "problems", "kept", "complete"),
        purge=BOOLEAN, collections=U32, parts_rewritten=U32, objects_deleted=U32,
        bytes_before={"type": "integer", "format": "int64"},
        bytes_after={"type": "integer", "format": "int64"},
        problems=_array(STRING), kept=_array(STRING), complete=BOOLEAN,
    ),
    "Uuid": {"type": "string", "format": "uuid"},
    "Bytes": {"type": "string", "format": "binary"},
    "Backup": _object(
        "A backup that was begun: its state is kept for `ttl_s` seconds after each renewal.",
        ("id", "store_id", "created_us", "ttl_s", "catalog_bytes", "catalog_checksum"),
        id=_ref("Uuid"), store_id=_ref("Uuid"),
        created_us=_described({"type": "integer", "format": "int64"}, "Microseconds since 1970."),
        ttl_s=NUMBER, catalog_bytes={"type": "integer", "format": "int64"},
        catalog_checksum=_described(STRING, "XXH3, 64 bits, hexadecimal."),
    ),
    "QuarantineList": _object(
        "Operations that could not be folded. `is_last`: nothing comes behind these.",
        ("operations", "is_last"), is_last=BOOLEAN,
        operations=_array(_object(
            "Offsets are places in the collection's log, both included.",
            ("collection_id", "first_offset", "last_offset", "reason", "time_us"),
            collection_id=_ref("Uuid"), tenant=_nullable(STRING), database=_nullable(STRING),
            collection=_nullable(STRING), first_offset=_ref("Count"), last_offset=_ref("Count"),
            reason=STRING, time_us=_ref("Count"),
        )),
    ),
    "Check": _object("A check that was begun.", ("id",), id=_ref("Uuid")),
    "CheckState": _object(
        "How far a check is. `report` and `error` are null while it runs.",
        ("id", "what", "done_bytes", "total_bytes", "report", "error"),
        id=_ref("Uuid"), what=STRING, done_bytes={"type": "integer", "format": "int64"},
        total_bytes={"type": "integer", "format": "int64"},
        report=_nullable({"type": "object"}), error=_nullable(STRING),
    ),
    "Name": _described(
        {"type": "string", "minLength": 3, "maxLength": 512},
        "3 to 512 characters from [a-zA-Z0-9._-], beginning and ending with a letter or digit;"
        " no two dots in a row, not an IP address.",
        "my-collection",
    ),
    "MetadataValue": {
        "description": "A scalar, a list of scalars of one type, or a sparse vector.",
        "oneOf": [
            STRING,
            {"type": "integer", "format": "int64"},
            {"type": "number", "format": "double"},
            BOOLEAN,
            _array(STRING),
            _array({"type": "integer", "format": "int64"}),
            _array({"type": "number", "format": "double"}),
            _array(BOOLEAN),
            _ref("SparseVector"),
        ],
    },
    "SparseVector": _object(
        "Indices ascend strictly. Not offered yet in records (501).", ("indices", "values"),
        **{"#type": {"type": "string", "enum": ["sparse_vector"]}},
        indices=_array(U32), values=_array(NUMBER), tokens=_nullable(_array(STRING)),
    ),
    "Metadata": {
        "type": "object",
        "description": "Keys are not empty and begin with neither `#` nor `$`.",
        "additionalProperties": _ref("MetadataValue"),
        "example": {"title": "Ochre", "year": 2026},
    },
    "UpdateMetadata": {
        "type": "object",
        "description": "Merged into the record's metadata key by key; null removes a key.",
        "additionalProperties": _nullable(_ref("MetadataValue")),
    },
    "EmbeddingFunction": _object(
        "How a client makes embeddings; kept as data and never run.", ("type",),
        type={"type": "string", "enum": ["known", "legacy", "unknown"]},
        name=STRING, config={"type": "object"},
    ),
    "HnswConfiguration": _object("", space=_SPACE, ef_construction=U32, **_HNSW),
    "SpannConfiguration": _object("", space=_SPACE),
    "CollectionConfiguration": _object(
        "At most one of `hnsw` and `spann`.",
        hnsw=_nullable(_ref("HnswConfiguration")),
        spann=_nullable(_ref("SpannConfiguration")),
        embedding_function=_nullable(_ref("EmbeddingFunction")),
    ),
    "UpdateCollectionConfiguration": _object(
        "",
        hnsw=_nullable(_object(**_HNSW)),
        spann=_nullable(_object(ef_search=U32, search_nprobe=U32)),
        embedding_function=_nullable(_ref("EmbeddingFunction")),
    ),
    "Schema": _object(
        "Which indexes exist, by value type (`defaults`) and by key (`keys`). Keys of records"
        " that were written appear here by themselves.",
        ("defaults", "keys"), defaults={"type": "object"}, keys={"type": "object"},
    ),
    "Collection": _object(
        "", ("id", "name", "configuration_json", "tenant", "database", "log_position", "version"),
        id=_ref("Uuid"), name=STRING, configuration_json=_ref("CollectionConfiguration"),
        schema=_nullable(_ref("Schema")), metadata=_nullable(_ref("Metadata")),
        dimension=_described(_nullable(U32), "null until the first write with an embedding."),
        tenant=STRING, database=STRING,
        log_position={"type": "integer", "format": "int64"}, version={"type": "integer"},
    ),
    "CollectionList": _array(_ref("Collection")),
    "CreateCollectionPayload": _object(
        "", ("name",), name=_ref("Name"), metadata=_nullable(_ref("Metadata")),
        configuration=_nullable(_ref("CollectionConfiguration")), schema=_nullable(_ref("Schema")),
        get_or_create={"type": "boolean", "default": False},
    ),
    "UpdateCollectionPayload": _object(
        "Absent and null fields are unchanged.", new_name=_nullable(_ref("Name")),
        new_metadata=_nullable(_ref("Metadata")),
        new_configuration=_nullable(_ref("UpdateCollectionConfiguration")),
    ),
    "EmbeddingsPayload": {
        "description": "Lists of numbers, or base64 of little-endian 32-bit floats.",
        "oneOf": [_array(_VECTOR), _array(STRING)],
        "example": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]],
    },
    "UpdateEmbeddingsPayload": {
        "description": "As in add; null leaves a record's embedding unchanged.",
        "oneOf": [_array(_nullable(_VECTOR)), _array(_nullable(STRING))],
    },
    "AddCollectionRecordsPayload": _object(
        "Columns of equal length: item i of each belongs to record i.", ("ids", "embeddings"),
        ids=_IDS, embeddings=_ref("EmbeddingsPayload"), metadatas=_nullable(_METADATAS),
        **_RECORD_COLUMNS,
    ),
    "UpsertCollectionRecordsPayload": _object(
        "Columns of equal length: item i of each belongs to record i.", ("ids", "embeddings"),
        ids=_IDS, embeddings=_ref("EmbeddingsPayload"), metadatas=_nullable(_UPDATE_METADATAS),
        **_RECORD_COLUMNS,
    ),
    "UpdateCollectionRecordsPayload": _object(
        "Columns of equal length; absent columns and null items are unchanged.", ("ids",),
        ids=_IDS, embeddings=_nullable(_ref("UpdateEmbeddingsPayload")),
        metadatas=_nullable(_UPDATE_METADATAS), **_RECORD_COLUMNS,
    ),
    "Include": {
        "type": "string",
        "enum": ["distances", "documents", "embeddings", "metadatas", "uris"],
    },
    "GetRequestPayload": _object(
        "Conditions combine; without any, all records are returned.",
        ids=_nullable(_IDS), **_FILTERS, limit=_nullable(U32), offset=_nullable(U32),
        include=_array(_ref("Include")), explain=_EXPLAIN,
    ),
    "GetResponse": _object(
        "Columns of equal length; a column that was not included is null.", ("ids", "include"),
        ids=_array(STRING), embeddings=_nullable(_array(_nullable(_VECTOR))),
        documents=_nullable(_NULLABLE_STRINGS), uris=_nullable(_NULLABLE_STRINGS),
        metadatas=_nullable(_METADATAS), include=_array(_ref("Include")), plan=_PLAN,
    ),
    "QueryRequestPayload": _object(
        "", ("query_embeddings",),
        query_embeddings=_described(_array(_VECTOR), "Lists of numbers.", [[0.1, 0.2, 0.3]]),
        n_results=_described(_nullable(U32), "10 if absent."), ids=_nullable(_IDS), **_FILTERS,
        include=_array(_ref("Include")),
        exact=_described(
            {"type": "boolean", "default": False},
            "Extension: compare with every record that matches, never with an approximate index.",
        ),
        target_recall=_described(
            {"type": ["number", "null"], "minimum": 0, "exclusiveMaximum": 1},
            "Extension: the share of the true nearest records that an approximate index shall"
            " find. 0: what the collection's `ef_search` gives; absent: the server's setting.",
            0.99,
        ),
        explain=_EXPLAIN,
    ),
    "QueryResponse": _object(
        "One list for each query embedding, nearest first. Distances: squared Euclidean for l2,"
        " 1 - cosine for cosine, 1 - inner product for ip.", ("ids", "include"),
        ids=_array(_array(STRING)), embeddings=_nullable(_array(_array(_nullable(_VECTOR)))),
        documents=_nullable(_array(_NULLABLE_STRINGS)), uris=_nullable(_array(_NULLABLE_STRINGS)),
        metadatas=_nullable(_array(_METADATAS)),
        distances=_nullable(_array(_array(_nullable(NUMBER)))), include=_array(_ref("Include")),
        plan=_PLAN,
    ),
    "PlanStep": _object(
        "One step of an executed read; the steps inside it are part of its time. Which operators"
        " and details there are may change from version to version.",
        ("operator", "time_us", "details", "steps"),
        operator=_described(STRING, "What the step does.", "Filter"),
        time_us=_described({"type": "number", "minimum": 0}, "Microseconds."),
        details={
            "type": "object",
            "additionalProperties": {"type": ["string", "integer", "number", "boolean", "null"]},
        },
        steps=_array(_ref("PlanStep")),
    ),
    "DeleteCollectionRecordsPayload": _object(
        "`ids` and filters intersect. `limit` needs a filter.", ids=_nullable(_IDS), **_FILTERS,
        limit=_nullable(U32),
    ),
    "DeleteCollectionRecordsResponse": _object(
        "The number of ids given, or of records that matched the filter.", ("deleted",),
        deleted=_ref("Count"),
    ),
    "IndexStatusResponse": _object(
        "", ("op_indexing_progress", "num_unindexed_ops", "num_indexed_ops", "total_ops"),
        op_indexing_progress={"type": "number", "minimum": 0, "maximum": 1},
        num_unindexed_ops=_ref("Count"), num_indexed_ops=_ref("Count"), total_ops=_ref("Count"),
        num_quarantined_ops=_described(
            _ref("Count"), "Extension: operations that could not be folded; absent if none."
        ),
    ),
    "SearchRequestPayload": _object("", ("searches",), searches=_array({"type": "object"})),
    "SearchResponse": _object("", ("ids",), ids=_array(_array(STRING))),
    "ForkCollectionPayload": _object("", ("new_name",), new_name=_ref("Name")),
    "ForkCountResponse": _object("", ("count",), count=_ref("Count")),
    "AttachFunctionRequest": _object(
        "", ("name", "function_id", "output_collection"),
        name=STRING, function_id=STRING, output_collection=STRING, params={"type": "object"},
    ),
    "AttachFunctionResponse": _object(
        "", ("attached_function", "created"), attached_function={"type": "object"}, created=BOOLEAN
    ),
    "GetAttachedFunctionResponse": _object(
        "", ("attached_function",), attached_function={"type": "object"}
    ),
    "DetachFunctionRequest": _object("", delete_output=BOOLEAN),
    "DetachFunctionResponse": _object("", ("success",), success=BOOLEAN),
}  # fmt: skip
