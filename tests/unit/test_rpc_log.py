"""Writes through gRPC when one of the two sides is lost (I1, I2, I3, I8)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ochredb import crash_points
from ochredb.cancel import Cancel
from ochredb.checksum import xxh3
from ochredb.errors import DeadlineExceeded, OutcomeUnknown, Unavailable
from ochredb.proto.v1 import log_pb2 as pb
from ochredb.rpc import operations as codec
from ochredb.rpc.calls import Calls
from ochredb.rpc.channel import channel
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.log_client import LogClient
from ochredb.types import Appended, Op, Operations
from ochredb_node.node import Node

from .kernel import ids_of, make_collection, operations, running_node
from .rpc_kernel import connected, serving

_WAIT_S = 30.0


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(str(tmp_path / "store")) as node:
        yield node


def _add(*ids: str) -> Operations:
    return operations(Op.ADD, ids, [[1.0, 2.0]] * len(ids))


def test_the_bytes_of_the_caller_are_what_the_log_holds(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log node does not encode again."""
    collection = make_collection(node)
    request = _add("a", "b")
    sent = codec.encode(request).fragment
    with serving(node) as remote:
        monkeypatch.setattr("ochredb.fragment.pa.ipc.new_stream", _must_not_be_called, raising=True)
        message = pb.AppendRequest(collection_id=collection, operations=pb.Operations())
        message.operations.fragment = sent
        message.operations.checksum = xxh3(sent)
        calls = Calls(channel(remote.server.address, RpcConfig()), RpcConfig())
        calls.unary(remote.log._stub.Append, message, Cancel(), writes=True)
        calls.channel.close()
        found = list(remote.log.read(collection, 1, None, cancel=Cancel()))
    assert [each.payload for each in found] == [sent]


def _must_not_be_called(*_args: Any) -> Any:
    raise AssertionError("encoded again")


def test_what_was_damaged_on_its_way_is_not_written(node: Node) -> None:
    collection = make_collection(node)
    operations = codec.encode(_add("a"))
    damaged = bytearray(operations.fragment)
    damaged[-20] ^= 1
    operations.fragment = bytes(damaged)
    message = pb.AppendRequest(collection_id=collection, operations=operations)
    with serving(node) as remote, pytest.raises(Unavailable, match="damaged on their way"):
        remote.log._calls.unary(remote.log._stub.Append, message, Cancel(), writes=True)
    assert ids_of(node, collection) == []


# -- a writer that is lost while the log is locked for it


def test_a_writer_that_evaluates_for_too_long_loses_the_lock(node: Node) -> None:
    collection = make_collection(node)
    evaluating, released = threading.Event(), threading.Event()

    def evaluate() -> Operations:
        evaluating.set()
        assert released.wait(_WAIT_S)
        return _add("late")

    with serving(node, RpcConfig(evaluate_timeout_s=0.2)) as remote, ThreadPoolExecutor(1) as pool:
        late = pool.submit(
            remote.log.append_evaluated, collection, evaluate, cancel=Cancel(_WAIT_S)
        )
        assert evaluating.wait(_WAIT_S)
        # Waits for the lock, and gets it.
        assert remote.log.append(collection, _add("a"), cancel=Cancel(_WAIT_S)) == Appended(1, 1)
        released.set()
        with pytest.raises(DeadlineExceeded, match="operations did not come"):
            late.result(_WAIT_S)
    assert ids_of(node, collection) == ["a"]


def test_a_writer_that_is_cancelled_while_it_evaluates_loses_the_lock(node: Node) -> None:
    collection, cancel = make_collection(node), Cancel(_WAIT_S)
    evaluating, released = threading.Event(), threading.Event()

    def evaluate() -> Operations:
        evaluating.set()
        assert released.wait(_WAIT_S)
        return _add("late")

    config = RpcConfig(evaluate_timeout_s=_WAIT_S)
    with serving(node, config) as remote, ThreadPoolExecutor(1) as pool:
        gone = pool.submit(remote.log.append_evaluated, collection, evaluate, cancel=cancel)
        assert evaluating.wait(_WAIT_S)
        cancel.cancel()
        assert remote.log.append(collection, _add("a"), cancel=Cancel(_WAIT_S)) == Appended(1, 1)
        released.set()
        assert isinstance(gone.exception(_WAIT_S), OutcomeUnknown)
    assert ids_of(node, collection) == ["a"]


_WRITER = """
import sys, time
from ochredb.cancel import Cancel
from ochredb.rpc.channel import channel
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.log_client import LogClient

address, collection = sys.argv[1:]
config = RpcConfig()
log = LogClient(channel(address, config), config)

def evaluate():
    print("evaluating", flush=True)
    time.sleep(600)

log.append_evaluated(collection, evaluate, cancel=Cancel(600))
"""


