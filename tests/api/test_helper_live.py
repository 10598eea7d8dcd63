"""Beside reads a server folds in another process, which comes late and goes in every way."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import ochredb
from ochredb.clock import SystemClock
from ochredb.integrity import check
from ochredb.testing.server_process import ServerProcess, ochredb_server

ROWS = 2_000  # Of a request; a tail of four is due.


class Load:
    """Writes large requests, and reads after each that it sees what it wrote."""

    def __init__(self, server: ServerProcess) -> None:
        self.client = ochredb.HttpClient(port=server.port)
        self.collection = self.client.create_collection("written")
        self.written = 0

    def go_on(self, until: Callable[[], bool], timeout_s: float = 60.0) -> None:
        clock = SystemClock()
        deadline_s = clock.monotonic_s() + timeout_s
        while not until():
            assert clock.monotonic_s() < deadline_s, "not in time"
            ids = [f"id-{self.written + i:06}" for i in range(ROWS)]
            self.collection.add(ids=ids, embeddings=[[float(self.written), 1.0]] * ROWS)
            self.written += ROWS
            assert self.collection.count() == self.written
            found = self.collection.get(ids=[ids[0], ids[-1]])
            assert found["ids"] == [ids[0], ids[-1]]


def children(server: ServerProcess) -> list[psutil.Process]:
    return list(psutil.Process(server.pid).children())


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    pause, clock = threading.Event(), SystemClock()
    deadline_s = clock.monotonic_s() + timeout_s
    while not condition():
        assert clock.monotonic_s() < deadline_s, "not in time"
        pause.wait(0.05)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ochredb_server(tmp_path / "data") as server:
        yield server


def indexed(load: Load) -> int:
    """How many operations are in parts that need no more merges."""
    return int(load.collection.get_indexing_status().num_indexed_ops)


def test_it_folds_is_replaced_when_killed_and_ends_with_its_server(
    server: ServerProcess, tmp_path: Path
) -> None:
    assert not children(server), "not before there is work"
    load = Load(server)
    load.go_on(lambda: bool(children(server)))
    (first,) = children(server)
    load.go_on(lambda: indexed(load) > 0)
    first.kill()
    before = load.written
    load.go_on(lambda: any(child.pid != first.pid for child in children(server)))
    load.go_on(lambda: indexed(load) > before)
    last = children(server)
    assert server.stop() == 0
    assert not any(child.is_running() for child in last)
    report = check(str(tmp_path / "data"))
    assert not report.is_damaged
    with ochredb.PersistentClient(path=str(tmp_path / "data")) as client:
        assert client.get_collection("written").count() == load.written


def test_it_ends_when_its_server_is_killed(tmp_path: Path) -> None:
    server = ochredb_server(tmp_path / "data").start()
    load = Load(server)
    load.go_on(lambda: bool(children(server)))
    (child,) = children(server)
    os.kill(server.pid, signal.SIGKILL)
    with contextlib.suppress(psutil.NoSuchProcess):
        child.wait(30)
    assert not child.is_running()
    server.kill()
    with ochredb.PersistentClient(path=str(tmp_path / "data")) as client:
        assert client.get_collection("written").count() == load.written


def test_it_goes_when_nothing_is_written(server: ServerProcess) -> None:
    load = Load(server)
    load.go_on(lambda: bool(children(server)))
    until(lambda: not children(server), timeout_s=60)
    assert load.collection.count() == load.written
