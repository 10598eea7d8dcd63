"""A process's own small HTTP listener: whether it lives, whether it is ready, its metrics.

It is separate from the REST API, which most processes of a cluster do not serve, and answers while
the process starts nothing new and finishes what runs.
"""

from __future__ import annotations

import http.server
import logging
import socket
import sys
import threading
from collections.abc import Callable

log = logging.getLogger("ochredb.node")

_TIMEOUT_S = 5.0  # For a client to say what it wants.
_CONNECTIONS_MAX = 16  # At once; more are closed.
_PLAIN = "text/plain; charset=utf-8"
METRICS = "text/plain; version=0.0.4"


class HealthListener:
    """GET /healthz (200 while the process runs), /readyz (200 or 503), /metrics."""

    def __init__(
        self, sock: socket.socket, *, is_ready: Callable[[], bool], metrics: Callable[[], bytes]
    ) -> None:
        """sock: bound; closed by `stop`."""
        self._server = _Server(sock, is_ready, metrics)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="health", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(
        self, sock: socket.socket, is_ready: Callable[[], bool], metrics: Callable[[], bytes]
    ) -> None:
        super().__init__(sock.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.server_activate()
        self.is_ready, self.metrics = is_ready, metrics
        self._connections = threading.BoundedSemaphore(_CONNECTIONS_MAX)

    def process_request(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, _request: object, _client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):  # Not a client that went away.
            log.exception("a request to the health listener failed")


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._answer(200, b"ok\n")
        elif path == "/readyz":
            ready = self.server.is_ready()
            self._answer(200 if ready else 503, b"ready\n" if ready else b"not ready\n")
        elif path == "/metrics":
            self._answer(200, self.server.metrics(), METRICS)
        else:
            self._answer(404, b"not found: /healthz, /readyz and /metrics are here\n")

    def _answer(self, status: int, body: bytes, content_type: str = _PLAIN) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "ochredb"

    def log_message(self, *_: object) -> None:
        """Probes come all the time."""
