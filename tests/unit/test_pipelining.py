"""Requests sent before the answers to earlier ones: all are answered, in order."""

from __future__ import annotations

import re
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from ochredb.testing.server_process import ochredb_server
from ochredb_node.node import Node, NodeConfig

from .live_server import Live

_ROOT = "/api/v2/tenants/default_tenant/databases/default_database/collections"


def _request(method: str, path: str, body: str = "") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()


def _statuses(address: tuple[str, int], data: bytes, count: int) -> list[int]:
    with socket.create_connection(address) as sock:
        sock.settimeout(10.0)
        sock.sendall(data)
        answer = b""
        while len(re.findall(rb"HTTP/1.1 \d", answer)) < count:
            chunk = sock.recv(65536)
            assert chunk, "closed before every request was answered"
            answer += chunk
        return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", answer)]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_pipelined_requests_are_all_answered(tmp_path: Path, count: int) -> None:
    """The last of them used to wait for a next one."""
    with ochredb_server(tmp_path / "data") as server:
        address = ("127.0.0.1", server.port)
        heartbeat = _request("GET", "/api/v2/heartbeat")
        create = _request("POST", _ROOT, '{"name": "pipelined", "get_or_create": true}')
        assert _statuses(address, heartbeat * count, count) == [200] * count
        # The first is answered by another thread while the others wait.
        assert _statuses(address, create * count, count) == [200] * count
        mixed = (heartbeat + create) * count
        assert _statuses(address, mixed, 2 * count) == [200] * (2 * count)
        # In pieces that end within a head and within a body.
        with socket.create_connection(address) as sock:
            sock.settimeout(10.0)
            for start in range(0, len(mixed), 97):
                sock.sendall(mixed[start : start + 97])
            answer = b""
            while answer.count(b"HTTP/1.1 200") < 2 * count:
                answer += sock.recv(65536)


def test_reads_of_both_ways_are_answered_in_order(tmp_path: Path) -> None:
    """Small reads go a shorter way; behind another request, or in chunks, they go the usual one."""
    with ochredb_server(tmp_path / "data") as server:
        address = ("127.0.0.1", server.port)
        made = httpx.post(server.url + _ROOT, json={"name": "reads"}).json()
        path = f"{_ROOT}/{made['id']}"
        rows = {"ids": ["a", "b"], "embeddings": [[1, 2], [3, 4]]}
        assert httpx.post(server.url + path + "/add", json=rows).status_code == 201
        count = _request("GET", path + "/count")
        query = _request("POST", path + "/query", '{"query_embeddings": [[1, 2]]}')
        wrong = _request("POST", path + "/query", '{"query_embeddings": 1}')
        head = query.partition(b"content-length")[0] + b"transfer-encoding: chunked\r\n\r\n"
        body = b'{"query_embeddings": [[3, 4]]}'
        chunked = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        some = [count, query, wrong, chunked, query, count, chunked, wrong]
        assert _statuses(address, b"".join(some), 8) == [200, 200, 422, 200, 200, 200, 200, 422]
        for one in (count, query, chunked):
            assert _statuses(address, one, 1) == [200]
        close = query.replace(b"host: x", b"host: x\r\nconnection: close")
        with socket.create_connection(address) as sock:
            sock.settimeout(10.0)
            sock.sendall(close + _request("POST", path + "/delete", '{"ids": ["a", "b"]}'))
            answer = b""
            while chunk := sock.recv(65536):
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer
        assert answer.endswith(b"}")
        left = httpx.get(server.url + path + "/count").json()
        assert left == 2, "what comes behind the last request of a connection is not done"


def test_an_offer_of_another_protocol_is_declined_and_the_body_is_kept(tmp_path: Path) -> None:
    """Java's HttpClient offers HTTP/2 with its first request: the body used to be lost."""
    offer = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQ\r\n"

    def offering(request: bytes, more: str = "") -> bytes:
        return request.replace(b"host: x\r\n", f"host: x\r\n{offer}{more}".encode())

    with ochredb_server(tmp_path / "data") as server:
        address = ("127.0.0.1", server.port)
        create = _request("POST", _ROOT, '{"name": "offered"}')
        assert _statuses(address, offering(create), 1) == [200]
        get = _request("GET", f"{_ROOT}/offered")
        mixed = [get, offering(get), offering(create), create, offering(get), get]
        assert _statuses(address, b"".join(mixed), 6) == [200, 200, 409, 409, 200, 200]
        assert _statuses(address, offering(get) * 500, 500) == [200] * 500
        body = b'{"name": "in-chunks"}'
        head = create.partition(b"content-length")[0] + b"transfer-encoding: chunked\r\n\r\n"
        chunked = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        assert _statuses(address, offering(chunked), 1) == [200]
        with socket.create_connection(address) as sock:  # In pieces.
            sock.settimeout(10.0)
            slowly = offering(create.replace(b"offered", b"slowest"))
            for start in range(0, len(slowly), 7):
                sock.sendall(slowly[start : start + 7])
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        assert httpx.get(f"{server.url}{_ROOT}/in-chunks").status_code == 200


def test_one_connection_does_not_hold_the_loop() -> None:
    """A few of its requests are answered, then those of others, then more of its own."""
    node = Node(NodeConfig())
    node.start()
    live = Live(node.frontend)
    order: list[str] = []
    observe = live.app.metrics.observe

    def observed(operation: str, status: int, duration_s: float) -> None:
        order.append(operation)
        observe(operation, status, duration_s)

    live.app.metrics.observe = observed  # type: ignore[method-assign]
    try:
        path = live.collection()
        assert live.http.get(f"{path}/count").json() == 1  # From now on it is quick.
        count, heartbeat = _request("GET", path + "/count"), _request("GET", "/api/v2/heartbeat")
        with (
            socket.create_connection(live.address) as many,
            socket.create_connection(live.address) as one,
        ):
            for sock in (many, one):
                sock.settimeout(30.0)
                sock.sendall(heartbeat)
                assert sock.recv(65536)
            held, let_go = threading.Event(), threading.Event()

            def hold() -> None:
                held.set()
                assert let_go.wait(30)

            loop = next(iter(live.server._uvicorn.server_state.connections)).loop
            loop.call_soon_threadsafe(hold)
            assert held.wait(30)
            order.clear()  # An operation is noted when it has been answered.
            many.sendall(count * 300)
            one.sendall(heartbeat)
            let_go.set()
            assert one.recv(65536)
            answer = b""
            while answer.count(b"HTTP/1.1 200") < 300:
                answer += many.recv(65536)
        deadline_s = time.monotonic() + 30
        while len(order) < 301 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert len(order) == 301
        assert order.index("heartbeat") < 100
    finally:
        live.close()
        node.close()
