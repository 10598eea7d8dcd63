"""What OchreDB's REST API must answer, computed the obvious way: dicts, loops, one numpy formula.

No log, parts, indexes or planner: a `CollectionModel` is a dict from id to record in order of first
insertion, and every filter is evaluated record by record on the JSON as it was sent. Tests send the
same requests to an engine and to the model and compare the answers. Nothing of the product's own
code is used here, so that an error of it cannot hide.

Requests are those that pass validation; refusals that depend on a collection's state (its
dimension) are raised as `Refusal`, malformed requests are listed in `ochredb.testing.strategies`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Json = dict[str, Any]
Float32s = NDArray[np.float32]

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_TYPE_NAMES = {str: "string", int: "int", float: "float", bool: "bool"}
HNSW_DEFAULTS: Json = {
    "space": "l2",
    "ef_construction": 100,
    "ef_search": 100,
    "max_neighbors": 16,
    "resize_factor": 1.2,
    "sync_threshold": 1000,
}


class Refusal(Exception):
    """The answer is an error: its status, its name on the wire, and a part of its message."""

    def __init__(self, status: int, name: str, message: str) -> None:
        super().__init__(f"{status} {name}: {message}")
        self.status, self.name, self.message = status, name, message


@dataclass(slots=True)
class Record:
    """embedding: float32[d]. metadata: {} means none."""

    embedding: Float32s
    document: str | None
    uri: str | None
    metadata: Json


@dataclass(slots=True)
class Neighbours:
    """All records that match one query vector's request, nearest first, ties by first insertion.

    distances: as on the wire; None stands for a distance that is not a number.
    """

    ids: list[str]
    distances: list[float | None]


@dataclass(slots=True)
class CollectionModel:
    """One collection. `records` is in order of first insertion; `operations` counts the log's."""

    name: str
    hnsw: Json = field(default_factory=lambda: dict(HNSW_DEFAULTS))
    metadata: Json | None = None
    dimension: int | None = None
    records: dict[str, Record] = field(default_factory=dict)
    key_types: set[tuple[str, str]] = field(default_factory=set)
    operations: int = 0

    @property
    def space(self) -> str:
        return str(self.hnsw["space"])

    # -- writes

    def write(self, verb: str, body: Json) -> None:
        """add, update or upsert. Raises Refusal (dimension); then nothing has changed."""
        ids: list[str] = body["ids"]
        embeddings = [_vector(item) for item in body.get("embeddings") or [None] * len(ids)]
        dimensions = {len(item) for item in embeddings if item is not None}
        for dimension in dimensions:
            if self.dimension not in (None, dimension):
                raise dimension_refusal(self.dimension, dimension)
        self.dimension = next(iter(dimensions), self.dimension)
        documents = body.get("documents") or [None] * len(ids)
        uris = body.get("uris") or [None] * len(ids)
        metadatas = body.get("metadatas") or [None] * len(ids)
        self.operations += len(ids)
        for name, embedding, document, uri, metadata in zip(
            ids, embeddings, documents, uris, metadatas, strict=True
        ):
            changes = _stored_metadata(metadata or {})
            self.key_types |= {
                (key, _type_name(value)) for key, value in changes.items() if value is not None
            }
            record = self.records.get(name)
            if record is None:
                if verb == "update":
                    continue
                assert embedding is not None
                record = self.records[name] = Record(embedding, None, None, {})
            elif verb == "add":
                continue
            if embedding is not None:
                record.embedding = embedding
            if document is not None:
                record.document = document
            if uri is not None:
                record.uri = uri
            for key, value in changes.items():
                if value is None:
                    record.metadata.pop(key, None)
                else:
                    record.metadata[key] = value

    def delete(self, body: Json) -> int:
        """Returns what the answer's `deleted` must be."""
        ids = body.get("ids")
        filters = [body.get("where"), body.get("where_document")]
        if filters == [None, None]:
            if ids is None:
                return 0
            doomed, deleted = ids, len(ids)
        else:
            doomed = self.matching(body)[: body.get("limit")]
            deleted = len(doomed)
        self.operations += len(doomed)
        for name in doomed:
            self.records.pop(name, None)
        return deleted

    # -- reads

    def matching(self, body: Json) -> list[str]:
        """Ids that the request's ids, where and where_document leave, in order of insertion."""
        ids, where, document = (body.get(name) for name in ("ids", "where", "where_document"))
        return [
            name
            for name, record in self.records.items()
            if (ids is None or name in ids)
            and (where is None or matches(where, name, record))
            and (document is None or matches_document(document, record))
        ]

    def get(self, body: Json) -> Json:
        """The whole answer."""
        start = body.get("offset") or 0
        limit = body.get("limit")
        ids = self.matching(body)[start : None if limit is None else start + limit]
        include = body.get("include", ["documents", "metadatas"])
        answer: Json = {"ids": ids, "include": include}
        for name in ("embeddings", "documents", "uris", "metadatas"):
            answer[name] = self.column(name, ids) if name in include else None
        return answer

    def query(self, body: Json) -> list[Neighbours]:
        """For each query vector every match, nearest first; an answer has the first n_results.

        Raises Refusal (dimension, ids of which none is there).
        """
        queries = [np.array(item, np.float64).astype(np.float32) for item in _floats(body)]
        for query in queries:
            if self.dimension not in (None, len(query)):
                raise dimension_refusal(self.dimension, len(query))
        given = body.get("ids")
        asked = queries and body.get("n_results", 10) and self.records
        if asked and given and self.records.keys().isdisjoint(given):
            # Of several ids those that are there answer; official clients want an error if none is.
            raise Refusal(400, "InvalidArgumentError", "Error finding id")
        ids = self.matching(body)
        return [self._nearest(query, ids) for query in queries]

    def _nearest(self, query: Float32s, ids: list[str]) -> Neighbours:
        if not np.isfinite(query).all():
            return Neighbours(ids, [None] * len(ids))
        found = [(distance(self.space, query, self.records[name].embedding), name) for name in ids]
        found.sort(key=lambda item: item[0])  # Stable: ties stay in order of insertion.
        return Neighbours([name for _, name in found], [value for value, _ in found])

    def column(self, name: str, ids: Sequence[str]) -> list[Any]:
        """One of embeddings, documents, uris, metadatas, for these records, as on the wire."""
        records = [self.records[item] for item in ids]
        match name:
            case "embeddings":
                return [float32_list(record.embedding) for record in records]
            case "documents":
                return [record.document for record in records]
            case "uris":
                return [record.uri for record in records]
            case "metadatas":
                return [record.metadata or None for record in records]
            case _:
                raise AssertionError(f"no such column: {name}")

    def schema_keys(self) -> dict[str, set[str]]:
        """Types by metadata key, as the collection's schema must list them."""
        keys: dict[str, set[str]] = {}
        for key, name in self.key_types:
            keys.setdefault(key, set()).add(name)
        return keys


