"""Serving the application over HTTP: uvicorn with little work per request, and a clean end."""

from __future__ import annotations

import contextlib
import gc
import signal
import socket
import sys
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from ochredb_frontend.app import App

KEEP_ALIVE_S = 65  # Longer than the 40 s for which clients keep connections.
_BACKLOG = 2048
_HEAD_BYTES_MAX = 64 << 10  # Request line and headers, beyond what arrived with them.
_SMALL_BODY_BYTES = 64 << 10
_ONE_WRITE_BYTES_MAX = 64 << 10
_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n"
    b"connection: close\r\n\r\n"
)
# Threads that hold the GIL give it up after this long: with writers beside readers, the 99th
# percentile of reads halves against Python's default of 5 ms.
_SWITCH_INTERVAL_S = 0.0005


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol, with a bound for heads, which it would buffer without end.

    It also takes the shortest way for what is most of the work, small requests with small answers:
    a request that is complete is begun at once, not in a task of the loop's next turn, and an
    answer's head and body leave in one write, so that the client wakes up once.
    """

    _in_head = True
    _head_bytes = 0
    _at_head = False  # Within the parser's call at the end of a head.
    _begun: tuple[RequestResponseCycle, Any] | None = None  # Waits for its last byte.

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES_MAX + len(data):
                self.transport.write(_HEAD_TOO_LARGE)
                self.transport.close()
                return
        super().data_received(data)
        if self._begun is not None and not self._begun[0].more_body:
            (cycle, app), self._begun = self._begun, None
            self._run_at_once(cycle, app)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes, self._at_head = False, 0, True
        try:
            super().on_headers_complete()
        finally:
            self._at_head = False

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        scope: dict[str, Any] = cycle.scope  # type: ignore[assignment]  # It may have more keys.
        scope["ochredb.respond"] = partial(_respond, cycle)
        # A pipelined request's turn comes later, with its body complete: it takes the usual way.
        limit = min(_SMALL_BODY_BYTES, self.app.body_bytes_max)
        if self._at_head and _is_small(cycle, limit):
            self._begun = cycle, app
        else:
            super()._start_asgi_task(cycle, app)

    def _run_at_once(self, cycle: RequestResponseCycle, app: Any) -> None:
        running = cycle.run_asgi(app)
        try:
            waiting = running.send(None)
        except StopIteration:
            return  # Answered already, as most are.
        task = self.loop.create_task(_go_on(running, waiting))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)


def _is_small(cycle: RequestResponseCycle, body_bytes_max: int) -> bool:
    """Whether a request's body, if it has one, is small and simply sent."""
    if cycle.waiting_for_100_continue:
        return False
    for name, value in cycle.scope["headers"]:
        if name == b"content-length":
            return len(value) < 10 and value.isdigit() and int(value) <= body_bytes_max
        if name == b"transfer-encoding":
            return False
    return True


async def _go_on(running: Coroutine[Any, Any, None], waiting: Any) -> None:
    """The rest of a coroutine that was begun and waits for `waiting`."""
    await _rest(running, waiting)


@types.coroutine
def _rest(running: Coroutine[Any, Any, None], waiting: Any) -> Generator[Any, Any, None]:
    while True:
        try:
            sent = yield waiting
        except BaseException as error:
            advance = partial(running.throw, error)
        else:
            advance = partial(running.send, sent)
        try:
            waiting = advance()
        except StopIteration:
            return


def _respond(cycle: RequestResponseCycle, status: int, head: bytes, body: bytes) -> bool:
    """Write a whole answer at once; False if it must go the long way: large, or a slow client.

    head: complete header lines, content-length among them.
    """
    if cycle.flow.write_paused or len(body) > _ONE_WRITE_BYTES_MAX:
        return False
    if cycle.disconnected:
        return True  # Nobody reads it.
    lines = [STATUS_LINE[status]]
    for name, value in cycle.default_headers:
        lines += (name, b": ", value, b"\r\n")
    if not cycle.keep_alive:
        lines.append(b"connection: close\r\n")
    cycle.response_started = True
    cycle.waiting_for_100_continue = False
    cycle.transport.write(b"".join((*lines, head, b"\r\n", body)))
    cycle.response_complete = True
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
    return True


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
        config = uvicorn.Config(
            app,
            http=_Protocol,
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
        self._uvicorn = _Uvicorn(config, lambda: on_ready(url_of(sock)))

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
