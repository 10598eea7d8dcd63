"""The small HTTP listener of each process of a cluster."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest

from ochredb.metrics import Metrics
from ochredb_frontend.server import listen, url_of
from ochredb_node.health import HealthListener


class Served:
    def __init__(self) -> None:
        self.ready = True
        self.metrics = Metrics()
        self.sock = listen("127.0.0.1", 0)
        self.url = url_of(self.sock)
        self.listener = HealthListener(
            self.sock, is_ready=lambda: self.ready, metrics=self.metrics.text
        )
        self.listener.start()

    def get(self, path: str) -> httpx.Response:
        with httpx.Client(trust_env=False) as http:
            return http.get(self.url + path)


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served()
    yield one
    one.listener.stop()


def test_what_it_answers(served: Served) -> None:
    served.metrics.gauge("ochredb_some", "Some.", lambda: 5)
    assert [served.get(path).status_code for path in ("/healthz", "/readyz?x=1")] == [200, 200]
    served.ready = False
    assert [served.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 503]
    page = served.get("/metrics")
    assert page.headers["content-type"] == "text/plain; version=0.0.4"
    assert "ochredb_some 5" in page.text
    assert served.get("/other").status_code == 404
    with httpx.Client(trust_env=False) as http:
        assert http.post(served.url + "/healthz").status_code == 501


def test_idle_clients_do_not_keep_a_probe_out(served: Served) -> None:
    address = served.sock.getsockname()
    idle = [socket.create_connection(address) for _ in range(15)]
    assert served.get("/healthz").status_code == 200
    idle += [socket.create_connection(address) for _ in range(5)]
    idle[-1].settimeout(5)
    assert idle[-1].recv(1) == b"", "beyond the limit they are closed"
    for one in idle:
        one.close()


def test_it_stops_with_clients_connected() -> None:
    one = Served()
    with socket.create_connection(one.sock.getsockname()):
        one.listener.stop()
    with pytest.raises(httpx.ConnectError):
        one.get("/healthz")


def test_a_page_that_fails_closes_only_its_connection(served: Served) -> None:
    def fail() -> float:
        raise RuntimeError

    served.metrics.gauge("ochredb_broken", "Broken.", fail)
    with pytest.raises(httpx.RemoteProtocolError):
        served.get("/metrics")
    assert served.get("/healthz").status_code == 200
