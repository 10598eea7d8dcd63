"""What scenarios act on: a tree of stores, a journal, and nodes without background threads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ochredb.clock import Clock, SystemClock
from ochredb.ids import IdSource
from ochredb_compactor.config import CompactorConfig
from ochredb_frontend.config import FrontendConfig
from ochredb_log.config import LogConfig
from ochredb_node.node import Node, NodeConfig

from .journal import Call, Journal, Json

DIMENSION = 4
INLINE_BYTES_MAX = 2_000
BIG = 40  # Records of a request that becomes an object.


class LaterClock(SystemClock):
    """The host's time, and as much later as it is told."""

    def __init__(self) -> None:
        self._later_s = self._set_back_s = 0.0

    def now_us(self) -> int:
        return super().now_us() + int((self._later_s - self._set_back_s) * 1e6)

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self._later_s

    def advance(self, seconds: float) -> None:
        self._later_s += seconds

    def set_back(self, seconds: float) -> None:
        """Only what the clock on the wall says."""
        self._set_back_s += seconds


def call_of(node: Node) -> Call:
    """The node's requests, as an embedded client makes them."""

    def call(method: str, path: str, body: Json | None, key: str | None) -> tuple[int, Any]:
        headers = {"content-type": "application/json"}
        if key is not None:
            headers["idempotency-key"] = key
        data = b"" if body is None else json.dumps(body).encode()
        status, _, answer = node.handle(method, path, "", headers, data)
        return status, json.loads(answer) if answer else None

    return call


def start_node(path: Path, clock: Clock | None = None) -> Node:
    """A started node of small sizes that does nothing by itself."""
    clock = clock or SystemClock()
    config = NodeConfig(
        path=str(path),
        frontend=FrontendConfig(allow_reset=True),
        log=LogConfig(inline_bytes_max=INLINE_BYTES_MAX),
        compactor=CompactorConfig(graph_threads=1),
    )
    node = Node(config, clock=clock, ids=IdSource(clock))
    node.start(background=False)
    return node


class Stage:
    """One run of a scenario, or of its preparation."""

    def __init__(self, tree: Path, journal: Journal, patch: Callable[..., None]) -> None:
        """patch: sets an attribute of a module, for this process: sizes that are met early."""
        self.tree, self.journal, self.patch = tree, journal, patch
        self._keys = IdSource()

    @contextlib.contextmanager
    def node(self, store: str = "store", clock: Clock | None = None) -> Iterator[Node]:
        self.journal.opened(store)
        node = start_node(self.tree / store, clock)
        try:
            yield node
        finally:
            node.close()

    def do(self, node: Node, *requests: Json, store: str = "store") -> None:
        """Make requests one after the other, all of which must succeed."""
        for one in requests:
            if "body" in one:  # About records: with a key of its own (I8).
                one = {**one, "key": self._keys.uuid7()}
            self.journal.perform(call_of(node), store, one)


def records(first: int, count: int, version: int = 0) -> Json:
    """The body of a request about records that depend on their numbers and a version only."""
    numbers = range(first, first + count)
    return {
        "ids": [f"id-{number}" for number in numbers],
        "embeddings": [
            [float(number * (axis + 3) % 97 + version) for axis in range(DIMENSION)]
            for number in numbers
        ],
        "documents": [f"document {number} version {version}" for number in numbers],
        "metadatas": [{"number": number, "version": version} for number in numbers],
        "uris": [f"file:///{number}" if number % 2 else None for number in numbers],
    }


def request(op: str, name: str, body: Json | None = None, **more: Any) -> Json:
    """One of the journal's requests."""
    return {"op": op, "name": name, **({} if body is None else {"body": body}), **more}


def collection_id(node: Node, name: str) -> str:
    return node.namespace.get_collection("default_tenant", "default_database", name).id


def ids(numbers: Sequence[int]) -> Json:
    return {"ids": [f"id-{number}" for number in numbers]}
