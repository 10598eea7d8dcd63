"""A connection leaves nothing behind; which requests are collected before they are looked at."""

from __future__ import annotations

import gc
import socket
import time
import weakref

import orjson
import pytest

from ochredb_frontend import server
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.protocol import Exchange, Protocol

from .live_server import ONE, Live, Starter


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


def _head(path: str, size_bytes: int, more: str = "") -> bytes:
    return (
        f"POST {path}/upsert HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{more}"
        f"content-length: {size_bytes}\r\n\r\n"
    ).encode()


def _collected(live: Live, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Will have the sizes of the bodies of requests that come whole."""
    sizes: list[int] = []

    def seen(exchange: Exchange) -> bool:
        sizes.append(len(exchange.body))
        return taken(exchange)

    taken = live.app.exchange
    monkeypatch.setattr(live.app, "exchange", seen)
    return sizes


@pytest.mark.parametrize(("size_bytes", "whole"), [(300_000, True), (1_200_000, False)])
def test_a_body_that_comes_in_pieces_is_collected_up_to_a_megabyte(
    size_bytes: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = Starter()()
    collected = _collected(live, monkeypatch)
    try:
        path = live.collection()
        collected.clear()
        body = orjson.dumps({**ONE, "documents": ["d" * size_bytes]})
        with socket.create_connection(live.address) as sock:
            sock.settimeout(10)
            sock.sendall(_head(path, len(body)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start in range(100):  # Tiny ones, and then larger.
                sock.sendall(body[start : start + 1])
            for start in range(100, len(body), 70_000):
                sock.sendall(body[start : start + 70_000])
                time.sleep(0.005)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        assert collected == ([len(body)] if whole else [])
        found = live.http.post(f"{path}/get", json={"ids": ["a"]}).json()
        assert found["documents"] == ["d" * size_bytes]
    finally:
        live.close()


def test_a_large_body_of_a_stranger_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    live = Starter()(FrontendConfig(token="s3cret"))
    collected = _collected(live, monkeypatch)
    try:
        path = "/api/v2/tenants/t/databases/d/collections/00000000-0000-4000-8000-000000000000"
        with socket.create_connection(live.address) as sock:
            sock.settimeout(5)
            sock.sendall(_head(path, 300_000))
            assert sock.recv(65536).startswith(b"HTTP/1.1 401")
        assert collected == []
        body = orjson.dumps({**ONE, "documents": ["d" * 300_000]})
        with socket.create_connection(live.address) as sock:
            sock.settimeout(5)
            sock.sendall(_head(path, len(body), "x-chroma-token: s3cret\r\n") + body)
            assert sock.recv(65536).startswith(b"HTTP/1.1 404")
        assert collected == [len(body)]
    finally:
        live.close()
