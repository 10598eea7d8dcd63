"""What a server and one of its reader processes say to each other, connections among it.

A Unix socket that keeps messages apart: the first byte says what a message is. A client's
connection travels as its descriptor, together with what was read of it and not yet answered.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable

# Kinds of messages.
CONNECTION = b"c"  # A descriptor, and the last of the bytes that were read of it.
BYTES = b"d"  # Bytes of the connection that comes next, before those.
OPEN = b"o"  # To a reader, once: JSON of the ids of collections to open before connections come.
GIVE_BACK = b"b"  # To a reader: give back so many connections, or for good every one.
REPORT = b"r"  # From a reader: JSON of what it did since the last one.
APPENDED = b"a"  # To a reader: a collection's id, a space, the last offset of its log.
DAMAGED = b"m"  # From a reader: the id of a part that it found damaged.

IS_POSSIBLE = sys.platform == "linux"  # Elsewhere no socket keeps messages apart and tells of ends.
_BYTES_MAX = 64 << 10  # Of one message.
_HEAD_BYTES = 1


class Channel:
    """One end. All of it belongs to an event loop, but for `tell`.

    takes: whether connections should still be sent there.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._read = b""  # Of the connection that comes next.
        self._waiting: deque[tuple[bytes, int | None]] = deque()
        self._on_connection: Callable[[socket.socket, bytes], None] | None = None
        self._on_message: Callable[[bytes, bytes], None] | None = None
        self._on_end: Callable[[], None] | None = None
        self._lock = threading.Lock()  # The descriptor is not closed while another thread sends.
        self.takes, self.is_closed = True, False

    def attach(
        self,
        on_connection: Callable[[socket.socket, bytes], None],
        on_message: Callable[[bytes, bytes], None],
        on_end: Callable[[], None],
    ) -> None:
        """Listen from now on; on the event loop that runs.

        on_connection: told of a client's socket, and of what was read of it. on_message: of a kind
        and what follows. on_end: once, that the other process is gone or wants nothing more.
        """
        self._on_connection, self._on_message, self._on_end = on_connection, on_message, on_end
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._sock.fileno(), self._receive)

    def tell(self, kind: bytes, data: bytes = b"") -> bool:
        """Say something now, from any thread; False if the other end does not keep up, or is gone.

        data: 64 KiB at most.
        """
        with self._lock:
            try:
                self._sock.send(kind + data)
            except OSError:  # Closed, for one.
                return False
        return True

    def send(self, kind: bytes, data: bytes = b"") -> None:
        """Say something as soon as there is room for it."""
        self._put(kind + data, None)

    def send_connection(self, descriptor: int, read: bytes) -> None:
        """Give a client's connection away. The caller closes its own descriptor of it.

        read: what was read of the connection and not yet answered. Raises OSError if there is no
        descriptor left; then nothing has happened.
        """
        descriptor = os.dup(descriptor)
        while len(read) > _BYTES_MAX:
            self._put(BYTES + read[:_BYTES_MAX], None)
            read = read[_BYTES_MAX:]
        self._put(CONNECTION + read, descriptor)

    def close(self) -> None:
        """Say that there is nothing more. What waits to be sent is lost. Idempotent."""
        if self.is_closed:
            return
        self.takes, self.is_closed = False, True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
        for _, descriptor in self._waiting:
            if descriptor is not None:
                os.close(descriptor)
        self._waiting.clear()
        with self._lock:
            self._sock.close()

    def _put(self, message: bytes, descriptor: int | None) -> None:
        if self.is_closed:
            if descriptor is not None:
                os.close(descriptor)
            return
        self._waiting.append((message, descriptor))
        if len(self._waiting) == 1:
            self._send()

    def _send(self) -> None:
        while self._waiting:
            message, descriptor = self._waiting[0]
            descriptors = [] if descriptor is None else [descriptor]
            try:
                socket.send_fds(self._sock, [message], descriptors)
            except BlockingIOError:
                assert self._loop is not None
                self._loop.add_writer(self._sock.fileno(), self._send)
                return
            except OSError:
                # Gone, as will be read; or without memory: what follows would be misunderstood.
                assert self._loop is not None
                self._loop.call_soon(self._end)
                return
            self._waiting.popleft()
            if descriptor is not None:
                os.close(descriptor)
        if self._loop is not None:
            self._loop.remove_writer(self._sock.fileno())

    def _receive(self) -> None:
        assert self._on_connection and self._on_message and self._on_end
        while not self.is_closed:
            try:
                message, descriptors, _, _ = socket.recv_fds(
                    self._sock, _HEAD_BYTES + _BYTES_MAX, 1
                )
            except BlockingIOError:
                return
            except ConnectionResetError:  # It left something unread; what it sent is still there.
                continue
            except OSError:
                message, descriptors = b"", []
            if not message:
                self._finish()
                return
            kind, data = message[:_HEAD_BYTES], message[_HEAD_BYTES:]
            if kind == BYTES:
                self._read += data
            elif kind == CONNECTION:
                read, self._read = self._read + data, b""
                if descriptors:  # Or this process has too many: its client reads an end.
                    self._on_connection(socket.socket(fileno=descriptors[0]), read)
            else:
                self._on_message(kind, data)

    def _end(self) -> None:
        """Hear what was said before sending failed, and no more."""
        if not self.is_closed:
            self._receive()
        if not self.is_closed:
            self._finish()

    def _finish(self) -> None:
        assert self._on_end
        self.close()
        self._on_end()


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends' sockets."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
