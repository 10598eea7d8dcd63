"""Two ways to send one REST request, and the planner and scheduler made small for tests.

`EmbeddedDriver` calls the node in this thread, as the embedded client does; `HttpDriver` sends
bytes over a socket to a server in a thread of this process. Both hold the node itself, so that a
test can fold, merge, collect and restart when it likes; background threads are off.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import orjson
import pytest

from ochredb import materialise, tail
from ochredb.parts import columns, deleted, graph, metadata_build, reader, text, typed, writer
from ochredb.parts import ids as part_ids
from ochredb.parts.graph import HnswGraph
from ochredb.plan import cost
from ochredb.vectors import codes
from ochredb_compactor import gather, scheduler
from ochredb_compactor.config import CompactorConfig
from ochredb_frontend.app import App
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.server import Server, listen
from ochredb_log.config import LogConfig
from ochredb_node.node import Node, NodeConfig
from ochredb_query import selected

DATABASE = "/api/v2/tenants/default_tenant/databases/default_database"
COLLECTIONS = f"{DATABASE}/collections"
_HEADERS = {"content-type": "application/json"}


def node_config(path: str | None) -> NodeConfig:
    """Garbage is collected at once; requests above 2 KiB are kept in objects."""
    return NodeConfig(
        path=path,
        log=LogConfig(inline_bytes_max=2 << 10),
        frontend=FrontendConfig(allow_reset=True, read_threads=2, write_threads=2),
        compactor=CompactorConfig(grace_s=0, graph_threads=1),
    )


class Maintenance(Protocol):
    """What a test does to an engine that must change no answer."""

    def fold_now(self, collection_id: str) -> object: ...

    def compact_now(self, collection_id: str) -> object: ...

    def collect_now(self, *, sweep_orphans: bool) -> object: ...


class Driver(Protocol):
    """One running engine."""

    persistent: bool

    @property
    def compactor(self) -> Maintenance: ...

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """The status and the parsed answer (None if it is empty)."""
        ...

    def restart(self) -> None:
        """Close and open again; only of a persistent one."""
        ...

    def close(self) -> None: ...


class EmbeddedDriver:
    """A node in this thread; path None keeps everything in memory."""

    def __init__(self, path: str | None) -> None:
        self.persistent = path is not None
        self._path = path
        self._start()

    def _start(self) -> None:
        self.node = Node(node_config(self._path))
        self.node.start(background=False)

    @property
    def compactor(self) -> Maintenance:
        return self.node.compactor

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = b"" if body is None else json.dumps(body).encode()  # Integers of any size.
        path, _, query = path.partition("?")
        status, _, answer = self.node.handle(method, path, query, _HEADERS, data)
        return status, orjson.loads(answer) if answer else None

    def restart(self) -> None:
        assert self.persistent
        self.node.close()
        self._start()

    def close(self) -> None:
        self.node.close()


class HttpDriver:
    """A node behind a real socket."""

    persistent = True

    def __init__(self, path: str) -> None:
        self._path = path
        self._start()

    def _start(self) -> None:
        self.node = Node(node_config(self._path))
        self.node.start(background=False)
        sock = listen("127.0.0.1", 0)
        port = sock.getsockname()[1]
        ready = threading.Event()
        self._server = Server(App(self.node.frontend), sock, on_ready=lambda _url: ready.set())
        self._thread = threading.Thread(target=self._server.run, name="server", daemon=True)
        self._thread.start()
        assert ready.wait(10), "the server did not start"
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    @property
    def compactor(self) -> Maintenance:
        return self.node.compactor

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, data, _HEADERS)
        response = self._connection.getresponse()
        answer = response.read()
        return response.status, orjson.loads(answer) if answer else None

    def _stop(self) -> None:
        self._connection.close()
        self._server.stop()
        self._thread.join(10)
        assert not self._thread.is_alive(), "the server did not stop"
        self.node.close()

    def restart(self) -> None:
        self._stop()
        self._start()

    def close(self) -> None:
        self._stop()


class GraphProbe:
    """Whether a graph was searched since the last `reset`. What was planned is kept for the next
    query that asks the same: so it is not the planner's choices that are counted.

    path: of a file with a byte for each use, which several processes may add to.
    """

    def __init__(self, path: str | None = None) -> None:
        self._path, self._uses, self._seen = path, 0, 0

    def used(self) -> None:
        if self._path is None:
            self._uses += 1
            return
        with open(self._path, "ab") as file:
            file.write(b".")

    def _all(self) -> int:
        if self._path is None:
            return self._uses
        return os.path.getsize(self._path) if os.path.exists(self._path) else 0

    @property
    def graph_uses(self) -> int:
        return self._all() - self._seen

    def reset(self) -> None:
        self._seen = self._all()


# Thresholds from which rows are merged, get graphs and text indexes, and are kept in objects.
_THRESHOLDS: list[tuple[Any, str, int]] = [
    (scheduler, "GRAPH_ROWS_MIN", 8),
    (scheduler, "GRAPH_COMPONENTS_MIN", 1),
    (scheduler, "TIER_ROWS_MIN", 4),
    (scheduler, "TIER_PARTS", 3),
    (writer, "TEXT_INDEX_ROWS_MIN", 4),
    (writer, "PACKED_BYTES_MAX", 16 << 10),
    (deleted, "INLINE_BYTES_MAX", 48),
    (codes, "COMPONENTS_MIN", 12),
    (reader, "_CODED_AT_ONCE_ROWS", 20),
    (selected, "_CODES_ROWS_MIN", 3),
    (codes, "BLOCK_ROWS", 16),
    (codes, "_BUILD_ROWS", 8),
]
# How much is done at a time: small, so that tens of rows cross the borders.
_STEPS: list[tuple[Any, str, int]] = [
    (materialise, "_CHUNK_ROWS_MIN", 16),
    (materialise, "_CHUNK_BYTES_MAX", 1),
    (materialise, "_BATCH_ROWS", 5),
    (tail, "_SEGMENT_ROWS_MIN", 3),
    (columns, "_STEP_ROWS", 7),
    (columns, "_LOOP_ROWS_MAX", 5),
    (columns, "_SCAN_BYTES", 64),
    (columns, "_STEP_BYTES", 512),
    (columns, "_COMPARED_BYTES_MAX", 12),
    (columns, "_COMPARED_ONE_IN", 4),
    (columns, "_FEW_POSITIONS", 2),
    (typed, "_LOOP_MAX", 2),
    (typed, "_STEP_ITEMS", 7),
    (typed, "_RANGE_MAX", 64),
    (typed, "_SLOT_BITS_MIN", 2),
    (typed, "_SLOT_BITS_MAX", 2),
    (metadata_build, "_STEP_ROWS", 7),
    (metadata_build, "_PENDING_MAX", 5),
    (part_ids, "_STEP_ROWS", 7),
    (part_ids, "_BISECT_MAX", 1),
    (text, "_STEP_ROWS", 16),
    (text, "_STEP_BYTES", 1 << 10),
    (graph, "_SUB_BATCH_ROWS", 7),
    (gather, "_STEP_ROWS", 7),
]


def make_small(
    monkeypatch: pytest.MonkeyPatch, *, graphs: bool, steps: bool, probe_path: str | None = None
) -> GraphProbe:
    """Merges, graphs and indexes with tens of rows.

    graphs: the planner uses the graphs, or never. steps: everything is also done in small steps.
    """
    for module, name, value in _THRESHOLDS + (_STEPS if steps else []):
        monkeypatch.setattr(module, name, value)
    if graphs:
        monkeypatch.setattr(cost, "graph_us", lambda *_args: 0.0)
        monkeypatch.setattr(cost, "FILTERED_SCAN_US_MAX", 0.0)
        monkeypatch.setattr(cost, "GRAPH_SHARE_MIN", 0.0)
    probe = GraphProbe(probe_path)
    choose: Callable[..., bool] = cost.prefers_graph

    search: Callable[..., Any] = HnswGraph.search

    def searched(*arguments: Any) -> Any:
        probe.used()
        return search(*arguments)

    monkeypatch.setattr(cost, "prefers_graph", lambda **facts: graphs and choose(**facts))
    monkeypatch.setattr(HnswGraph, "search", searched)
    return probe
