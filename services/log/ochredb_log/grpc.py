"""The log role's service for other processes (log.proto), over any `ochredb.peers.Log`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from google.protobuf.message import Message

from ochredb.cancel import Cancel, Cancelled
from ochredb.errors import DeadlineExceeded, InvalidArgument, OutOfMemory
from ochredb.peers import Log, LogReader
from ochredb.proto.v1 import log_pb2 as pb
from ochredb.rpc import operations as codec
from ochredb.rpc.config import RpcConfig
from ochredb.types import Appended, Op, Operations

_Replies = queue.SimpleQueue[pb.Operations | None]
_Steps = queue.SimpleQueue[pb.Evaluate | Appended | BaseException]


class LogServicer:
    """See `ochredb.rpc.server`."""

    service: ClassVar[str] = "Log"
    pools: ClassVar[Mapping[str, str]] = {
        "append": "write",
        "append_evaluated": "write",
        "record_nothing": "write",
        "repeated": "read",
        "read": "read",
        "status": "read",
    }

    def __init__(self, log: Log, reader: LogReader, config: RpcConfig) -> None:
        self._log, self._reader, self._config = log, reader, config

    def append(self, message: pb.AppendRequest, cancel: Cancel) -> pb.Appended:
        operations = codec.decode(message.operations)
        if operations is None:
            raise InvalidArgument("an append without operations")
        appended = self._log.append(
            message.collection_id,
            operations,
            idempotency_key=_given(message, "idempotency_key"),
            request_hash=_given(message, "request_hash"),
            request_id=_given(message, "request_id"),
            expect_last_offset=_given(message, "expect_last_offset"),
            cancel=cancel,
        )
        return codec.encode_appended(appended)

    def append_evaluated(
        self, messages: Iterator[pb.EvaluatedRequest], cancel: Cancel
    ) -> Iterator[pb.EvaluatedReply]:
        """The log is locked from `evaluate` to the end, or until the caller takes too long for it.

        The append runs in a thread of its own, so that its lock does not depend on ours, which
        waits for the caller, whose machine may be gone without a word.
        """
        first = next(messages, None)
        if first is None or not first.HasField("begin"):
            raise InvalidArgument("an evaluated append must begin with `begin`")
        append = _EvaluatedAppend(self._log, first.begin, cancel, self._config.evaluate_timeout_s)
        append.start()
        try:
            while True:
                step = append.steps.get()
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, Appended):
                    yield pb.EvaluatedReply(appended=codec.encode_appended(step))
                    return
                yield pb.EvaluatedReply(evaluate=step)
                reply = next(messages, None)
                append.replies.put(None if reply is None else reply.operations)
        finally:
            append.replies.put(None)  # If it waits still: the caller is gone.

    def record_nothing(self, message: pb.RecordNothingRequest, cancel: Cancel) -> pb.Appended:
        appended = self._log.record_nothing(
            message.collection_id, message.idempotency_key, message.request_hash, cancel=cancel
        )
        return codec.encode_appended(appended)

    def repeated(self, message: pb.RepeatedRequest, cancel: Cancel) -> pb.RepeatedReply:
        appended = self._log.repeated(
            message.collection_id, message.idempotency_key, message.request_hash, cancel=cancel
        )
        found = None if appended is None else codec.encode_appended(appended)
        return pb.RepeatedReply(appended=found)

    def read(self, message: pb.ReadRequest, cancel: Cancel) -> Iterator[pb.LogFragment]:
        last_offset = _given(message, "last_offset")
        for each in self._reader.read(
            message.collection_id, message.first_offset, last_offset, cancel=cancel
        ):
            yield pb.LogFragment(
                first_offset=each.first_offset,
                last_offset=each.last_offset,
                fragment=each.payload,
            )

    def status(self, message: pb.LogStatusRequest, cancel: Cancel) -> pb.LogStatus:
        status = self._reader.status(message.collection_id, cancel=cancel)
        return pb.LogStatus(
            floor_offset=status.floor_offset,
            indexed_offset=status.indexed_offset,
            last_offset=status.last_offset,
            tail_bytes=status.tail_bytes,
        )


class _EvaluatedAppend:
    """One append whose operations come from another process while the log is locked."""

    def __init__(
        self, log: Log, begin: pb.EvaluatedBegin, cancel: Cancel, timeout_s: float
    ) -> None:
        self._log, self._begin, self._cancel = log, begin, cancel
        self._timeout_s = timeout_s
        self.replies: _Replies = queue.SimpleQueue()
        self.steps: _Steps = queue.SimpleQueue()

    def start(self) -> None:
        thread = threading.Thread(target=self._run, name="rpc-evaluated", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise OutOfMemory(f"no thread for the write: {error}") from error

    def _run(self) -> None:
        begin = self._begin
        take_back = self._cancel.when_cancelled(lambda: self.replies.put(None))
        try:
            outcome: Appended | BaseException = self._log.append_evaluated(
                begin.collection_id,
                self._evaluate,
                idempotency_key=_given(begin, "idempotency_key"),
                request_hash=_given(begin, "request_hash"),
                request_id=_given(begin, "request_id"),
                cancel=self._cancel,
            )
        except BaseException as error:  # Raised in the thread that answers.
            outcome = error
        finally:
            take_back()
        self.steps.put(outcome)

    def _evaluate(self) -> Operations:
        remaining_s = self._cancel.remaining_s()
        timeout_s = self._timeout_s if remaining_s is None else min(self._timeout_s, remaining_s)
        self.steps.put(pb.Evaluate(timeout_s=timeout_s))
        try:
            message = self.replies.get(timeout=timeout_s)
        except queue.Empty:
            raise DeadlineExceeded(
                f"the log was locked for {timeout_s:.1f} s, and the operations did not come"
            ) from None
        if message is None:
            raise Cancelled("the writer is gone; nothing was written")
        return codec.decode(message) or Operations(op=Op.DELETE, ids=[])


def _given(message: Message, name: str) -> Any:
    """The value of an optional field; None: it is absent."""
    return getattr(message, name) if message.HasField(name) else None
