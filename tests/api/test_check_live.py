"""A real server checks its own store when it is asked to, while it is written to."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import orjson
import pytest

import ochredb
from ochredb.errors import Unauthenticated
from ochredb.integrity import Report, check
from ochredb.testing.server_process import ServerProcess, ochredb_server

TOKEN = "not-for-strangers"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def _write(server: ServerProcess, stop: threading.Event, failures: list[BaseException]) -> None:
    try:
        client = ochredb.HttpClient(port=server.port, headers=HEADERS)
        collection = client.create_collection("written")
        number = 0
        while not stop.is_set():
            ids = [f"id-{number + i}" for i in range(200)]
            collection.add(ids=ids, embeddings=[[float(number), 1.0, 2.0]] * 200, documents=ids)
            number += 200
    except BaseException as error:
        failures.append(error)


def _command(url: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ochredb_node.cli", "check", url, "--json"],
        env={**os.environ, **environ}, check=False, text=True, capture_output=True,
    )  # fmt: skip


def test_a_server_is_checked_under_writes_and_lets_nobody_in_without_its_token(
    tmp_path: Path,
) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []
    with ochredb_server(tmp_path / "data", "--token", TOKEN) as server:
        writer = threading.Thread(target=_write, args=(server, stop, failures))
        writer.start()
        try:
            reports: list[Report] = [check(server.url, headers=HEADERS) for _ in range(5)]
            done = _command(server.url, OCHREDB_TOKEN=TOKEN)
            with pytest.raises(Unauthenticated):
                check(server.url)
            assert _command(server.url).returncode == 1
        finally:
            stop.set()
            writer.join()
        assert not failures
        assert not any(report.is_damaged for report in reports), reports
        assert done.returncode == 0, done.stderr
        assert not orjson.loads(done.stdout)["is_damaged"]
    assert not check(str(tmp_path / "data")).is_damaged
