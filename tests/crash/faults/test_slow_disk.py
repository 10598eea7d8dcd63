"""A disk that is slow to sync: searches do not wait for writes, and waiting has bounds."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from pathlib import Path

from ochredb.testing.server_process import ServerProcess

from .conftest import Connect
from .support import Client, Faults, Written, eager_server

SYNC_S = 0.4
WRITERS = 12


def test_reads_do_not_wait_for_a_slow_disk(tmp_path: Path, connect: Connect) -> None:
    data = tmp_path / "data"
    data.mkdir()
    faults = Faults(tmp_path, data)
    options = ("--deadline-s", "2", "--write-threads", "2")
    server = eager_server(data, tmp_path / "log", *options, environment=faults.environment)
    with server:
        client = connect(server)
        written = Written(client, client.create("records"))
        for size in (10, 600_000):
            assert written.add(size).status == 201
        written.check()
        faults.sync_takes(SYNC_S)
        end = threading.Event()
        writers = [
            _Writer(server, written.collection, number, 100_000 if number % 2 else 10, end)
            for number in range(WRITERS)
        ]
        for writer in writers:
            writer.start()
        try:
            time.sleep(1.0)  # They wait for the disk now.
            durations = []
            for _ in range(40):
                start = time.monotonic()
                search = {"query_embeddings": [[1.0, 2.0]], "n_results": 1}
                path = f"collections/{written.collection}/query"
                assert client.call("POST", path, search).status == 200
                where = {"where_document": {"$contains": "x"}, "include": ["documents"]}
                path = f"collections/{written.collection}/get"
                assert client.call("POST", path, where | {"limit": 1}).status == 200
                durations.append(time.monotonic() - start)
                time.sleep(0.02)
            # A write waits for at least one sync; the median read, and most others, for none.
            durations.sort()
            print(f"reads: median {durations[20]:.4f} s, worst {durations[-1]:.4f} s")
            assert durations[20] < SYNC_S / 2
        finally:
            end.set()
            for writer in writers:
                writer.join()
        statuses = sum((writer.statuses for writer in writers), Counter[int]())
        print(f"writes: {dict(statuses)}")
        assert set(statuses) <= {201, 429, 503, 504}
        assert statuses[201] > 0
        # With the disk as fast as before, all is as before, and what was acknowledged is there.
        faults.sync_takes(0)
        ids = {name for writer in writers for name in writer.acknowledged}
        path = f"collections/{written.collection}/get"
        found = client.call("POST", path, {"ids": sorted(ids), "include": []})
        assert found.status == 200 and set(found.body["ids"]) == ids
        assert written.add(10).status == 201
        assert server.stop() == 0


class _Writer(threading.Thread):
    """Adds records one after the other, and counts what it is answered."""

    def __init__(
        self, server: ServerProcess, collection: str, number: int, size: int, end: threading.Event
    ) -> None:
        super().__init__()
        self._client, self._collection = Client(server.port), collection
        self._number, self._size, self._end = number, size, end
        self.statuses: Counter[int] = Counter()
        self.acknowledged: list[str] = []

    def run(self) -> None:
        for count in itertools.count():
            if self._end.is_set():
                break
            name = f"writer-{self._number}-{count}"
            body = {"ids": [name], "embeddings": [[0.0, 0.0]], "documents": ["x" * self._size]}
            answer = self._client.call("POST", f"collections/{self._collection}/add", body)
            self.statuses[answer.status] += 1
            if answer.status == 201:
                self.acknowledged.append(name)
        self._client.close()


def test_writes_that_wait_too_long_get_an_answer(tmp_path: Path, connect: Connect) -> None:
    """A disk that hardly answers at all: 504 by the deadline, 429 when too many wait."""
    data = tmp_path / "data"
    data.mkdir()
    faults = Faults(tmp_path, data)
    options = ("--deadline-s", "1", "--write-threads", "1")
    server = eager_server(data, tmp_path / "log", *options, environment=faults.environment)
    with server:
        client = connect(server)
        written = Written(client, client.create("records"))
        assert written.add(10).status == 201
        faults.sync_takes(6.0)
        answers = []
        for size in (10, 100_000):
            start = time.monotonic()
            answers.append(written.add(size).status)
            assert time.monotonic() - start < 4.0
            path = f"collections/{written.collection}/count"
            assert client.call("GET", path).status == 200
        assert set(answers) <= {504, 503}, answers
        faults.sync_takes(0)
        # A write whose deadline passed may have been applied; nothing else is wrong.
        ids = client.call("POST", f"collections/{written.collection}/get", {"include": []}).body
        assert set(written.documents) <= set(ids["ids"])
        deadline_s = time.monotonic() + 30
        while written.add(10).status != 201:
            assert time.monotonic() < deadline_s
        assert server.stop() == 0
