"""`ochredb.peers.Log` and `LogReader` of a log node in another process."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from ochredb.cancel import Cancel
from ochredb.errors import OutcomeUnknown
from ochredb.peers import LogFragment
from ochredb.proto.v1 import log_pb2 as pb
from ochredb.proto.v1.log_pb2_grpc import LogStub
from ochredb.rpc import operations as codec
from ochredb.rpc.calls import Calls
from ochredb.rpc.config import RpcConfig
from ochredb.types import Appended, LogStatus, Operations


class LogClient:
    """One address. Thread-safe. Nothing is repeated here.

    Writes raise Unavailable if they were surely never sent, OutcomeUnknown if the answer was lost:
    repeat them, on any node, with the same key or request id.
    """

    def __init__(self, channel: grpc.Channel, config: RpcConfig) -> None:
        self._calls = Calls(channel, config)
        self._stub: Any = LogStub(channel)

    def close(self) -> None:
        """Close the channel; calls that run fail."""
        self._calls.channel.close()

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
        message = pb.AppendRequest(
            collection_id=collection_id,
            operations=codec.encode(operations),
            idempotency_key=idempotency_key,
            request_hash=request_hash,
            request_id=request_id,
            expect_last_offset=expect_last_offset,
        )
        reply = self._calls.unary(self._stub.Append, message, cancel, writes=True)
        return codec.decode_appended(reply)

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
        message = pb.AppendRequest(
            collection_id=collection_id,
            operations=codec.encode(operations),
            idempotency_key=idempotency_key,
            request_id=request_id,
        )

        def arrived(outcome: pb.Appended | BaseException) -> None:
            if isinstance(outcome, BaseException):
                deliver(outcome)
            else:
                deliver(codec.decode_appended(outcome))

        self._calls.submit(self._stub.Append, message, cancel, arrived, writes=True)

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
        """See `ochredb.peers.Log.append_evaluated`: the node holds the lock while we evaluate.

        What `evaluate` raises is raised here; then nothing was written.
        """
        steps: queue.SimpleQueue[pb.EvaluatedRequest | None] = queue.SimpleQueue()
        begin = pb.EvaluatedBegin(
            collection_id=collection_id,
            idempotency_key=idempotency_key,
            request_hash=request_hash,
            request_id=request_id,
        )
        steps.put(pb.EvaluatedRequest(begin=begin))
        # Before the operations are sent nothing can have been written.
        sent = False
        replies = self._calls.stream(
            self._stub.AppendEvaluated, iter(steps.get, None), cancel, writes=lambda: sent
        )
        try:
            for reply in replies:
                if reply.HasField("appended"):
                    return codec.decode_appended(reply.appended)
                operations = codec.encode(evaluate())
                sent = True
                steps.put(pb.EvaluatedRequest(operations=operations))
            raise OutcomeUnknown("the log said nothing at the end; the write may have happened")
        finally:
            steps.put(None)
            replies.close()

    def record_nothing(
        self, collection_id: str, key: str, request_hash: bytes, *, cancel: Cancel
    ) -> Appended:
        message = pb.RecordNothingRequest(
            collection_id=collection_id, idempotency_key=key, request_hash=request_hash
        )
        reply = self._calls.unary(self._stub.RecordNothing, message, cancel, writes=True)
        return codec.decode_appended(reply)

    def repeated(
        self, collection_id: str, key: str, request_hash: bytes, *, cancel: Cancel
    ) -> Appended | None:
        message = pb.RepeatedRequest(
            collection_id=collection_id, idempotency_key=key, request_hash=request_hash
        )
        reply = self._calls.unary(self._stub.Repeated, message, cancel)
        return codec.decode_appended(reply.appended) if reply.HasField("appended") else None

    # -- peers.LogReader

    def read(
        self, collection_id: str, first_offset: int, last_offset: int | None, *, cancel: Cancel
    ) -> Iterator[LogFragment]:
        message = pb.ReadRequest(
            collection_id=collection_id, first_offset=first_offset, last_offset=last_offset
        )
        for each in self._calls.stream(self._stub.Read, message, cancel):
            yield LogFragment(each.first_offset, each.last_offset, each.fragment)

    def status(self, collection_id: str, *, cancel: Cancel) -> LogStatus:
        message = pb.LogStatusRequest(collection_id=collection_id)
        reply = self._calls.unary(self._stub.Status, message, cancel)
        return LogStatus(
            floor_offset=reply.floor_offset,
            indexed_offset=reply.indexed_offset,
            last_offset=reply.last_offset,
            tail_bytes=reply.tail_bytes,
        )