def test_a_writer_that_is_killed_while_it_evaluates_loses_the_lock(node: Node) -> None:
    collection = make_collection(node)
    with serving(node, RpcConfig(evaluate_timeout_s=_WAIT_S)) as remote:
        command = [sys.executable, "-c", _WRITER, remote.server.address, collection]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"evaluating\n"
        writer.kill()
        assert remote.log.append(collection, _add("a"), cancel=Cancel(_WAIT_S)) == Appended(1, 1)
        writer.wait()
        writer.stdout.close()


# -- a log node that is killed

_LOG_NODE = """
import sys, threading
from ochredb.clock import SystemClock
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.server import RpcServer
from ochredb_log.grpc import LogServicer
from ochredb_log.reader import LogReader
from ochredb_node.node import Node, NodeConfig

node = Node(NodeConfig(path=sys.argv[1]))
node.start(background=False)
server = RpcServer(RpcConfig(), clock=SystemClock())
server.add(LogServicer(node.log, LogReader(node.logs, node.store), RpcConfig()))
print(server.start(), flush=True)
threading.Event().wait()
"""


class _LogNode:
    """A log node in a process of its own, which may end itself at a crash point."""

    def __init__(self, path: Path, crash_point: str | None = None) -> None:
        environment = dict(os.environ)
        if crash_point is not None:
            environment[crash_points.VARIABLE] = crash_point
        command = [sys.executable, "-c", _LOG_NODE, str(path)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdout is not None
        self.address = f"127.0.0.1:{int(self.process.stdout.readline())}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


_Write = Callable[[LogClient, str], Appended]


def _write(log: LogClient, collection: str) -> Appended:
    return log.append(collection, _add("a", "b"), request_id="name", cancel=Cancel(_WAIT_S))


def _write_evaluated(log: LogClient, collection: str) -> Appended:
    return log.append_evaluated(
        collection, lambda: _add("a", "b"), request_id="name", cancel=Cancel(_WAIT_S)
    )


@pytest.mark.parametrize(
    ("write", "crash_point", "was_applied"),
    [
        (_write, "append.committing", False),
        (_write, "append.committed", True),
        (_write, "flush.acknowledging", True),
        (_write_evaluated, "append-evaluated.committing", False),
        (_write_evaluated, "append-evaluated.committed", True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_log_node_is_killed_in_the_middle_of_a_write(
    tmp_path: Path, write: _Write, crash_point: str, was_applied: bool
) -> None:
    """Its outcome is unknown; a repeat at another node finds out, and applies it once."""
    path = tmp_path / "store"
    with running_node(str(path)) as node:
        collection = make_collection(node)
    killed = _LogNode(path, crash_point)
    with connected(killed.address) as (log, _):
        with pytest.raises(OutcomeUnknown) as unknown:
            write(log, collection)
        assert unknown.value.detail == {"unreachable": True}
        assert killed.process.wait(_WAIT_S) == -signal.SIGKILL
        kind: type[BaseException] = OutcomeUnknown
        while kind is OutcomeUnknown:  # It has to hear that the connection is closed.
            with pytest.raises(Unavailable) as caught:
                write(log, collection)
            kind = type(caught.value)
        assert kind is Unavailable, "never sent"
    killed.end()
    other = _LogNode(path)
    with connected(other.address) as (log, _):
        assert write(log, collection) == Appended(1, 2, repeated=was_applied)
        assert write(log, collection) == Appended(1, 2, repeated=True)
    other.end()
    with running_node(str(path)) as node:
        assert ids_of(node, collection) == ["a", "b"]
        assert node.logs.snapshot(collection).last_offset == 2


def test_a_log_node_that_is_frozen_is_given_up_before_the_deadline(tmp_path: Path) -> None:
    """Its kernel still acknowledges what it is sent; it owes signs of life."""
    path = tmp_path / "store"
    with running_node(str(path)) as node:
        collection = make_collection(node)
    frozen = _LogNode(path)
    config = RpcConfig(keepalive_s=0.5, keepalive_timeout_s=0.5)
    with connected(frozen.address, config) as (log, _):
        assert _write(log, collection) == Appended(1, 2)
        frozen.process.send_signal(signal.SIGSTOP)
        with pytest.raises(OutcomeUnknown) as caught:
            log.append(collection, _add("c"), request_id="other", cancel=Cancel(40))
        assert caught.value.detail == {"unreachable": True}
        frozen.process.send_signal(signal.SIGCONT)
    frozen.end()
