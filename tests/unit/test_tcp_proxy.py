"""The proxy that makes a network worse: what it says it does, it does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.components.tcp_proxy import TcpProxy


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that sends back what it gets, and "end" when no more comes."""
    listener = socket.create_server(("127.0.0.1", 0))
    opened: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        try:
            while data := connection.recv(1 << 16):
                connection.sendall(data)
            connection.sendall(b"end")
        except OSError:
            pass
        finally:
            connection.close()

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            opened.append(connection)
            threads.append(threading.Thread(target=serve, args=(connection,)))
            threads[-1].start()

    threads = [threading.Thread(target=accept)]
    threads[0].start()
    yield listener.getsockname()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for thread in threads:
        thread.join(10)


@pytest.fixture
def proxy(echo: tuple[str, int]) -> Iterator[TcpProxy]:
    started = TcpProxy.start([echo])
    yield started
    started.stop()


def connected(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=10)


def exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := connection.recv(count - len(data))):
        data += more
    return data


def test_bytes_go_both_ways(proxy: TcpProxy) -> None:
    sent = bytes(range(256)) * 4000
    with connected(proxy) as client:
        sender = threading.Thread(target=client.sendall, args=(sent,))
        sender.start()
        assert exactly(client, len(sent)) == sent
        sender.join()
        client.shutdown(socket.SHUT_WR)
        assert exactly(client, 4) == b"end"
    assert proxy.counts["connections"] == 1
    assert proxy.counts["resets"] == 0


def test_delay_holds_in_both_directions(proxy: TcpProxy) -> None:
    proxy.delay_s = 0.1
    with connected(proxy) as client:
        begun_s = time.monotonic()
        client.sendall(b"x")
        assert exactly(client, 1) == b"x"
        assert time.monotonic() - begun_s >= 0.2


def test_a_connection_is_reset_after_so_many_bytes(proxy: TcpProxy) -> None:
    proxy.reset_after_bytes = 10
    with connected(proxy) as client:
        client.sendall(b"12345")
        assert exactly(client, 5) == b"12345"
        client.sendall(b"6789012345")
        with pytest.raises(ConnectionResetError):
            exactly(client, 100)
    assert proxy.counts["resets"] == 1
    proxy.heal()
    with connected(proxy) as client:
        client.sendall(b"12345678901")
        assert exactly(client, 11) == b"12345678901"


def test_a_half_closed_connection_still_answers(proxy: TcpProxy) -> None:
    proxy.half_close = True
    with connected(proxy) as client:
        client.sendall(b"x")
        assert exactly(client, 4) == b"xend"
    assert proxy.counts["half_closes"] == 1


def test_silence_keeps_connections_open(proxy: TcpProxy) -> None:
    with connected(proxy) as client:
        proxy.silent = True
        client.sendall(b"x")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        proxy.heal()
        client.settimeout(10)
        assert exactly(client, 1) == b"x"


def test_cut_resets_what_is_open(proxy: TcpProxy) -> None:
    with connected(proxy) as client:
        client.sendall(b"x")
        assert exactly(client, 1) == b"x"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_new_connections_are_refused(proxy: TcpProxy) -> None:
    proxy.refusing = True
    with pytest.raises(ConnectionResetError), connected(proxy) as client:  # Perhaps at once.
        client.recv(1)
    assert proxy.counts["refused"] == 1


def test_targets_take_turns_and_dead_ones_are_passed_over(echo: tuple[str, int]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        proxy = TcpProxy.start([closed.getsockname(), echo])
        try:
            for _ in range(4):
                with connected(proxy) as client:
                    client.sendall(b"x")
                    assert exactly(client, 1) == b"x"
        finally:
            proxy.stop()
    with pytest.raises(ConnectionRefusedError):
        connected(proxy)
