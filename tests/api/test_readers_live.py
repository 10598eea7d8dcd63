"""A server under reads shares them with another process: same answers, every write seen at once."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ochredb.clock import SystemClock
from ochredb.testing.server_process import HOST, ServerProcess, free_port

ROOT = "/api/v2/tenants/default_tenant/databases/default_database/collections"
TOKEN = "only-for-this-test"
ROWS, DIMENSION, CLIENTS = 3_000, 16, 6
RNG = random.Random(7)
VECTORS = [[RNG.gauss(0, 1) for _ in range(DIMENSION)] for _ in range(ROWS)]


class Client:
    """One kept connection. Counts what was answered."""

    def __init__(self, port: int, token: str = TOKEN) -> None:
        self.connection = http.client.HTTPConnection(HOST, port, timeout=30)
        self.headers = {"content-type": "application/json", "authorization": f"Bearer {token}"}
        self.answered = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def call(self, method: str, path: str, value: Any = None) -> tuple[int, Any]:
        body = None if value is None else json.dumps(value)
        self.connection.request(method, path, body, self.headers)
        answer = self.connection.getresponse()
        status, content = answer.status, answer.read()
        self.answered += 1
        return status, json.loads(content)

    def ok(self, method: str, path: str, value: Any = None) -> Any:
        status, answer = self.call(method, path, value)
        assert status in (200, 201), (status, answer)
        return answer


class Crowd:
    """Clients that read, and now and then write, over one connection each, and check all of it."""

    def __init__(self, port: int, path: str) -> None:
        self.port, self.path = port, path
        self.stopping = threading.Event()
        self.problems: list[BaseException] = []
        self.answered = self.lost = 0
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._guarded, args=(number,)) for number in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.stopping.set()
        for thread in self._threads:
            thread.join()
        if kind is None:
            assert self.problems == []

    def _guarded(self, number: int) -> None:
        try:
            self._work(number)
        except BaseException as error:
            self.problems.append(error)

    def _work(self, number: int) -> None:
        with Client(self.port) as client:
            self._use(client, random.Random(number), f"mine-{number}")
        with self._lock:
            self.answered += client.answered

    def _use(self, client: Client, rng: random.Random, mine: str) -> None:
        version = 0
        while not self.stopping.is_set():
            try:
                version += 1
                row = {"ids": [mine], "embeddings": [VECTORS[0]], "documents": [f"v{version}"]}
                client.ok("POST", f"{self.path}/upsert", row)
                for _ in range(rng.choice([1, 20, 40])):
                    found = client.ok("POST", f"{self.path}/get", {"ids": [mine]})
                    assert found["documents"] == [f"v{version}"], "a read sees every write"
                    row_number = rng.randrange(1, ROWS)
                    asked = {"query_embeddings": [VECTORS[row_number]], "n_results": 3}
                    nearest = client.ok("POST", f"{self.path}/query", asked)
                    assert nearest["ids"][0][0] == f"id-{row_number}"
                    assert client.ok("GET", f"{self.path}/count") >= ROWS
                    assert client.call("POST", f"{self.path}/query", {})[0] == 422
            except (OSError, http.client.HTTPException):  # The process that it was with is gone.
                self.lost += 1
                client.connection.close()
                self.stopping.wait(0.05)


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    pause, clock = threading.Event(), SystemClock()
    deadline_s = clock.monotonic_s() + timeout_s
    while not condition():
        assert clock.monotonic_s() < deadline_s, "not in time"
        pause.wait(0.05)


def readers(server: ServerProcess) -> list[psutil.Process]:
    """Children that are no compactor's workers."""
    found = []
    for child in psutil.Process(server.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "OCHREDB_READER_CHANNEL" in child.environ():
                found.append(child)
    return found


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def figure(client: Client, name: str) -> int:
    client.connection.request("GET", "/metrics", headers=client.headers)
    text = client.connection.getresponse().read().decode()
    return sum(int(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\d+)$", text, re.M))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    port = free_port()
    script = str(Path(__file__).with_name("sharing_server.py"))
    command = [sys.executable, script, "run", "--port", str(port), "--path", str(tmp_path / "data")]
    process = ServerProcess(
        command, port, tmp_path / "server.log", environment={"OCHREDB_TOKEN": TOKEN}
    )
    with process:
        yield process


@pytest.fixture
def path(server: ServerProcess) -> str:
    """Of a collection with all rows."""
    with Client(server.port) as client:
        made = client.ok("POST", ROOT, {"name": "shared"})
        rows = {"ids": [f"id-{i}" for i in range(ROWS)], "embeddings": VECTORS}
        client.ok("POST", f"{ROOT}/{made['id']}/add", rows)
    return f"{ROOT}/{made['id']}"


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.port) as client:
        yield client


def test_readers_answer_as_the_server_does_and_end_with_it(
    server: ServerProcess, path: str, client: Client
) -> None:
    assert figure(client, "ochredb_reader_processes") == 0
    before = figure(client, "ochredb_requests_total")
    with Crowd(server.port, path) as crowd:
        until(lambda: figure(client, "ochredb_reader_connections") > 1)
        until(lambda: len(readers(server)) == 1)
        threading.Event().wait(2.0)
    assert crowd.lost == 0, "connections move without their clients' knowing"
    # What the reader answered is told within a second; the rest are these looks themselves.
    until(lambda: figure(client, "ochredb_requests_total") - before >= crowd.answered)
    (reader,) = readers(server)
    assert server.stop() == 0
    assert not reader.is_running()
    assert "killed" not in server.output_tail()


def test_a_connection_with_a_reader_needs_the_token_for_each_request(
    server: ServerProcess, path: str, client: Client
) -> None:
    with Crowd(server.port, path), Client(server.port) as other:
        until(lambda: figure(client, "ochredb_reader_connections") > 0)
        (reader,) = readers(server)

        def is_with_reader() -> bool:
            for _ in range(20):
                other.ok("POST", f"{path}/get", {"limit": 1})
            own = other.connection.sock.getsockname()
            return any(one.raddr == own for one in reader.net_connections("tcp"))

        until(is_with_reader)
        other.headers["authorization"] = "Bearer wrong"
        assert other.call("POST", f"{path}/get", {"limit": 1})[0] == 401
        assert other.call("POST", f"{path}/delete", {"ids": ["id-1"]})[0] == 401
    assert client.ok("POST", f"{path}/get", {"ids": ["id-1"]})["ids"] == ["id-1"]


def test_a_killed_reader_is_replaced_and_a_killed_server_takes_it_along(
    server: ServerProcess, path: str, client: Client
) -> None:
    with Crowd(server.port, path) as crowd:
        until(lambda: figure(client, "ochredb_reader_connections") > 0)
        (first,) = readers(server)
        first.send_signal(signal.SIGKILL)
        until(lambda: any(other.pid != first.pid for other in readers(server)))
        until(lambda: figure(client, "ochredb_reader_connections") > 0)
    assert crowd.lost > 0
    (second,) = readers(server)
    server.kill()
    until(lambda: not is_alive(second), 10.0)
