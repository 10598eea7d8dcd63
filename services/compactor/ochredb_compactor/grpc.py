"""The compactor's service for other processes, over any `ochredb.peers.CompactorNode`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ochredb.cancel import Cancel
from ochredb.peers import CompactorNode
from ochredb.proto.v1 import compactor_pb2 as pb
from ochredb.proto.v1.common_pb2 import Empty
from ochredb.rpc.status import encode_status


class CompactorServicer:
    """See `ochredb.rpc.server`."""

    service: ClassVar[str] = "Compactor"
    pools: ClassVar[Mapping[str, str]] = {
        "trigger": "compactor",
        "rebuild": "compactor",
        "rebuild_part": "compactor",
        "settle": "compactor",
        "status": "read",
        "pause": "read",
        "resume": "read",
        "hint": "read",
    }

    def __init__(self, compactor: CompactorNode) -> None:
        self._compactor = compactor

    def trigger(self, message: pb.TriggerRequest, cancel: Cancel) -> Empty:
        self._compactor.compact_now(message.collection_id, cancel.check)
        return Empty()

    def rebuild(self, message: pb.RebuildRequest, cancel: Cancel) -> Empty:
        self._compactor.rebuild_now(message.collection_id, cancel.check)
        return Empty()

    def rebuild_part(self, message: pb.RebuildPartRequest, cancel: Cancel) -> pb.RebuildPartAnswer:
        rebuilt = self._compactor.rebuild_part(message.part_id, cancel.check)
        return pb.RebuildPartAnswer(rebuilt=rebuilt)

    def settle(self, _message: Empty, cancel: Cancel) -> Empty:
        self._compactor.settle(cancel.check)
        return Empty()

    def status(self, _message: Empty, _cancel: Cancel) -> pb.CompactorStatus:
        return encode_status(self._compactor.status())

    def pause(self, _message: Empty, _cancel: Cancel) -> Empty:
        self._compactor.pause()
        return Empty()

    def resume(self, _message: Empty, _cancel: Cancel) -> Empty:
        self._compactor.resume()
        return Empty()

    def hint(self, message: pb.HintRequest, _cancel: Cancel) -> Empty:
        self._compactor.hint(message.collection_id, message.last_offset)
        return Empty()