def dimension_refusal(expected: int | None, given: int) -> Refusal:
    return Refusal(
        400,
        "InvalidArgumentError",
        f"Collection expecting embedding with dimension of {expected}, got {given}",
    )


# -- distances


def distance(space: str, query: Float32s, vector: Float32s) -> float:
    """In float64, rounded once to float32, as `ochredb.vectors.distance` specifies it."""
    q, x = query.astype(np.float64), vector.astype(np.float64)[np.newaxis]
    if space == "l2":
        value = np.sum((x - q) ** 2, axis=1)[0]
    elif space == "ip":
        value = 1.0 - np.sum(x * q, axis=1)[0]
    else:
        norm = np.sqrt(np.sum(x * x, axis=1)[0]) * np.sqrt(np.sum(q * q))
        value = 1.0 - (np.sum(x * q, axis=1)[0] / norm if norm > 0 else 0.0)
    return float(np.float32(value))


def float32_list(vector: Float32s) -> list[float]:
    """As on the wire: each component is the float64 of its float32."""
    return [float(value) for value in vector]


def _vector(item: Any) -> Float32s | None:
    """An embedding of a request: numbers or base64."""
    if item is None:
        return None
    if isinstance(item, str):
        return np.frombuffer(base64.b64decode(item), "<f4").astype(np.float32)
    return np.array(item, np.float64).astype(np.float32)


