"""A damaged index found by a process that does not compact: a compactor is asked to mend it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ochredb.cancel import Cancel
from ochredb.clock import SystemClock
from ochredb.errors import Corrupt, Unavailable
from ochredb.ids import IdSource
from ochredb.parts import writer
from ochredb.parts.open_parts import OpenParts
from ochredb.peers import QueryRequest
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.server import RpcServer
from ochredb.storage.directory import DirectoryStore
from ochredb.types import Field
from ochredb_compactor import scheduler
from ochredb_compactor.grpc import CompactorServicer
from ochredb_node import damaged
from ochredb_node.damaged import DamagedParts
from ochredb_node.node import Node, NodeConfig
from ochredb_node.peers import connect
from ochredb_node.roles import Role

from .kernel import ManualClock, add_rows, make_collection, running_node

_WAIT_S = 30.0


def _until(is_so: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(_WAIT_S / 0.02)):
        if is_so():
            return
        pause.wait(0.02)
    raise AssertionError(f"not within {_WAIT_S} s")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    """A path, the collection in it, and the part of it whose graph has a flipped bit."""
    monkeypatch.setattr(scheduler, "GRAPH_ROWS_MIN", 20)
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 80)
    monkeypatch.setattr(writer, "PACKED_BYTES_MAX", 0)
    path = str(tmp_path / "store")
    with running_node(path) as node:
        collection = make_collection(node)
        add_rows(node, collection, 0, 60)
        node.compactor.compact_now(collection)
        (part,) = node.versions.parts(collection, node.logs.snapshot(collection).version)
    sections = part.manifest.sections
    place = next(place for name, place in sections.items() if name.startswith("graph"))
    file = Path(path, "objects", part.manifest.objects[place.object].key)
    content = bytearray(file.read_bytes())
    content[(place.start + place.stop) // 2] ^= 0x10
    file.with_suffix(".new").write_bytes(content)
    file.with_suffix(".new").rename(file)
    return path, collection, part.manifest.id


def _search(node: Node, collection: str) -> list[str]:
    request = QueryRequest(
        embeddings=np.array([[1, 2, 3, 4]], np.float32), n_results=7, fields=Field.NONE
    )
    answer = node.query.query(collection, request, cancel=Cancel())
    return list(answer.records[0].ids)


def _parts(node: Node, collection: str) -> list[str]:
    version = node.logs.snapshot(collection).version
    return [part.manifest.id for part in node.versions.parts(collection, version)]


def test_a_query_node_asks_a_compactor(store: tuple[str, str, str]) -> None:
    path, collection, part_id = store
    clock = SystemClock()
    with running_node(path) as compactor:
        server = RpcServer(RpcConfig(), clock=clock)
        server.add(CompactorServicer(compactor.compactor))
        server.start()
        config = NodeConfig(
            path=path,
            roles=frozenset({Role.QUERY}),
            compactor_nodes=f"static:compactor={server.address}",
            rpc=RpcConfig(),
        )
        ids = IdSource(clock)
        peers = connect(config, clock=clock, ids=ids, rng=random.Random(1))
        reader = Node(config, clock=clock, ids=ids, peers=peers)
        reader.start()
        try:
            found = _search(reader, collection)
            _until(lambda: part_id not in _parts(reader, collection))
            assert _search(reader, collection) == found
        finally:
            reader.close()
            peers.close()
            server.stop()


def test_a_process_whose_workers_compact_mends_by_itself(store: tuple[str, str, str]) -> None:
    path, collection, part_id = store
    node = Node(NodeConfig(path=path, compactor_workers=1))
    node.start()
    try:
        found = _search(node, collection)
        _until(lambda: part_id not in _parts(node, collection))
        assert _search(node, collection) == found
    finally:
        node.close()


class _Compactor:
    """Fails as often as it is told to."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.asked = list(failures), list[str]()

    def compact_now(self, collection_id: str) -> None:
        raise AssertionError(collection_id)

    def hint(self, collection_id: str, last_offset: int, /) -> None:
        raise AssertionError((collection_id, last_offset))

    def rebuild_part(self, part_id: str, step: Callable[[], None] | None = None) -> bool:
        self.asked.append(part_id)
        if self.failures:
            raise self.failures.pop(0)
        while part_id == "slow":
            assert step is not None
            step()
            threading.Event().wait(0.005)
        return True


def _asks() -> bool:
    return any(thread.name == "ask-rebuild" for thread in threading.enumerate())


def _turn(parts: DamagedParts) -> None:
    parts.turn()
    _until(lambda: not _asks())


def test_it_is_asked_again_after_a_while_and_what_cannot_be_mended_is_let_go(
    tmp_path: Path,
) -> None:
    clock = ManualClock()
    parts = OpenParts(DirectoryStore(str(tmp_path)))
    compactor = _Compactor(Unavailable("no compactor"), Corrupt("records are damaged"))
    asking = DamagedParts(parts, compactor, clock)
    parts.found_damaged("p1", "its graph")
    _turn(asking)
    _turn(asking)
    assert compactor.asked == ["p1"]
    clock.advance(damaged._AGAIN_S)
    _turn(asking)
    _turn(asking)
    assert compactor.asked == ["p1", "p1"]
    parts.found_damaged("p2", "its graph")
    _turn(asking)
    assert compactor.asked == ["p1", "p1", "p2"]
    asking.close()


def test_closing_gives_up_what_was_asked_for(tmp_path: Path) -> None:
    parts = OpenParts(DirectoryStore(str(tmp_path)))
    compactor = _Compactor()
    asking = DamagedParts(parts, compactor, SystemClock())
    parts.found_damaged("slow", "its graph")
    asking.turn()
    _until(lambda: compactor.asked == ["slow"])
    asking.close()
    assert not _asks()
