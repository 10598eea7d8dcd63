"""Serving the application over HTTP: uvicorn with a protocol of ours, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any
from typing import Protocol as Interface

import uvicorn

from ochredb_frontend.app import App
from ochredb_frontend.protocol import Protocol

logger = logging.getLogger("ochredb.frontend")

KEEP_ALIVE_S = 65  # Longer than the 40 s for which clients keep connections.
_BACKLOG = 2048
_FILES_MIN, _FILES_PER_THREAD = 64, 4  # Descriptors that are no connections.
# Threads that hold the GIL give it up after this long: with writers beside readers, the 99th
# percentile of reads halves against Python's default of 5 ms.
_SWITCH_INTERVAL_S = 0.0005


class Connections(Interface):
    """The connections of a server, on its event loop."""

    @property
    def connections(self) -> Collection[Protocol]: ...

    def adopt(self, sock: socket.socket, read: bytes) -> None:
        """Go on with a client's connection that was another process's.

        read: what that had read of it and not answered.
        """
        ...

    def finish(self) -> None:
        """Serve nothing more, and finish what runs."""
        ...


class Companion(Interface):
    """Another process that shares a server's connections, as this one sees it."""

    def begin(self, connections: Connections) -> None:
        """The server serves; on its event loop."""
        ...

    def end(self) -> None:
        """The server ends: connections neither come nor go any more. May come without `begin`."""
        ...


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, which tells when it serves and leaves signals to its owner."""

    def __init__(
        self, config: uvicorn.Config, on_listening: Callable[[], None], companion: Companion | None
    ) -> None:
        super().__init__(config)
        self._on_listening, self._companion = on_listening, companion
        self._adopting: set[asyncio.Task[Any]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            if self._companion is not None:
                self._companion.begin(self)
            self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._companion is not None:
            self._companion.end()
            # Or they would not be among those that are told.
            await asyncio.gather(*self._adopting, return_exceptions=True)
        await super().shutdown(sockets=sockets)

    @property
    def connections(self) -> Collection[Protocol]:
        return self.server_state.connections  # type: ignore[return-value]

    def adopt(self, sock: socket.socket, read: bytes) -> None:
        loop = asyncio.get_running_loop()

        def make() -> asyncio.Protocol:
            protocol: Any = self.config.http_protocol_class(  # As uvicorn does.
                config=self.config,  # type: ignore[call-arg]
                server_state=self.server_state,
                app_state=self.lifespan.state,
                _loop=loop,
            )
            protocol.read_before = read
            return protocol  # type: ignore[no-any-return]

        task = loop.create_task(loop.connect_accepted_socket(make, sock))
        self._adopting.add(task)
        task.add_done_callback(self._adopted)

    def _adopted(self, task: asyncio.Task[Any]) -> None:
        self._adopting.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.warning("a connection was lost between two processes: %s", task.exception())

    def finish(self) -> None:
        self.should_exit = True

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
        sock: socket.socket | None,
        *,
        on_ready: Callable[[str], None],
        log_level: str = "warning",
        drain_timeout_s: int = 30,
        companion: Companion | None = None,
        protocol: Callable[..., Protocol] = Protocol,
    ) -> None:
        """sock: None for one whose connections all come from its companion.

        on_ready: called with the server's URL once it accepts connections; without a socket never.
        drain_timeout_s: requests that still run this long after `stop` are cut off.
        """
        self._app, self._sock = app, sock
        config = app.frontend.config
        app.connections_max = connections_max(config.read_threads + config.write_threads)
        settings = uvicorn.Config(
            app,
            http=protocol,  # type: ignore[arg-type]
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
        self._uvicorn = _Uvicorn(
            settings, lambda: None if sock is None else on_ready(url_of(sock)), companion
        )

    def run(self) -> None:
        """Serve until `stop`; returns when all requests have been answered."""
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        gc.collect()
        gc.freeze()  # What was imported stays: collections need not look at it.
        try:
            self._uvicorn.run(sockets=[] if self._sock is None else [self._sock])
        finally:
            self._app.close()

    @property
    def is_cut_off(self) -> bool:
        """Whether it was told a second time to stop."""
        return bool(self._uvicorn.force_exit)

    def stop(self) -> None:
        """Accept nothing more and finish what runs. A second call cuts it off."""
        if self._uvicorn.should_exit:
            self._uvicorn.force_exit = True
        self._uvicorn.finish()


def serve(server: Server) -> None:
    """Serve in the main thread until SIGTERM or SIGINT; the second one cuts off what runs."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda *_: server.stop()) for number in numbers}
    try:
        server.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
