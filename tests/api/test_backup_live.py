"""Backups of a real server under writes, from its directory and over HTTP, restored and compared.

Each collection has one writer, which keeps the requests it sent, in order. A backup's manifest says
up to which operation of each log it reaches: the restored collection must be exactly what the
requests up to there make of an empty one. The server compacts, merges and collects all the time,
with a grace period of half a second.
"""

from __future__ import annotations

import base64
import contextlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import ochredb
from ochredb.backup import BackupManifest, backup, restore
from ochredb.backup.archive import silent
from ochredb.backup.remote import RemoteSource
from ochredb.backup.take import take
from ochredb.clock import SystemClock
from ochredb.errors import Unauthenticated, Unavailable, Unimplemented
from ochredb.testing.model import CollectionModel
from ochredb.testing.server_process import HOST, ServerProcess, free_port

ROOT = Path(__file__).resolve().parents[2]
DATABASE = "/api/v2/tenants/default_tenant/databases/default_database"
TOKEN = "not-for-strangers"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
DIMENSION = 64
BIG_ROWS = 2_400  # Of 64 dimensions: 600 KB, so never inline.
WRITERS = 3
DEADLINE_S = 60.0


class Writer(threading.Thread):
    """Writes to one collection until told to stop; `sent` are requests in order, `acked` so far."""

    def __init__(self, url: str, number: int) -> None:
        super().__init__(daemon=True)
        self.http = httpx.Client(base_url=url, headers=HEADERS, timeout=DEADLINE_S, trust_env=False)
        answer = self.http.post(f"{DATABASE}/collections", json={"name": f"written-{number}"})
        self.id = answer.json()["id"]
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.acked = 0
        self.stopping = threading.Event()
        self._rng = np.random.default_rng(number)
        self._random = random.Random(number)
        self._added = 0

    def run(self) -> None:
        while not self.stopping.is_set():
            verb, body = self._request()
            self.sent.append((verb, body))
            answer = self.http.post(f"{DATABASE}/collections/{self.id}/{verb}", json=body)
            assert answer.status_code in (200, 201), answer.text
            self.acked += 1
        self.http.close()

    def _request(self) -> tuple[str, dict[str, Any]]:
        draw = self._random.random()
        if draw < 0.08:
            return "add", self._records(self._fresh(BIG_ROWS))
        if draw < 0.5 or self._added == 0:
            return "add", self._records(self._fresh(self._random.randint(1, 60)))
        ids = sorted({f"r{self._random.randrange(self._added)}" for _ in range(30)})
        if draw < 0.65:
            return "delete", {"ids": ids}
        if draw < 0.85:
            return "update", {"ids": ids, "documents": [f"changed at {len(self.sent)}"] * len(ids)}
        return "upsert", self._records(ids)

    def _fresh(self, count: int) -> list[str]:
        self._added += count
        return [f"r{number}" for number in range(self._added - count, self._added)]

    def _records(self, ids: list[str]) -> dict[str, Any]:
        vectors = self._rng.random((len(ids), DIMENSION), np.float32)
        return {
            "ids": ids,
            "embeddings": [base64.b64encode(row.tobytes()).decode() for row in vectors],
            "documents": [f"request {len(self.sent)}" for _ in ids],
            "metadatas": [{"request": len(self.sent)} for _ in ids],
        }

    def model_at(self, last_offset: int) -> tuple[CollectionModel, int]:
        """The state after the requests that end at an operation, and how many they are."""
        model, count = CollectionModel("any"), 0
        while model.operations < last_offset:
            verb, body = self.sent[count]
            if verb == "delete":
                model.delete(body)
            else:
                model.write(verb, body)
            count += 1
        assert model.operations == last_offset, "a request is all in a backup, or not at all"
        return model, count


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`ochredb run` with everything due all the time."""
    directory, port = tmp_path_factory.mktemp("busy") / "data", free_port()
    eager = str(ROOT / "tests" / "crash" / "eager_server.py")
    command = [sys.executable, eager, "run", "--path", str(directory), "--host", HOST]
    running = ServerProcess(
        [*command, "--port", str(port)],
        port,
        directory.with_name("server.log"),
        environment={"OCHREDB_TOKEN": TOKEN},
    )
    with running:
        yield running
    assert running.returncode == 0, running.output_tail()


def _directory(server: ServerProcess) -> str:
    return server.command[server.command.index("--path") + 1]


def _take(server: ServerProcess, way: str, target: str) -> BackupManifest:
    if way == "url":
        return backup(server.url, target, headers=HEADERS)
    return backup(_directory(server), target)


def _compare(path: str, manifest: BackupManifest, writers: list[Writer]) -> list[int]:
    """Each collection of a restored store with the model; returns how many requests are in it."""
    counts = []
    states = {item.id: item for item in manifest.collections}
    with ochredb.PersistentClient(path) as client:
        for number, writer in enumerate(writers):
            state = states[writer.id]
            model, count = writer.model_at(state.last_offset)
            counts.append(count)
            collection = client.get_collection(f"written-{number}", embedding_function=None)
            found = collection.get(include=["documents", "metadatas", "embeddings"])
            expected = model.get({"include": ["documents", "metadatas", "embeddings"]})
            assert found["ids"] == expected["ids"]
            assert found["documents"] == expected["documents"]
            assert found["metadatas"] == expected["metadatas"]
            if expected["ids"]:
                vectors = np.array(expected["embeddings"], np.float32)
                assert np.asarray(found["embeddings"], np.float32).tobytes() == vectors.tobytes()
            assert state.records == len(expected["ids"]) == collection.count()
    return counts


@pytest.mark.timeout(400)
def test_a_backup_under_writes_is_a_state_that_existed(
    server: ServerProcess, tmp_path: Path
) -> None:
    writers = [Writer(server.url, number) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    taken = []
    try:
        for round_number in range(4):
            while sum(writer.acked for writer in writers) < 60 * (round_number + 1):
                assert all(writer.is_alive() for writer in writers), server.output_tail()
                threading.Event().wait(0.05)
            way = ("path", "url")[round_number % 2]
            before = [writer.acked for writer in writers]
            target = str(tmp_path / f"backup-{round_number}")
            manifest = _take(server, way, target)
            taken.append((target, manifest, before, [len(writer.sent) for writer in writers]))
    finally:
        for writer in writers:
            writer.stopping.set()
        for writer in writers:
            writer.join(DEADLINE_S)
    assert any(item.indexed_offset for _, manifest, *_ in taken for item in manifest.collections)
    for target, manifest, before, after in taken:
        restored = f"{target}-restored"
        _, store_id = restore(target, restored)
        assert store_id != manifest.store_id
        counts = _compare(restored, manifest, writers)
        for least, count, most in zip(before, counts, after, strict=True):
            assert least <= count <= most, "every write that was acknowledged before is in it"
    for writer in writers:
        total = httpx.get(
            f"{server.url}{DATABASE}/collections/{writer.id}/count", headers=HEADERS, timeout=30
        ).json()
        model, _ = writer.model_at(sum(len(body["ids"]) for _, body in writer.sent))
        assert total == len(model.records), "the source goes on as if nothing had been"


def test_a_server_wants_its_token_and_others_are_told(
    server: ServerProcess, tmp_path: Path
) -> None:
    with pytest.raises(Unauthenticated, match="token"):
        backup(server.url, str(tmp_path / "a"), headers={"Authorization": "Bearer wrong"})
    with pytest.raises(Unimplemented, match="offers no backups"):
        backup(f"{server.url}/nothing-here", str(tmp_path / "b"), headers=HEADERS)
    with pytest.raises(Unavailable, match="cannot connect"):
        backup(f"http://{HOST}:{free_port()}", str(tmp_path / "c"))


class Restarting(RemoteSource):
    """Stops and starts the server before the first object is read."""

    restarts = 0

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(server.url, HEADERS, SystemClock())
        self._server = server

    def read_object(self, backup_id: str, key: str, start: int, stop: int) -> bytes:
        if self.restarts == 0:
            self.restarts += 1
            assert self._server.stop() == 0
            self._server.start()
        return super().read_object(backup_id, key, start, stop)


def test_a_backup_outlives_a_restart_of_the_server(server: ServerProcess, tmp_path: Path) -> None:
    writer = Writer(server.url, 99)
    writer.sent.append(("add", writer._records(writer._fresh(BIG_ROWS))))
    path = f"{DATABASE}/collections/{writer.id}/add"
    assert writer.http.post(path, json=writer.sent[0][1]).status_code == 201
    writer.http.close()
    source = Restarting(server)
    with contextlib.closing(source):
        target = str(tmp_path / "saved")
        manifest = take(source, target, keep_going=False, progress=silent, clock=SystemClock())
    assert source.restarts == 1
    assert {item.id: item.records for item in manifest.collections}[writer.id] == BIG_ROWS
    restore(target, str(tmp_path / "restored"))


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = "import sys; from ochredb_node.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", command, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OCHREDB_TOKEN": TOKEN},
    )


def test_the_commands_say_what_they_did(server: ServerProcess, tmp_path: Path) -> None:
    saved, restored = str(tmp_path / "saved"), str(tmp_path / "restored")
    done = _run("backup", server.url, saved)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{saved}: ")
    done = _run("restore", "--check-only", saved)
    assert done.returncode == 0
    assert "complete and undamaged" in done.stdout
    done = _run("restore", saved, restored)
    assert done.returncode == 0
    assert "restored and counted, store " in done.stdout
    for arguments, status, told in (
        (("restore", saved), 2, "--check-only"),
        (("restore", saved, restored, "--check-only"), 2, "--check-only"),
        (("restore", saved, restored), 1, "not empty"),
        (("restore", restored, str(tmp_path / "new")), 1, "no backup"),
        (("backup", str(tmp_path / "nowhere"), str(tmp_path / "new")), 1, "no OchreDB directory"),
    ):
        done = _run(*arguments)
        assert (done.returncode, done.stdout) == (status, ""), arguments
        assert told in done.stderr, arguments
    manifest = Path(saved, "manifest.json")
    content = manifest.read_bytes()
    manifest.unlink()
    assert "incomplete" in _run("restore", "--check-only", saved).stderr
    manifest.write_bytes(content)
