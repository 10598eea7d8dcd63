"""`ochredb vacuum` against a server at work and a directory, as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import ochredb
from ochredb.testing.scan import files_with
from ochredb.testing.server_process import HOST, ServerProcess, free_port
from ochredb.vacuum import VacuumReport, vacuum

EAGER = Path(__file__).parents[1] / "crash" / "eager_server.py"
TOKEN = "a-token"


def _cli(*arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OCHREDB_TOKEN"}
    return subprocess.run(
        [sys.executable, "-m", "ochredb_node.cli", "vacuum", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment if token is None else environment | {"OCHREDB_TOKEN": token},
    )


@pytest.fixture
def server(tmp_path: Path) -> ServerProcess:
    port = free_port()
    command = [sys.executable, str(EAGER), "run", "--path", str(tmp_path / "store")]
    command += ["--host", HOST, "--port", str(port), "--token", TOKEN]
    return ServerProcess(command, port, tmp_path / "server.log")


@pytest.mark.timeout(240)
def test_purging_a_server_that_is_read_and_written(server: ServerProcess, tmp_path: Path) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    vectors = np.random.default_rng(0).standard_normal((600, 24)).astype(np.float32)
    with server, ochredb.HttpClient(server.url, headers=headers) as client:
        records = client.create_collection("records", embedding_function=None)
        for start in range(0, 600, 200):
            rows = range(start, start + 200)
            records.add(
                ids=[f"record-{row:03d}" for row in rows],
                embeddings=vectors[start : start + 200],
                documents=[f"the words of {row:03d}" for row in rows],
            )
        other = client.create_collection("beside", embedding_function=None)
        stop, failures = threading.Event(), []

        def use() -> None:
            number = 0
            while not stop.wait(0.02):
                try:
                    other.add(ids=[f"n-{number}"], embeddings=[[float(number)]])
                    assert records.get(ids=["record-005"])["ids"] == ["record-005"]
                except Exception as error:
                    failures.append(error)
                    return
                number += 1

        thread = threading.Thread(target=use)
        thread.start()
        try:
            records.delete(ids=["record-100", "record-599"])
            plain = _cli(server.url)
            assert plain.returncode == 0, plain.stderr
            assert "MB before" in plain.stdout and "2 collections" in plain.stdout
            purged = _cli(server.url, "--purge", "--json")
            assert purged.returncode == 0, (purged.stdout, purged.stderr)
            report = json.loads(purged.stdout)
            assert report["complete"] and report["purge"]
        finally:
            stop.set()
            thread.join()
        assert not failures
        found = files_with(
            tmp_path / "store",
            {
                "id": b"record-100",
                "document": b"the words of 599",
                "vector": vectors[100].tobytes(),
                "live id": b"record-101",
                "live vector": vectors[101].tobytes(),
            },
        )
        assert {name for name, files in found.items() if files} == {"live id", "live vector"}
        refused = _cli(server.url, token="another")
        assert refused.returncode == 1 and "token" in refused.stderr
        assert records.count() == 598
    assert server.returncode == 0
    again = vacuum(str(tmp_path / "store"))
    assert isinstance(again, VacuumReport) and again.is_complete


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    done = _cli(str(tmp_path))
    assert done.returncode == 1 and "no OchreDB directory" in done.stderr
    done = _cli(f"http://{HOST}:{free_port()}")
    assert done.returncode == 1 and done.stderr.startswith("ochredb: cannot connect")
