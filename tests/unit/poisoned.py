"""Fragments that no client can write: put into the log through the catalog, rightly checksummed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ochredb.catalog.appends import AppendRequest
from ochredb.checksum import signed, xxh3
from ochredb.fragment import encode_batch
from ochredb.types import Op
from ochredb_node.node import Node


def batch(**columns: pa.Array) -> pa.RecordBatch:
    return pa.record_batch(list(columns.values()), names=list(columns))


def stream(facts: dict[str, str], rows: pa.RecordBatch) -> bytes:
    """What a fragment is, with any metadata of the schema."""
    schema = rows.schema.with_metadata(facts)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(rows.replace_schema_metadata(facts))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def vectors(rows: Sequence[Sequence[float | None] | None], dimension: int) -> pa.Array:
    return pa.array(list(rows), pa.list_(pa.float32(), dimension))


def not_utf8(values: Sequence[bytes | None]) -> pa.Array:
    """A string column whose bytes are as given."""
    return pa.array(list(values), pa.binary()).view(pa.string())


def bad_offsets() -> pa.Array:
    """Two strings that lie outside of their buffer."""
    offsets = pa.py_buffer(np.array([0, 1 << 30, 3], np.int32))
    return pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"abc")])


def adds(ids: Sequence[str | None], metadatas: Sequence[bytes | None], **more: Any) -> bytes:
    """An add of records with two-dimensional embeddings 0, 1, ..."""
    columns = {
        "id": pa.array(list(ids), pa.string()),
        "embedding": vectors([[float(i), 1.0] for i in range(len(ids))], 2),
        "document": pa.array([f"text of {name}" for name in ids], pa.string()),
        "metadata": pa.array(list(metadatas), pa.binary()),
    }
    return encode_batch(Op.ADD, batch(**(columns | more)))


def append_bytes(
    node: Node, collection: str, data: bytes, count: int, *, in_object: bool = False
) -> int:
    """Append them as a request of `count` operations; returns its first offset."""
    key = None
    if in_object:
        key = f"fragments/{node.ids.uuid7()}"
        node.store.create(key, data)
    (answer,) = node.logs.append(
        [
            AppendRequest(
                collection=collection,
                request_id=node.ids.uuid7(),
                request_hash=None,
                count=count,
                dimension=None,
                key_types=frozenset(),
                expect_last_offset=None,
                payload=None if in_object else data,
                object_key=key,
                byte_start=0 if in_object else None,
                byte_stop=len(data) if in_object else None,
                object_bytes=len(data) if in_object else 0,
                byte_count=len(data),
                checksum=signed(xxh3(data)),
            )
        ]
    )
    assert not isinstance(answer, Exception), answer
    return answer.first_offset
