"""A TCP proxy that makes a network worse: delay, silence, half-closed and reset connections.

What it does may be changed while it runs, and holds for open connections too. Several targets are
taken in turn, one for each connection, so that it is also the simplest of load balancers; one that
refuses is passed over.

    proxy = TcpProxy.start([("127.0.0.1", 5432)])
    proxy.delay_s = 0.2
    proxy.reset_after_bytes = 1000
    proxy.cut()
    proxy.stop()
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Self

_CHUNK_BYTES = 64 << 10
_LINGER_ZERO = struct.pack("ii", 1, 0)  # Closing then sends a reset.
Address = tuple[str, int]


class TcpProxy:
    """Runs in a thread of its own. Attributes that may be set at any time:

    delay_s: every chunk waits as long, in either direction; order is kept.
    silent: nothing is forwarded and nothing is closed: a black hole. New connections open.
    half_close: what a client sends is forwarded; then the target is told that no more will come.
    reset_after_bytes: a connection is reset once as many bytes went to its client; None: never.
    in_order: it is then not reset but closed, as if all had been said.
    refusing: new connections are reset at once.

    `counts` says what was done: connections, refused, resets, half_closes, bytes.
    """

    def __init__(self, targets: Sequence[Address], listener: socket.socket) -> None:
        self.host, self.port = listener.getsockname()[:2]
        self.targets = list(targets)
        self.delay_s = 0.0
        self.silent = self.half_close = self.refusing = self.in_order = False
        self.reset_after_bytes: int | None = None
        self.counts: Counter[str] = Counter()
        self._turns = itertools.count()
        self._listener = listener
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.Task[None]] = set()
        self._sockets: set[asyncio.StreamWriter] = set()
        self._stopped: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tcp-proxy-{self.port}")

    @classmethod
    def start(cls, targets: Sequence[Address], host: str = "127.0.0.1", port: int = 0) -> Self:
        proxy = cls(targets, socket.create_server((host, port)))
        proxy._thread.start()
        proxy._ready.wait()
        return proxy

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def heal(self) -> None:
        """Forward as any proxy does. What was lost is not made good: see `cut`."""
        self.delay_s, self.reset_after_bytes = 0.0, None
        self.silent = self.half_close = self.refusing = self.in_order = False

    def cut(self) -> None:
        """Reset every open connection, on both sides."""
        self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for writer in list(self._sockets):
            self._reset(writer)

    def stop(self) -> None:
        """Idempotent; open connections are reset."""
        if self._thread.is_alive() and self._stopped is not None:
            self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._stopped = asyncio.Event()
        server = await asyncio.start_server(self._accepted, sock=self._listener)
        self._ready.set()
        await self._stopped.wait()
        server.close()
        self._cut()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        self._sockets.discard(writer)
        if self.in_order:
            writer.close()
            return
        sock: socket.socket | None = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        writer.transport.abort()

    async def _accepted(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.counts["connections"] += 1
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self._sockets.add(client)
        try:
            opened = None if self.refusing else await self._open_target()
            if opened is None:
                self.counts["refused"] += 1
                return
            target_reader, target = opened
            self._sockets.add(target)
            try:
                there = self._forward(reader, target, back=False)
                back = self._forward(target_reader, client, back=True)
                await asyncio.gather(there, back)
            finally:
                self._reset(target)
        except (OSError, asyncio.CancelledError):
            self.counts["resets"] += 1
        finally:
            self._reset(client)
            self._connections.discard(task)

    async def _open_target(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        first = next(self._turns)
        for number in range(len(self.targets)):
            host, port = self.targets[(first + number) % len(self.targets)]
            with contextlib.suppress(OSError):
                return await asyncio.open_connection(host, port)
        return None

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, back: bool
    ) -> None:
        """One direction, until its end. Raises ConnectionResetError to end both."""
        sent = 0
        while data := await reader.read(_CHUNK_BYTES):
            if self.delay_s > 0:
                await asyncio.sleep(self.delay_s)
            while self.silent:
                await asyncio.sleep(0.01)
            limit = self.reset_after_bytes
            if back and limit is not None and sent + len(data) >= limit:
                writer.write(data[: max(0, limit - sent)])
                with contextlib.suppress(OSError):
                    await writer.drain()
                raise ConnectionResetError("as many bytes as are allowed went back")
            writer.write(data)
            await writer.drain()
            sent += len(data)
            self.counts["bytes"] += len(data)
            if self.half_close and not back:
                self.counts["half_closes"] += 1
                break
        while self.silent:
            await asyncio.sleep(0.01)
        if writer.can_write_eof():
            with contextlib.suppress(OSError):
                writer.write_eof()
