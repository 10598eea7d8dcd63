"""`ochredb.peers.CompactorNode` of a compactor in another process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import grpc

from ochredb.cancel import Cancel
from ochredb.clock import Clock
from ochredb.errors import Unavailable
from ochredb.proto.v1 import compactor_pb2 as pb
from ochredb.proto.v1.common_pb2 import Empty
from ochredb.proto.v1.compactor_pb2_grpc import CompactorStub
from ochredb.rpc.calls import Calls
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.status import decode_status
from ochredb.types import CompactorStatus

_HINT_TIMEOUT_S = 1.0


class CompactorClient:
    """One address. Thread-safe. Raises Unavailable if it cannot be reached.

    Work that was asked for has no deadline: it ends when it is done, or `step` raises.
    """

    def __init__(self, channel: grpc.Channel, config: RpcConfig, *, clock: Clock) -> None:
        self._calls, self._clock = Calls(channel, config), clock
        self._stub: Any = CompactorStub(channel)

    def close(self) -> None:
        """Close the channel; calls that run fail."""
        self._calls.channel.close()

    def compact_now(self, collection_id: str, step: Callable[[], None] | None = None) -> None:
        message = pb.TriggerRequest(collection_id=collection_id)
        self._calls.work(self._stub.Trigger, message, step)

    def rebuild_now(self, collection_id: str, step: Callable[[], None] | None = None) -> None:
        message = pb.RebuildRequest(collection_id=collection_id)
        self._calls.work(self._stub.Rebuild, message, step)

    def rebuild_part(self, part_id: str, step: Callable[[], None] | None = None) -> bool:
        message = pb.RebuildPartRequest(part_id=part_id)
        return bool(self._calls.work(self._stub.RebuildPart, message, step).rebuilt)

    def settle(self, step: Callable[[], None] | None = None) -> None:
        self._calls.work(self._stub.Settle, Empty(), step)

    def status(self) -> CompactorStatus:
        return decode_status(self._short(self._stub.Status, Empty()))

    def pause(self) -> None:
        self._short(self._stub.Pause, Empty())

    def resume(self) -> None:
        self._short(self._stub.Resume, Empty())

    def hint(self, collection_id: str, last_offset: int, /) -> None:
        message = pb.HintRequest(collection_id=collection_id, last_offset=last_offset)
        cancel = Cancel(_HINT_TIMEOUT_S, self._clock)
        # Nobody waits, and nobody is told.
        with contextlib.suppress(Unavailable):  # The channel was closed.
            self._calls.submit(self._stub.Hint, message, cancel, lambda _: None, writes=False)

    def _short(self, method: Any, message: Any) -> Any:
        return self._calls.unary(method, message, Cancel(clock=self._clock))
