"""Requests and answers of the query role on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import orjson

from ochredb.explain import PlanStep
from ochredb.peers import GetRequest, PartsAnswer, PartsRequest, QueryRequest
from ochredb.proto.v1 import query_pb2 as pb
from ochredb.rpc import filters
from ochredb.rpc.columns import (
    Columns,
    int64s_to_bytes,
    items_from_bytes,
    items_to_bytes,
    names_from_bytes,
    numbers_from_bytes,
    optional_strings,
    strings_to_bytes,
    vectors_from_bytes,
    vectors_to_bytes,
)
from ochredb.types import Field, Float32s, QueryAnswer, Records, Snapshot

_TEXTS = (("document_lengths", "documents"), ("uri_lengths", "uris"))


def encode_get(collection_id: str, request: GetRequest) -> pb.GetRequest:
    return pb.GetRequest(
        collection_id=collection_id,
        where=filters.encode(request.where),
        limit=request.limit,
        offset=request.offset,
        fields=request.fields.value,
        explain=request.explain,
        **_encode_ids(request.ids),
    )


def decode_get(message: pb.GetRequest) -> GetRequest:
    return GetRequest(
        ids=_decode_ids(message),
        where=filters.decode(message.where) if message.HasField("where") else None,
        limit=message.limit if message.HasField("limit") else None,
        offset=message.offset,
        fields=Field(message.fields),
        explain=message.explain,
    )


def encode_query(collection_id: str, request: QueryRequest) -> pb.QueryRequest:
    vectors, dimension = request.embeddings.shape
    return pb.QueryRequest(
        collection_id=collection_id,
        embeddings=vectors_to_bytes(request.embeddings),
        vectors=vectors,
        dimension=dimension,
        n_results=request.n_results,
        where=filters.encode(request.where),
        fields=request.fields.value,
        exact=request.exact,
        explain=request.explain,
        target_recall=request.target_recall,
        **_encode_ids(request.ids),
    )


def decode_query(message: pb.QueryRequest) -> QueryRequest:
    return QueryRequest(
        embeddings=vectors_from_bytes(message.embeddings, message.vectors, message.dimension),
        n_results=message.n_results,
        ids=_decode_ids(message),
        where=filters.decode(message.where) if message.HasField("where") else None,
        fields=Field(message.fields),
        exact=message.exact,
        explain=message.explain,
        target_recall=message.target_recall if message.HasField("target_recall") else None,
    )


def _encode_ids(ids: list[str] | None) -> dict[str, Any]:
    if ids is None:
        return {}
    lengths, joined = strings_to_bytes(ids)
    return {"id_lengths": lengths, "ids": joined}


def _decode_ids(message: pb.GetRequest | pb.QueryRequest) -> list[str] | None:
    if not message.HasField("id_lengths"):
        return None
    return names_from_bytes(message.id_lengths, message.ids)


def encode_records(records: Records) -> Columns:
    """Cost: a pass over the strings, a copy of the vectors."""
    columns: Columns = {}
    columns["id_lengths"], columns["ids"] = strings_to_bytes(records.ids)
    for (lengths, name), values in zip(_TEXTS, (records.documents, records.uris), strict=True):
        if values is not None:
            columns[lengths], columns[name] = strings_to_bytes(values)
    if records.metadatas is not None:
        columns["metadata_lengths"], columns["metadatas"] = items_to_bytes(records.metadatas)
    if records.embeddings is not None:
        columns["dimension"] = records.embeddings.shape[1]
        columns["embeddings"] = vectors_to_bytes(records.embeddings)
    if records.plan is not None:
        columns["plan_json"] = _encode_plan(records.plan)
    return columns


def decode_records(columns: Columns) -> Records:
    ids = names_from_bytes(columns["id_lengths"], columns["ids"])
    metadata_lengths, embeddings = columns.get("metadata_lengths"), columns.get("embeddings")
    documents, uris = (optional_strings(columns, lengths, name) for lengths, name in _TEXTS)
    return Records(
        ids=ids,
        documents=documents,
        uris=uris,
        metadatas=None
        if metadata_lengths is None
        else items_from_bytes(metadata_lengths, columns["metadatas"]),
        embeddings=None
        if embeddings is None
        else vectors_from_bytes(embeddings, len(ids), columns.get("dimension", 0)),
        plan=_decode_plan(columns),
    )


def encode_answer(answer: QueryAnswer) -> Columns:
    """The records of all query vectors as one table, and where each vector's begin."""
    splits = accumulate((len(each.ids) for each in answer.records), initial=0)
    columns = encode_records(_joined(answer.records))
    columns["splits"] = int64s_to_bytes(list(splits))
    columns["distances"] = b"".join([vectors_to_bytes(each) for each in answer.distances])
    if answer.plan is not None:
        columns["plan_json"] = _encode_plan(answer.plan)
    return columns


