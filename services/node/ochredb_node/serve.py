"""One process of a cluster: its node, what listens for it, and its orderly end.

It comes up as soon as its catalog and its bucket are there, and until then lives without being
ready. After SIGTERM or SIGINT it says that it is not ready, takes nothing more, finishes what runs
(for `drain_timeout_s` at most), closes its store and ends with 0. A second signal ends it at once;
what was acknowledged is durable either way.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ochredb.clock import SystemClock
from ochredb.errors import OchreError
from ochredb.ids import IdSource
from ochredb.metrics import Metrics
from ochredb_frontend.app import App
from ochredb_frontend.server import Server, listen, url_of
from ochredb_node.cli_common import start_failed
from ochredb_node.config import NodeConfig
from ochredb_node.figures import publish
from ochredb_node.health import HealthListener
from ochredb_node.memory import ShortCollections
from ochredb_node.node import Node
from ochredb_node.patience import Signals, started
from ochredb_node.peers import Peers, connect
from ochredb_node.roles import names_of
from ochredb_node.serve_settings import ServeSettings
from ochredb_node.supervisor import Supervisor

if TYPE_CHECKING:
    from ochredb.rpc.server import RpcServer

log = logging.getLogger("ochredb.node")

_GRACE_S = 5.0  # Beyond the drain, for workers to close their stores.


def serve(settings: ServeSettings, config: NodeConfig, command: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    command: this process's own, without the interpreter, for its workers.
    """
    with contextlib.ExitStack() as closing:
        try:
            Process(settings, config, command, closing).run()
        except (OchreError, OSError) as error:
            return start_failed(error)
    return 0


class Process:
    """`run`, in the main thread. What it opens is closed by `closing`, last first."""

    def __init__(
        self,
        settings: ServeSettings,
        config: NodeConfig,
        command: Sequence[str],
        closing: contextlib.ExitStack,
    ) -> None:
        self._settings, self._config, self._command = settings, config, command
        self._closing = closing
        self._clock, self._rng = SystemClock(), random.Random()
        self._is_listening = False
        self._metrics = Metrics()
        self._node: Node | None = None
        self._peers = Peers()
        self._server: Server | None = None
        self._rpc: RpcServer | None = None
        self._supervisor: Supervisor | None = None

    def run(self) -> None:
        """Until a signal came and what ran is finished. Raises OchreError, OSError at the start."""
        settings = self._settings
        health_sock = self._listen("health_host", "health_port")
        rest_sock = self._listen("host", "port") if settings.serves_rest else None
        self._signals = Signals()
        health = HealthListener(
            health_sock, is_ready=self._is_ready, metrics=lambda: self._metrics.text()
        )
        health.start()
        self._closing.callback(health.stop)
        self._node = self._open_node()
        if self._node is None:
            return
        if rest_sock is not None:
            self._open_rest(self._node, rest_sock, health_sock)
        self._open_others(self._node)
        publish(self._metrics, self._node, self._peers, self._supervisor, self._is_ready)
        drainer = threading.Thread(target=self._drain, args=(self._node,), name="drain")
        drainer.start()
        try:
            if self._server is not None:
                self._server.run()
            else:
                self._announce(health_sock)
                self._signals.stopping.wait()
        finally:
            self._signals.stopping.set()
            drainer.join()

    # -- the start

    def _listen(self, host: str, port: str) -> socket.socket:
        """Where the settings of these names say. Raises OSError that names them."""
        try:
            sock = listen(getattr(self._settings, host), getattr(self._settings, port))
        except OSError as error:
            raise OSError(error.errno, f"{host}, {port}: {error.strerror}") from None
        self._closing.callback(sock.close)
        return sock

    def _open_node(self) -> Node | None:
        """None: told to stop before there was a catalog."""
        clock, ids = self._clock, IdSource(self._clock)
        peers = connect(self._config, clock=clock, ids=ids, rng=self._rng)
        self._closing.callback(peers.close)
        self._peers = peers
        collections = ShortCollections(clock)

        def tidy(idle: bool) -> None:
            peers.renew()
            collections.tidy(idle=idle)

        def make() -> Node:
            return Node(
                self._config,
                clock=clock,
                peers=peers,
                tidy=tidy,
            )

        node = started(make, self._signals, self._rng)
        if node is not None:
            self._closing.callback(node.close)
            collections.start()
        return node

    def _open_rest(self, node: Node, sock: socket.socket, health_sock: socket.socket) -> None:
        app = App(node.frontend)
        self._metrics = app.metrics
        self._server = Server(
            app,
            sock,
            on_ready=lambda url: self._announce(health_sock, url),
            log_level="info" if self._settings.log_level == "debug" else "warning",
            drain_timeout_s=max(1, int(self._settings.drain_timeout_s)),
        )

    def _open_others(self, node: Node) -> None:
        settings = self._settings
        if settings.worker_count:
            self._supervisor = Supervisor(
                self._command,
                settings.worker_count,
                clock=self._clock,
                rng=self._rng,
                is_paused=self._config.compactor.paused,
            )
            self._supervisor.start()
            self._closing.callback(self._supervisor.stop, settings.drain_timeout_s + _GRACE_S)
        if settings.serves_rpc:
            from ochredb_node.rpc_roles import open_rpc

            assert self._config.rpc is not None
            self._rpc = open_rpc(node, self._config.rpc, self._clock, self._rng, self._supervisor)
            self._closing.callback(self._rpc.stop)

    def _announce(self, health_sock: socket.socket, rest_url: str | None = None) -> None:
        """Say that it is ready, on one line that programs read."""
        if self._signals.stopping.is_set():
            return
        self._is_listening = True
        config = self._config
        line = f"OchreDB is ready: roles={names_of(config.roles)} node={config.name}"
        if rest_url is not None:
            line += f" rest={rest_url}"
        if self._rpc is not None:
            line += f" rpc={self._rpc.address}"
        print(f"{line} health={url_of(health_sock)}", flush=True)

    # -- the end

    def _is_ready(self) -> bool:
        return self._is_listening and not self._signals.stopping.is_set()

    def _drain(self, node: Node) -> None:
        """Beside the REST server, which drains itself."""
        self._signals.stopping.wait()
        node.drain()
        if self._server is not None:
            self._server.stop()
        if self._supervisor is not None:
            self._supervisor.terminate()
        deadline_s = self._clock.monotonic_s() + self._settings.drain_timeout_s
        if self._rpc is not None:
            self._rpc.drain(self._settings.drain_timeout_s)
        if node.compacts:
            node.compactor.drain(max(0.0, deadline_s - self._clock.monotonic_s()))
