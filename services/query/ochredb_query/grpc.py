"""The query role's service for other processes, over any `ochredb.peers.QueryNode`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from ochredb.cancel import Cancel
from ochredb.peers import QueryNode
from ochredb.proto.v1 import query_pb2 as pb
from ochredb.rpc import reads
from ochredb.rpc.columns import Columns, answers_of
from ochredb.rpc.config import RpcConfig
from ochredb.types import Records


class QueryServicer:
    """See `ochredb.rpc.server`."""

    service: ClassVar[str] = "Query"
    # Shares have threads of their own: two nodes full of reads that wait for each other's shares
    # would wait for ever. What returns at once is not kept waiting by reads either.
    pools: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("get", "query", "match", "count", "indexing_status"), "read"),
        **dict.fromkeys(("search_parts", "keep_copies"), "share"),
    }

    def __init__(self, query: QueryNode, config: RpcConfig) -> None:
        self._query, self._config = query, config

    def get(self, message: pb.GetRequest, cancel: Cancel) -> Iterator[pb.Answer]:
        request = reads.decode_get(message)
        records = self._query.get(message.collection_id, request, cancel=cancel)
        return self._answers(reads.encode_records(records), cancel)

    def query(self, message: pb.QueryRequest, cancel: Cancel) -> Iterator[pb.Answer]:
        request = reads.decode_query(message)
        answer = self._query.query(message.collection_id, request, cancel=cancel)
        return self._answers(reads.encode_answer(answer), cancel)

    def match(self, message: pb.GetRequest, cancel: Cancel) -> Iterator[pb.Answer]:
        request = reads.decode_get(message)
        ids, last_offset = self._query.match(message.collection_id, request, cancel=cancel)
        columns = reads.encode_records(Records(ids=ids))
        columns["last_offset"] = last_offset
        return self._answers(columns, cancel)

    def search_parts(self, message: pb.SearchPartsRequest, cancel: Cancel) -> Iterator[pb.Answer]:
        collection_id, request = reads.decode_parts(message)
        answer = self._query.search_parts(collection_id, request, cancel=cancel)
        return self._answers(reads.encode_parts_answer(answer), cancel)

    def keep_copies(self, message: pb.KeepCopiesRequest, cancel: Cancel) -> pb.KeepCopiesReply:
        objects = [(item.key, item.size) for item in message.objects]
        self._query.keep_copies(objects, cancel=cancel)
        return pb.KeepCopiesReply()

    def count(self, message: pb.CountRequest, cancel: Cancel) -> pb.CountReply:
        return pb.CountReply(count=self._query.count(message.collection_id, cancel=cancel))

    def indexing_status(
        self, message: pb.IndexingStatusRequest, cancel: Cancel
    ) -> pb.IndexingStatusReply:
        status = self._query.indexing_status(message.collection_id, cancel=cancel)
        return pb.IndexingStatusReply(
            num_indexed_ops=status.num_indexed_ops,
            num_unindexed_ops=status.num_unindexed_ops,
            num_quarantined_ops=status.num_quarantined_ops,
        )

    def _answers(self, columns: Columns, cancel: Cancel) -> Iterator[pb.Answer]:
        for answer in answers_of(columns, self._config.chunk_bytes):
            cancel.check()
            yield answer
