"""The record calls between JSON and domain values: bodies to Operations and reads, answers to JSON.

No Python object per record beyond what orjson makes of the body itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import orjson

from ochredb import metadata, where_parse
from ochredb.checksum import xxh3
from ochredb.errors import InvalidArgument, TooLarge
from ochredb.explain import PlanStep
from ochredb.peers import GetRequest, QueryRequest
from ochredb.types import Field, Op, Operations, QueryAnswer, Records
from ochredb.where import Where
from ochredb_frontend import shapes
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.messages import Request, Response, encode, json_response
from ochredb_frontend.room import make_sure_of, memory_can_run_out
from ochredb_frontend.vectors import parse_embeddings, parse_query_embeddings

_FIELDS = {
    "distances": Field.NONE,
    "documents": Field.DOCUMENT,
    "embeddings": Field.EMBEDDING,
    "metadatas": Field.METADATA,
    "uris": Field.URI,
}
_GET_INCLUDE = ["documents", "metadatas"]
_QUERY_INCLUDE = ["documents", "metadatas", "distances"]
_UNEQUAL = "Inconsistent number of IDs, embeddings, documents, URIs and metadatas"
_READ_LEVELS = ("index_and_wal", "index_only", "index_and_bounded_wal")

T = TypeVar("T")
Answer = Records | QueryAnswer | int


@dataclass(frozen=True, slots=True)
class Write:
    """add, upsert or update: a collection and what to append. May hold no operation."""

    collection_id: str
    operations: Operations
    idempotency_key: str | None


@dataclass(frozen=True, slots=True)
class Submission:
    """A write that needs no read: what to append, and the answer when that is done."""

    write: Write
    answer: Response


@dataclass(frozen=True, slots=True)
class Read:
    """get, query or count: what to ask the query role, and how to encode what it answers.

    request: None means count. where: the filter inside `request`.
    """

    collection_id: str
    request: GetRequest | QueryRequest | None
    encode: Callable[[Answer], bytes]
    where: Where | None = None


@dataclass(frozen=True, slots=True)
class Deletion:
    """delete: by ids alone if `where` is None. ids and where intersect."""

    collection_id: str
    ids: list[str] | None
    where: Where | None
    limit: int | None
    idempotency_key: str | None
    request_hash: bytes = b""


# -- writes


def parse_write(request: Request, op: Op, config: FrontendConfig) -> Write:
    """Raises InvalidArgument, Unprocessable or TooLarge; then nothing was written.

    Duplicate ids are passed on: they are applied in order.
    """
    body = shapes.json_object(request)
    ids = shapes.strings("ids", shapes.require(body, "ids"))
    if op is Op.UPDATE:
        given = body.get("embeddings")
    else:
        given = shapes.require(body, "embeddings")
    documents = shapes.nullable_strings("documents", body.get("documents"))
    uris = shapes.nullable_strings("uris", body.get("uris"))
    items = _metadata_items(body.get("metadatas"))
    if op is Op.UPDATE and given is None:
        embeddings, embedded = None, None
    else:
        embeddings, embedded = parse_embeddings(given, nullable=op is Op.UPDATE)
    key_types: frozenset[tuple[str, str]] = frozenset()
    metadatas: list[bytes | None] | None = None
    if items is not None:
        metadatas, key_types = metadata.encode_metadatas(items, allow_null_values=op is not Op.ADD)
    collection_id = shapes.collection_id(request)
    count = len(ids)
    for column in (given, documents, uris, items):
        if column is not None and len(column) != count:
            raise InvalidArgument(_UNEQUAL)
    if count > config.batch_records_max:
        raise TooLarge(f"Batch size {count} exceeds maximum batch size {config.batch_records_max}")
    _refuse_empty_ids(ids)
    operations = Operations(
        op=op,
        ids=ids,
        embeddings=embeddings,
        embedded=embedded,
        documents=_none_if_all_absent(documents),
        uris=_none_if_all_absent(uris),
        metadatas=_none_if_all_absent(metadatas),
        key_types=key_types,
    )
    return Write(collection_id, operations, idempotency_key(request))


def parse_submission(request: Request, op: Op, config: FrontendConfig) -> Submission | None:
    """A write as one append, or None if it is not that simple: empty, or a deletion by filter."""
    if op is Op.DELETE:
        deletion = parse_delete(request)
        if deletion.where is not None or not deletion.ids:
            return None
        operations = Operations(op=op, ids=deletion.ids)
        write = Write(deletion.collection_id, operations, deletion.idempotency_key)
        return Submission(write, deleted(len(deletion.ids)))
    write = parse_write(request, op, config)
    if not write.operations.ids:
        return None
    return Submission(write, written(op))


def written(op: Op) -> Response:
    """The answer to an add, upsert or update."""
    return Response(201 if op is Op.ADD else 200, b"{}")


def deleted(count: int) -> Response:
    """The answer to a deletion."""
    return json_response({"deleted": count})


def idempotency_key(request: Request) -> str | None:
    return request.headers.get("idempotency-key") or None


def _metadata_items(value: object) -> list[Any] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise shapes.wrong_type("metadatas", value, "a sequence")
    return value


def _refuse_empty_ids(ids: list[str]) -> None:
    if "" in ids:
        raise InvalidArgument("Empty ID, ID must have at least one character")


def _none_if_all_absent(column: list[T | None] | None) -> list[T | None] | None:
    return None if column is None or column.count(None) == len(column) else column


def parse_delete(request: Request) -> Deletion:
    """If neither ids nor a filter is given, nothing is deleted."""
    body = shapes.json_object(request)
    ids = shapes.optional_strings("ids", body.get("ids"))
    where = _filter(body)
    limit = shapes.u32(body, "limit")
    collection_id = shapes.collection_id(request)
    if limit is not None and where is None:
        raise InvalidArgument(
            "Validation error: limit, where:"
            " limit can only be specified when a where clause is provided"
        )
    if where is None and ids is not None and not ids:
        raise InvalidArgument("Validation error: ids, where: Either ids or where must be specified")
    request_hash = xxh3(request.body).to_bytes(8, "little")
    return Deletion(collection_id, ids, where, limit, idempotency_key(request), request_hash)


# -- reads


def parse_get(request: Request, config: FrontendConfig) -> Read:  # noqa: ARG001
    body = shapes.json_object(request)
    ids = shapes.optional_strings("ids", body.get("ids"))
    include, fields = _include(body, _GET_INCLUDE)
    limit = shapes.u32(body, "limit")
    offset = shapes.u32(body, "offset") or 0
    where = _filter(body)
    explain = shapes.boolean(body, "explain", False)
    get = GetRequest(
        ids=ids, where=where, limit=limit, offset=offset, fields=fields, explain=explain
    )

    def encode_answer(answer: Answer) -> bytes:
        assert isinstance(answer, Records)
        return encode_get(answer, include)

    return Read(shapes.collection_id(request), get, encode_answer, where)


def parse_query(request: Request, config: FrontendConfig) -> Read:
    body = shapes.json_object(request)
    embeddings = parse_query_embeddings(shapes.require(body, "query_embeddings"))
    n_results = shapes.u32(body, "n_results")
    n_results = 10 if n_results is None else n_results
    ids = shapes.optional_strings("ids", body.get("ids"))
    include, fields = _include(body, _QUERY_INCLUDE)
    where = _filter(body)
    results = n_results * len(embeddings)
    if results > config.results_max:
        raise InvalidArgument(
            f"n_results: {n_results} results for each of {len(embeddings)} query embeddings are"
            f" {results} results, more than the maximum of {config.results_max}"
        )
    query = QueryRequest(
        embeddings=embeddings,
        n_results=n_results,
        ids=ids,
        where=where,
        fields=fields,
        exact=shapes.boolean(body, "exact", False),
        explain=shapes.boolean(body, "explain", False),
        target_recall=shapes.share(body, "target_recall"),
    )

    def encode_answer(answer: Answer) -> bytes:
        assert isinstance(answer, QueryAnswer)
        return encode_query(answer, include)

    return Read(shapes.collection_id(request), query, encode_answer, where)


def parse_count(request: Request, config: FrontendConfig) -> Read:  # noqa: ARG001
    level = shapes.query_parameters(request).get("read_level")
    if level is not None and level not in _READ_LEVELS:
        known = ", ".join(f"`{name}`" for name in _READ_LEVELS)
        raise InvalidArgument(
            "Failed to deserialize query string: read_level:"
            f" unknown variant `{level}`, expected one of {known}"
        )
    return Read(shapes.collection_id(request), None, orjson.dumps)


def _include(body: Mapping[str, Any], default: list[str]) -> tuple[list[str], Field]:
    include = body.get("include", default)
    if not isinstance(include, list):
        raise shapes.wrong_type("include", include, "a sequence")
    for index, name in enumerate(include):
        if not isinstance(name, str):
            raise shapes.wrong_type(f"include[{index}]", name, "a string")
        if name not in _FIELDS:
            known = ", ".join(f"`{known}`" for known in _FIELDS)
            raise shapes.wrong_shape(
                f"include[{index}]: unknown variant `{name}`, expected one of {known}"
            )
    return include, _fields_of(frozenset(include))


@cache  # There are 32 sets of names; combining flags costs more than the rest of this function.
def _fields_of(include: frozenset[str]) -> Field:
    fields = Field.NONE
    for name in include:
        fields |= _FIELDS[name]
    return fields


def _filter(body: Mapping[str, Any]) -> Where | None:
    """`where` and `where_document` as one filter, or None if there is neither."""
    return where_parse.combine(
        where_parse.parse_where(body.get("where")),
        where_parse.parse_where_document(body.get("where_document")),
    )


# -- answers


def encode_get(records: Records, include: list[str]) -> bytes:
    if memory_can_run_out():
        make_sure_of(records.size_bytes)
    answer = {
        "ids": records.ids,
        "embeddings": records.embeddings,
        "documents": records.documents,
        "uris": records.uris,
        "metadatas": _fragments(records.metadatas),
        "include": include,
    }
    return encode(answer if records.plan is None else _with_plan(answer, records.plan))


def encode_query(answer: QueryAnswer, include: list[str]) -> bytes:
    rows = answer.records
    if memory_can_run_out():
        make_sure_of(sum(row.size_bytes for row in rows))
    columns = {
        "ids": [row.ids for row in rows],
        "embeddings": [row.embeddings for row in rows] if "embeddings" in include else None,
        "documents": [row.documents for row in rows] if "documents" in include else None,
        "uris": [row.uris for row in rows] if "uris" in include else None,
        "metadatas": (
            [_fragments(row.metadatas) for row in rows] if "metadatas" in include else None
        ),
        "distances": answer.distances if "distances" in include else None,
        "include": include,
    }
    return encode(columns if answer.plan is None else _with_plan(columns, answer.plan))


def _with_plan(answer: dict[str, Any], plan: PlanStep) -> dict[str, Any]:
    """The extension's key: only who asked for it sees it."""
    return {**answer, "plan": plan.to_json()}


def _fragments(metadatas: list[bytes | None] | None) -> list[orjson.Fragment | None] | None:
    if metadatas is None:
        return None
    fragment = orjson.Fragment
    return [None if item is None else fragment(item) for item in metadatas]
