"""One process of a cluster: its node, what listens for it, and its orderly end.

After SIGTERM or SIGINT the process says that it is not ready, takes nothing more, finishes what
runs (for `drain_timeout_s` at most), closes its store and ends with 0. A second signal ends it at
once; what was acknowledged is durable either way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from ochredb.clock import SystemClock
from ochredb.errors import OchreError
from ochredb.ids import IdSource
from ochredb.metrics import Metrics
from ochredb_frontend.app import App
from ochredb_frontend.server import Server, listen, url_of
from ochredb_node.cli_common import FAILURE, failed
from ochredb_node.config import NodeConfig
from ochredb_node.health import HealthListener
from ochredb_node.memory import ShortCollections
from ochredb_node.node import Node
from ochredb_node.peers import connect
from ochredb_node.roles import Role, names_of
from ochredb_node.serve_settings import ServeSettings
from ochredb_node.supervisor import Supervisor

if TYPE_CHECKING:
    from ochredb.rpc.server import RpcServer
    from ochredb.storage.cached import CachedStore

log = logging.getLogger("ochredb.node")


def serve(settings: ServeSettings, config: NodeConfig, command: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    command: this process's own, without the interpreter, for its workers.
    """
    process = Process(settings, config, command)
    try:
        process.start()
    except (OchreError, OSError) as error:
        process.close()
        return failed(error, FAILURE)
    try:
        process.run()
    finally:
        process.close()
    return 0


class Process:
    """`start`, `run` in the main thread, `close`."""

    def __init__(self, settings: ServeSettings, config: NodeConfig, command: Sequence[str]) -> None:
        self._settings, self._config, self._command = settings, config, command
        self._clock, self._rng = SystemClock(), random.Random()
        self._stopping = threading.Event()
        self._is_listening = False
        self._closing = contextlib.ExitStack()
        self._server: Server | None = None
        self._rpc: RpcServer | None = None
        self._supervisor: Supervisor | None = None

    def start(self) -> None:
        """Listen, open the store, start the roles. Raises OchreError, OSError."""
        settings, closing = self._settings, self._closing
        health_sock = self._listen(settings.health_host, settings.health_port)
        rest_sock = self._listen(settings.host, settings.port) if settings.serves_rest else None
        collections = ShortCollections(self._clock)
        ids = IdSource(self._clock)
        peers = connect(self._config, clock=self._clock, ids=ids, rng=self._rng)
        closing.callback(peers.close)
        self.node = Node(
            self._config,
            clock=self._clock,
            peers=peers,
            tidy=lambda idle: collections.tidy(idle=idle),
        )
        self.node.start()
        closing.callback(self.node.close)
        collections.start()
        metrics = Metrics()
        if rest_sock is not None:
            app = App(self.node.frontend)
            metrics = app.metrics
            self._server = Server(
                app,
                rest_sock,
                on_ready=self._ready,
                log_level="info" if settings.log_level == "debug" else "warning",
                drain_timeout_s=max(1, int(settings.drain_timeout_s)),
            )
        if settings.serves_rpc:
            self._rpc = self._open_rpc()
            closing.callback(self._rpc.stop)
        if settings.worker_count:
            self._supervisor = Supervisor(
                self._command, settings.worker_count, clock=self._clock, rng=self._rng
            )
            self._supervisor.start()
            closing.callback(self._supervisor.stop, settings.drain_timeout_s)
        self._publish(metrics)
        health = HealthListener(
            health_sock,
            is_ready=lambda: self._is_listening and self.node.is_ready,
            metrics=metrics.text,
        )
        health.start()
        closing.callback(health.stop)
        self._rest_sock, self._health_sock = rest_sock, health_sock

    def run(self) -> None:
        """Until a signal comes and what ran is finished. In the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        drainer = threading.Thread(target=self._drain, name="drain")
        drainer.start()
        try:
            if self._server is None:
                self._ready("")
                self._stopping.wait()
            else:
                self._server.run()
        finally:
            self._stopping.set()
            drainer.join()

    def close(self) -> None:
        """Stop and close everything that was started, last first. Idempotent."""
        self._closing.close()

    def _listen(self, host: str, port: int) -> socket.socket:
        sock = listen(host, port)
        self._closing.callback(sock.close)
        return sock

    def _open_rpc(self) -> RpcServer:
        from ochredb.rpc.server import RpcServer

        node, config = self.node, self._config.rpc
        assert config is not None
        server = RpcServer(config, clock=self._clock)
        if node.has(Role.LOG):
            from ochredb_log.grpc import LogServicer
            from ochredb_log.reader import LogReader

            server.add(LogServicer(node.log, LogReader(node.logs, node.store), config))
        if node.has(Role.QUERY):
            from ochredb_query.grpc import QueryServicer

            server.add(QueryServicer(node.query, config))
        server.start()
        return server

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        if self._stopping.is_set():
            os._exit(128 + number)
        self.node.drain()
        self._stopping.set()
        if self._server is not None:
            self._server.stop()

    def _drain(self) -> None:
        """Beside the REST server, which drains itself."""
        self._stopping.wait()
        self.node.drain()
        if self._supervisor is not None:
            self._supervisor.terminate()
        if self._rpc is not None and not self._rpc.drain(self._settings.drain_timeout_s):
            log.warning("calls were cut off after %g s", self._settings.drain_timeout_s)

    def _ready(self, _url: str) -> None:
        """Say so, on one line that programs read."""
        self._is_listening = True
        name = self._config.name
        line = f"OchreDB is ready: roles={names_of(self._config.roles)} node={name}"
        if self._rest_sock is not None:
            line += f" rest={url_of(self._rest_sock)}"
        if self._rpc is not None:
            line += f" rpc={self._rpc.address}"
        print(f"{line} health={url_of(self._health_sock)}", flush=True)

    def _publish(self, metrics: Metrics) -> None:
        node, supervisor = self.node, self._supervisor
        metrics.gauge(
            "ochredb_ready", "Whether requests should be sent here.", lambda: float(node.is_ready)
        )
        if node.has(Role.COMPACTOR) or node.has(Role.LOG):
            metrics.counter(
                "ochredb_graph_insertions_total",
                "Vectors inserted into graphs.",
                lambda: node.compactor.graph_insertions,
            )
        if node.foundation.cache is not None:
            _publish_cache(metrics, node.foundation.cache)
        if supervisor is not None:
            metrics.gauge(
                "ochredb_compactor_workers",
                "Worker processes that run.",
                lambda: supervisor.running,
            )
            metrics.counter(
                "ochredb_compactor_worker_restarts_total",
                "Worker processes that had to be started again.",
                lambda: supervisor.restarts,
            )


def _publish_cache(metrics: Metrics, cache: CachedStore) -> None:
    metrics.gauge(
        "ochredb_cache_used_bytes",
        "Bytes of local copies of objects.",
        lambda: cache.used_bytes,
    )

    def counted(name: str) -> Callable[[], float]:
        return lambda: float(getattr(cache.counters, name))

    for name, help_text in (
        ("hits", "Objects that were there."),
        ("misses", "Objects that had to be fetched."),
        ("fetched_bytes", "Bytes fetched."),
        ("evictions", "Copies that made room for others."),
        ("damaged", "Copies thrown away because they were damaged."),
        ("uncached", "Objects that found no place on the disk."),
    ):
        metrics.counter(f"ochredb_cache_{name}_total", help_text, counted(name))
