"""`ochredb.peers.QueryNode` of a query node in another process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc

from ochredb.cancel import Cancel
from ochredb.errors import Unimplemented
from ochredb.peers import Batch, GetRequest, PartsAnswer, PartsRequest, QueryRequest, QuickRead
from ochredb.proto.v1 import query_pb2 as pb
from ochredb.proto.v1.query_pb2_grpc import QueryStub
from ochredb.rpc import reads
from ochredb.rpc.calls import Calls
from ochredb.rpc.columns import columns_of
from ochredb.rpc.config import RpcConfig
from ochredb.types import IndexingStatus, QueryAnswer, Records


class QueryClient:
    """One address. Thread-safe. Reads raise Unavailable if it cannot be reached."""

    def __init__(self, channel: grpc.Channel, config: RpcConfig) -> None:
        self._calls = Calls(channel, config)
        self._stub: Any = QueryStub(channel)

    def close(self) -> None:
        """Close the channel; calls that run fail."""
        self._calls.channel.close()

    def get(self, collection_id: str, request: GetRequest, *, cancel: Cancel) -> Records:
        message = reads.encode_get(collection_id, request)
        answers = self._calls.stream(self._stub.Get, message, cancel)
        return reads.decode_records(columns_of(answers))

    def query(self, collection_id: str, request: QueryRequest, *, cancel: Cancel) -> QueryAnswer:
        message = reads.encode_query(collection_id, request)
        answers = self._calls.stream(self._stub.Query, message, cancel)
        return reads.decode_answer(columns_of(answers))

    def count(self, collection_id: str, *, cancel: Cancel) -> int:
        message = pb.CountRequest(collection_id=collection_id)
        count: int = self._calls.unary(self._stub.Count, message, cancel).count
        return count

    def match(
        self, collection_id: str, request: GetRequest, *, cancel: Cancel
    ) -> tuple[list[str], int]:
        message = reads.encode_get(collection_id, request)
        columns = columns_of(self._calls.stream(self._stub.Match, message, cancel))
        return reads.decode_records(columns).ids, columns.get("last_offset", 0)

    def indexing_status(self, collection_id: str, *, cancel: Cancel) -> IndexingStatus:
        message = pb.IndexingStatusRequest(collection_id=collection_id)
        reply = self._calls.unary(self._stub.IndexingStatus, message, cancel)
        return IndexingStatus(
            num_indexed_ops=reply.num_indexed_ops,
            num_unindexed_ops=reply.num_unindexed_ops,
            num_quarantined_ops=reply.num_quarantined_ops,
        )

    def search_parts(
        self, collection_id: str, request: PartsRequest, *, cancel: Cancel
    ) -> PartsAnswer:
        return self.begin_search_parts(collection_id, request, cancel=cancel)()

    def begin_search_parts(
        self, collection_id: str, request: PartsRequest, *, cancel: Cancel
    ) -> Callable[[], PartsAnswer]:
        message = reads.encode_parts(collection_id, request)
        answers = self._calls.begin_stream(self._stub.SearchParts, message, cancel)
        return lambda: reads.decode_parts_answer(columns_of(answers))

    def keep_copies(self, objects: Sequence[tuple[str, int]], *, cancel: Cancel) -> None:
        message = pb.KeepCopiesRequest(
            objects=[pb.StoredObject(key=key, size=size) for key, size in objects]
        )
        self._calls.unary(self._stub.KeepCopies, message, cancel)

    def quick(
        self, _collection_id: str, _request: GetRequest | QueryRequest | None
    ) -> QuickRead | None:
        return None  # An event loop must not wait for a network.

    def together(self, _reads: Sequence[QuickRead]) -> Batch:
        raise Unimplemented("another process has no quick reads")
