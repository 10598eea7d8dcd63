"""A connection leaves nothing behind: cycles are collected late."""

from __future__ import annotations

import gc
import socket
import time
import weakref

import pytest

from ochredb_frontend import server
from ochredb_frontend.protocol import Protocol

from .live_server import Starter


def test_a_connection_that_ended_is_freed_by_its_reference_count() -> None:
    starter = Starter()
    live = starter()
    try:
        path = live.collection()
        with socket.create_connection(live.address) as sock:
            sock.sendall(f"GET {path}/count HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
            connections = list(live.server._uvicorn.server_state.connections)
            port = sock.getsockname()[1]
            ours = [one for one in connections if isinstance(one, Protocol)]
            (mine,) = [one for one in ours if one.client and one.client[1] == port]
            gone = weakref.ref(mine)
            del connections, ours, mine
            gc.collect()
            gc.disable()
        end = time.monotonic() + 5
        while gone() is not None and time.monotonic() < end:
            time.sleep(0.01)
        assert gone() is None
    finally:
        gc.enable()
        live.close()


def test_a_connection_is_closed_when_nothing_comes_for_some_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.5)
    live = Starter()()
    try:
        path = live.collection()
        head = f"POST {path}/get HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        count = f"GET {path}/count HTTP/1.1\r\nhost: x\r\n\r\n".encode()
        with socket.create_connection(live.address) as sock:
            sock.settimeout(5)
            for _ in range(4):  # A request in time keeps it.
                sock.sendall(count)
                assert sock.recv(65536).startswith(b"HTTP/1.1 200")
                time.sleep(0.3)
            sock.sendall(f"{head}content-length: 2\r\n\r\n".encode())
            time.sleep(0.9)  # One that is on its way keeps it, too.
            sock.sendall(b"{}")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
            answered_s = time.monotonic()
            assert sock.recv(65536) == b""
            assert 0.4 < time.monotonic() - answered_s < 3
    finally:
        live.close()