def decode_answer(columns: Columns) -> QueryAnswer:
    splits: list[int] = numbers_from_bytes(columns["splits"], np.int64).tolist()
    distances: Float32s = numbers_from_bytes(columns["distances"], np.float32)
    plan = _decode_plan(columns)
    if len(splits) == 1:
        return QueryAnswer([], [], plan)
    records = decode_records(columns)
    records.plan = None  # It is the answer's.
    return QueryAnswer(
        records.split(splits), [distances[start:stop] for start, stop in pairwise(splits)], plan
    )


def encode_parts(collection_id: str, request: PartsRequest) -> pb.SearchPartsRequest:
    snapshot, inner = request.snapshot, request.request
    message = pb.SearchPartsRequest(
        snapshot=pb.Snapshot(
            collection_id=snapshot.collection_id,
            state=snapshot.state,
            revision=snapshot.revision,
            dimension=snapshot.dimension,
            version=snapshot.version,
            indexed_offset=snapshot.indexed_offset,
            next_offset=snapshot.next_offset,
            floor_offset=snapshot.floor_offset,
        ),
        part_ids=request.part_ids,
        keys_only=request.keys_only,
    )
    if isinstance(inner, GetRequest):
        message.get.CopyFrom(encode_get(collection_id, inner))
    else:
        message.query.CopyFrom(encode_query(collection_id, inner))
    return message


def decode_parts(message: pb.SearchPartsRequest) -> tuple[str, PartsRequest]:
    """The collection, and what is asked of it."""
    is_get = message.HasField("get")
    request: GetRequest | QueryRequest = (
        decode_get(message.get) if is_get else decode_query(message.query)
    )
    given = message.snapshot
    snapshot = Snapshot(
        collection_id=given.collection_id,
        state=given.state,
        revision=given.revision,
        dimension=given.dimension if given.HasField("dimension") else None,
        version=given.version,
        indexed_offset=given.indexed_offset,
        next_offset=given.next_offset,
        floor_offset=given.floor_offset,
    )
    collection_id = message.get.collection_id if is_get else message.query.collection_id
    return collection_id, PartsRequest(
        snapshot=snapshot,
        part_ids=tuple(message.part_ids),
        request=request,
        keys_only=message.keys_only,
    )


def encode_parts_answer(answer: PartsAnswer) -> Columns:
    columns = encode_records(answer.records)
    columns["splits"] = int64s_to_bytes(answer.splits)
    columns["seqs"] = int64s_to_bytes(answer.seqs)
    columns["any_lives"] = answer.any_lives
    if answer.distances is not None:
        columns["distances"] = vectors_to_bytes(answer.distances)
    if answer.plan is not None:
        columns["plan_json"] = _encode_plan(answer.plan)
    return columns


def decode_parts_answer(columns: Columns) -> PartsAnswer:
    records, plan = decode_records(columns), _decode_plan(columns)
    records.plan = None  # It is the answer's.
    distances = columns.get("distances")
    return PartsAnswer(
        records=records,
        splits=numbers_from_bytes(columns["splits"], np.int64).tolist(),
        seqs=numbers_from_bytes(columns["seqs"], np.int64),
        distances=None if distances is None else numbers_from_bytes(distances, np.float32),
        any_lives=columns.get("any_lives", False),
        plan=plan,
    )


def _joined(parts: Sequence[Records]) -> Records:
    """Records of one request, which have the same columns."""
    if len(parts) == 1:
        return parts[0]
    joined = Records()
    if not parts:
        return joined
    first = parts[0]
    joined.ids = [name for part in parts for name in part.ids]
    for column in ("documents", "uris", "metadatas"):
        if getattr(first, column) is not None:
            setattr(joined, column, [item for part in parts for item in getattr(part, column)])
    if first.embeddings is not None:
        vectors = [part.embeddings for part in parts if part.embeddings is not None]
        joined.embeddings = np.concatenate(vectors)
    return joined


def _encode_plan(plan: PlanStep) -> bytes:
    return orjson.dumps(plan.to_json(), option=orjson.OPT_SERIALIZE_NUMPY)


def _decode_plan(columns: Columns) -> PlanStep | None:
    plan = columns.get("plan_json")
    return None if plan is None else PlanStep.from_json(orjson.loads(plan))