def _floats(body: Json) -> list[list[float]]:
    # Beyond float32's range a component is infinite; numpy would warn.
    largest = float(np.finfo(np.float32).max)
    return [
        [value if abs(value) <= largest else float("inf") for value in item]
        for item in body["query_embeddings"]
    ]


# -- metadata


def _stored_metadata(metadata: Json) -> Json:
    """Values as they are stored; None where the key is to be removed."""
    return {key: _stored_value(value) for key, value in metadata.items()}


def _stored_value(value: Any) -> Any:
    if type(value) is int and not _INT64_MIN <= value <= _INT64_MAX:
        return float(value)
    if type(value) is list:
        items = [_stored_value(item) for item in value]
        if {type(item) for item in items} == {int, float}:
            items = [float(item) for item in items]
        return items or None
    return value


def _type_name(value: Any) -> str:
    """The name under which a schema lists the value's type; a list goes by its elements."""
    return _TYPE_NAMES[type(value[0] if type(value) is list else value)]


# -- filters, on the JSON of requests (rest-contract section 8)


def matches(where: Json, name: str, record: Record) -> bool:
    """Whether a `where` object matches the record of this id."""
    ((key, condition),) = where.items()
    if key == "$and":
        return all(matches(child, name, record) for child in condition)
    if key == "$or":
        return any(matches(child, name, record) for child in condition)
    if key == "#document":
        return matches_document(condition, record)
    if not isinstance(condition, dict):
        condition = {"$eq": condition}
    ((operator, operand),) = condition.items()
    value: Any = name if key == "#id" else record.metadata.get(key)
    match operator:
        case "$eq":
            return _equal(value, operand)
        case "$ne":
            return not _equal(value, operand)
        case "$in":
            return any(_equal(value, item) for item in operand)
        case "$nin":
            return not any(_equal(value, item) for item in operand)
        case "$contains":
            return _list_contains(value, operand)
        case "$not_contains":
            return not _list_contains(value, operand)
        case _:
            return value is not None and _is_number(value) and _orders(value, operator, operand)


def matches_document(where: Json, record: Record) -> bool:
    """Whether a `where_document` object matches."""
    ((operator, operand),) = where.items()
    document = record.document
    match operator:
        case "$and":
            return all(matches_document(child, record) for child in operand)
        case "$or":
            return any(matches_document(child, record) for child in operand)
        case "$contains":
            return document is not None and operand in document
        case "$not_contains":
            return document is None or operand not in document
        case "$regex":
            return document is not None and _found(operand, document)
        case "$not_regex":
            return document is None or not _found(operand, document)
        case _:
            raise AssertionError(f"no such operator: {operator}")


def _found(pattern: str, document: str) -> bool:
    # The patterns of the tests mean the same to `re` and to RE2; users' patterns never get here.
    return re.search(pattern, document) is not None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _equal(stored: Any, operand: Any) -> bool:
    """Python compares int and float exactly, whatever their size."""
    if _is_number(stored) and _is_number(operand):
        return bool(stored == operand)
    return type(stored) is type(operand) and bool(stored == operand)


def _list_contains(stored: Any, operand: Any) -> bool:
    return type(stored) is list and any(
        type(item) is type(operand) and item == operand for item in stored
    )


def _orders(stored: float, operator: str, operand: float) -> bool:
    match operator:
        case "$lt":
            return stored < operand
        case "$lte":
            return stored <= operand
        case "$gt":
            return stored > operand
        case "$gte":
            return stored >= operand
        case _:
            raise AssertionError(f"no such operator: {operator}")


# -- comparing


def canonical(value: Any) -> str:
    """JSON text that is equal for equal answers only: 1, 1.0 and true differ, key order does not.

    Floats are compared by value; for float32s use `float32_list` on both sides first.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
