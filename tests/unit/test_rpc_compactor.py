"""The compactor's service: what is asked for is done, told and given up as asked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ochredb.clock import SystemClock
from ochredb.errors import NotFound, Unavailable
from ochredb.peers import CompactorNode
from ochredb.rpc.channel import channel
from ochredb.rpc.compactor_client import CompactorClient
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.server import RpcServer
from ochredb.types import CompactorStatus, JobStatus, PendingWork
from ochredb_compactor.grpc import CompactorServicer

from .kernel import add_rows, all_rows, make_collection, running_node

_WAIT_S = 30.0
_STATUS = CompactorStatus(
    paused=True,
    tails=[PendingWork("c1", 3, 2**40, 1_700_000_000_000_000, 0)],
    merges=[PendingWork("c1", 0, 0, 5, 9), PendingWork("c2", 1, 2, 3, 4)],
    jobs=[
        JobStatus(
            collection_id="c1", kind="compact", owner="host/1", running=True, until_us=7,
            attempts=2, last_error=None,
        ),
        JobStatus(
            collection_id="", kind="sweep", owner="host/2", running=False, until_us=0,
            attempts=0, last_error="Corrupt: größe",
        ),
    ],
)  # fmt: skip


class _Compactor:
    """Notes what it is asked; works on `slow` until its step gives up."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.begun, self.given_up = threading.Event(), threading.Event()

    def compact_now(self, collection_id: str, step: Callable[[], None] | None = None) -> None:
        self._work("compact", collection_id, step)

    def rebuild_now(self, collection_id: str, step: Callable[[], None] | None = None) -> None:
        self._work("rebuild", collection_id, step)

    def rebuild_part(self, part_id: str, step: Callable[[], None] | None = None) -> bool:
        self._work("rebuild part", part_id, step)
        return part_id == "p1"

    def settle(self, step: Callable[[], None] | None = None) -> None:
        self._work("settle", "", step)

    def _work(self, what: str, collection_id: str, step: Callable[[], None] | None) -> None:
        self.asked.append((what, collection_id))
        if collection_id == "missing":
            raise NotFound("Collection [missing] does not exist.")
        assert step is not None
        self.begun.set()
        while collection_id == "slow":
            try:
                step()
            except BaseException:
                self.given_up.set()
                raise
            threading.Event().wait(0.005)

    def status(self) -> CompactorStatus:
        return _STATUS

    def pause(self) -> None:
        self.asked.append(("pause",))

    def resume(self) -> None:
        self.asked.append(("resume",))

    def hint(self, collection_id: str, last_offset: int, /) -> None:
        self.asked.append(("hint", collection_id, last_offset))


@contextlib.contextmanager
def _serving(compactor: CompactorNode) -> Iterator[tuple[CompactorClient, RpcServer]]:
    config = RpcConfig()
    server = RpcServer(config, clock=SystemClock())
    server.add(CompactorServicer(compactor))
    server.start()
    opened = channel(server.address, config)
    client = CompactorClient(opened, config, clock=SystemClock())
    try:
        yield client, server
    finally:
        client.close()
        server.stop()


@contextlib.contextmanager
def _served() -> Iterator[tuple[_Compactor, CompactorClient, RpcServer]]:
    compactor = _Compactor()
    with _serving(compactor) as (client, server):
        yield compactor, client, server


def test_what_is_asked_for_is_done() -> None:
    with _served() as (compactor, client, _):
        client.compact_now("c1")
        client.rebuild_now("c2", lambda: None)
        assert client.rebuild_part("p1")
        assert not client.rebuild_part("p2")
        client.settle()
        client.pause()
        client.resume()
        assert compactor.asked == [
            ("compact", "c1"), ("rebuild", "c2"), ("rebuild part", "p1"), ("rebuild part", "p2"),
            ("settle", ""), ("pause",), ("resume",),
        ]  # fmt: skip
        assert client.status() == _STATUS
        for call in (client.compact_now, client.rebuild_now):
            with pytest.raises(NotFound, match="missing"):
                call("missing")


def test_work_is_given_up_where_its_caller_gives_up() -> None:
    class _Enough(Exception):
        pass

    with _served() as (compactor, client, _):

        def step() -> None:
            if compactor.begun.is_set():
                raise _Enough

        with pytest.raises(_Enough):
            client.compact_now("slow", step)
        assert compactor.given_up.wait(_WAIT_S)


def test_work_is_given_up_where_its_server_stops() -> None:
    with _served() as (compactor, client, server):

        def step() -> None:
            if compactor.begun.is_set():
                server.stop()

        with pytest.raises(Unavailable):
            client.compact_now("slow", step)
        assert compactor.given_up.wait(_WAIT_S)


def test_hints_never_fail_and_never_wait() -> None:
    with _served() as (compactor, client, server):
        client.hint("c1", 2**40)
        while not compactor.asked:
            threading.Event().wait(0.005)
        assert compactor.asked == [("hint", "c1", 2**40)]
        server.stop()
        client.hint("c1", 8)
        client.close()
        client.hint("c1", 9)


def test_a_compactor_is_driven_from_another_process(tmp_path: Path) -> None:
    with running_node(str(tmp_path / "store")) as node, _serving(node.compactor) as (client, _):
        first, second = make_collection(node, "first"), make_collection(node, "second")
        for collection in (first, second):
            add_rows(node, collection, 0, 300)
        rows = all_rows(node, first)
        before = client.status()
        assert {work.collection: work.tail_rows for work in before.tails} == {
            first: 300,
            second: 300,
        }
        client.compact_now(first)
        assert [work.collection for work in client.status().tails] == [second]
        parts = node.versions.parts(first, node.logs.snapshot(first).version)
        client.rebuild_now(first)
        rebuilt = node.versions.parts(first, node.logs.snapshot(first).version)
        assert {part.manifest.id for part in parts}.isdisjoint(p.manifest.id for p in rebuilt)
        assert all_rows(node, first) == rows
        client.settle()
        done = client.status()
        assert (done.tails, done.merges, done.paused) == ([], [], False)
        client.pause()
        assert client.status().paused
        client.resume()
        assert not client.status().paused
        client.hint(first, 300)
