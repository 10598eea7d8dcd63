"""Serving the application over HTTP: uvicorn with a protocol of ours, and a clean end."""

from __future__ import annotations

import contextlib
import gc
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn

from ochredb_frontend.app import App
from ochredb_frontend.protocol import Protocol

KEEP_ALIVE_S = 65  # Longer than the 40 s for which clients keep connections.
_BACKLOG = 2048
_FILES_MIN, _FILES_PER_THREAD = 64, 4  # Descriptors that are no connections.
# Threads that hold the GIL give it up after this long: with writers beside readers, the 99th
# percentile of reads halves against Python's default of 5 ms.
_SWITCH_INTERVAL_S = 0.0005


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, which tells when it listens and leaves signals to its owner."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # The original raises each signal again at the end: that would end the process before the
        # stores are closed.
        yield


def connections_max(threads: int) -> int:
    """How many clients may be connected, so that descriptors are left for files.

    threads: that read and write. Raises the process's own limit as far as that is allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says.
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(soft - _FILES_MIN - _FILES_PER_THREAD * threads, soft // 2)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes any free one. Raises OSError with the address in its text."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server:
    """One application on one socket. `run` blocks; `stop` may be called from anywhere."""

    def __init__(
        self,
        app: App,
        sock: socket.socket,
        *,
        on_ready: Callable[[str], None],
        log_level: str = "warning",
        drain_timeout_s: int = 30,
    ) -> None:
        """on_ready: called with the server's URL once it accepts connections.

        drain_timeout_s: requests that still run this long after `stop` are cut off.
        """
        self._app, self._sock = app, sock
        config = app.frontend.config
        app.connections_max = connections_max(config.read_threads + config.write_threads)
        settings = uvicorn.Config(
            app,
            http=Protocol,
            log_level=log_level,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="off",
            backlog=_BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=drain_timeout_s,
        )
        self._uvicorn = _Uvicorn(settings, lambda: on_ready(url_of(sock)))

    def run(self) -> None:
        """Serve until `stop`; returns when all requests have been answered."""
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        gc.collect()
        gc.freeze()  # What was imported stays: collections need not look at it.
        try:
            self._uvicorn.run(sockets=[self._sock])
        finally:
            self._app.close()

    def stop(self) -> None:
        """Accept nothing more and finish what runs. A second call cuts it off."""
        if self._uvicorn.should_exit:
            self._uvicorn.force_exit = True
        self._uvicorn.should_exit = True


def serve(
    app: App,
    sock: socket.socket,
    *,
    on_ready: Callable[[str], None],
    log_level: str = "warning",
    drain_timeout_s: int = 30,
) -> None:
    """Serve in the main thread until SIGTERM or SIGINT (see Server)."""
    server = Server(
        app, sock, on_ready=on_ready, log_level=log_level, drain_timeout_s=drain_timeout_s
    )
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda *_: server.stop()) for number in numbers}
    try:
        server.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
