"""Churn, through a real server: every record overwritten again and again, and read meanwhile; then
records deleted and collections dropped, until little is left.

Disk comes back to within 1.3 times of what the same records take when they are written once, and
memory stays flat. Nobody vacuums, but for that comparison. The long form has the sizes and the
pauses of real life and takes an hour: `make churn-long`.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import ochredb
from ochredb import Collection
from ochredb.testing.server_process import HOST, ServerProcess, free_port, ochredb_server
from ochredb.vacuum import vacuum

LONG = bool(os.environ.get("OCHREDB_CHURN_LONG"))
ROUNDS, RECORDS, DIMENSION = (50, 20_000, 128) if LONG else (8, 2_000, 32)
STEADY_ROUNDS = 40 if LONG else 4
BATCH = 1_000 if LONG else 250
DROPPED = 4  # Collections of half as many records.
DELETED_TENTHS = 6
SPACE_SHARE_MAX = 1.3
MEMORY_SHARE_MAX = 0.1  # Of the mean, up and down.
SETTLED_WITHIN_S = 300.0
EAGER = Path(__file__).parents[1] / "crash" / "eager_server.py"
WORDS = ("amber", "basalt", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty")


@dataclass(frozen=True)
class Space:
    """Bytes on disk by kind."""

    parts: int
    fragments: int
    temporary: int
    database: int
    write_ahead_log: int

    @property
    def total(self) -> int:
        return self.parts + self.fragments + self.temporary + self.database + self.write_ahead_log

    @property
    def objects(self) -> int:
        """Without the catalog, some hundred KB which would count for much in the short form."""
        return self.parts + self.fragments + self.temporary

    def __str__(self) -> str:
        return ", ".join(f"{name} {size / 1e6:.1f}" for name, size in vars(self).items()) + " MB"


def space_of(root: Path) -> Space:
    """By file sizes alone: nothing of a store at work is opened here."""
    return Space(
        parts=_tree(root / "objects" / "parts") + _tree(root / "objects" / "deleted"),
        fragments=_tree(root / "objects" / "fragments"),
        temporary=_tree(root / "objects" / "tmp"),
        database=_size(root / "ochredb.sqlite3"),
        write_ahead_log=_size(root / "ochredb.sqlite3-wal") + _size(root / "ochredb.sqlite3-shm"),
    )


def _tree(folder: Path) -> int:
    return sum(_size(Path(at, name)) for at, _, names in os.walk(folder) for name in names)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _server(root: Path) -> ServerProcess:
    """As users run it; in the short form with grace periods that a test can wait for."""
    if LONG:
        return ochredb_server(root)
    port = free_port()
    command = [sys.executable, str(EAGER), "run", "--path", str(root), "--port", str(port)]
    return ServerProcess([*command, "--host", HOST], port, root.with_name(root.name + ".log"))


def _records(round_number: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(round_number)
    vectors = rng.standard_normal((RECORDS, DIMENSION), np.float32)
    picks = rng.integers(0, len(WORDS), (RECORDS, 30))
    documents = [" ".join([f"round {round_number}", *(WORDS[i] for i in row)]) for row in picks]
    return vectors, documents


def _write(collection: Collection, round_number: int, rows: Sequence[int] = range(RECORDS)) -> None:
    vectors, documents = _records(round_number)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        collection.upsert(
            ids=[f"record-{row}" for row in batch],
            embeddings=vectors[list(batch)],
            documents=[documents[row] for row in batch],
            metadatas=[{"row": row, "round": round_number} for row in batch],
        )


def _resident_bytes(pid: int) -> dict[str, int]:
    """Of the process: `anon` is heap, `file` mapped files whose pages the system may take back."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            found[name[3:].lower()] = int(rest.split()[0]) << 10
    return found


@contextmanager
def _watched(pid: int, samples: list[dict[str, int]]) -> Iterator[None]:
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.25):
            samples.append(_resident_bytes(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _read_meanwhile(url: str) -> Iterator[list[float]]:
    """Another client that asks all the time; yields the seconds that each answer took."""
    took: list[float] = []
    failures: list[Exception] = []
    stop = threading.Event()
    rng = np.random.default_rng(0)

    def read() -> None:
        with ochredb.HttpClient(url) as client:
            collection = client.get_collection("churned", embedding_function=None)
            while not stop.wait(0.02):
                started = time.monotonic()
                try:
                    vector = rng.standard_normal((1, DIMENSION), np.float32)
                    found = collection.query(query_embeddings=vector, n_results=5)
                    assert len(found["ids"][0]) == 5, found
                    assert collection.count() == RECORDS
                except Exception as error:
                    failures.append(error)
                    return
                took.append(time.monotonic() - started)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join()
    assert not failures, failures


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SETTLED_WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def _written_once(root: Path, rows: Sequence[int] = range(RECORDS)) -> Space:
    """What records of the last round take in a store that never held anything else."""
    with _server(root) as server, ochredb.HttpClient(server.url) as client:
        collection = client.create_collection("churned", embedding_function=None)
        _write(collection, ROUNDS, rows)
        _until(
            lambda: collection.get_indexing_status().num_unindexed_ops == 0, "it does not settle"
        )
        assert vacuum(server.url).is_complete
        return space_of(root)


@pytest.mark.timeout(7200 if LONG else 600)
def test_i6_overwriting_gives_disk_back_and_memory_stays_flat(tmp_path: Path) -> None:
    live = _written_once(tmp_path / "once")
    root = tmp_path / "churned"
    curve: list[dict[str, float]] = []
    peak = 0
    with _server(root) as server, ochredb.HttpClient(server.url) as client:
        collection = client.create_collection("churned", embedding_function=None)
        _write(collection, 0)
        with _read_meanwhile(server.url) as took:
            for number in range(1, ROUNDS + 1):
                samples: list[dict[str, int]] = []
                started = time.monotonic()
                with _watched(server.pid, samples):
                    _write(collection, number)
                    time.sleep(0.6)
                now = space_of(root)
                peak = max(peak, now.total)
                curve.append(
                    {
                        kind: statistics.median(sample[kind] for sample in samples)
                        for kind in samples[0]
                    }
                )
                print(
                    f"round {number}: {time.monotonic() - started:.1f} s; {now}; anonymous "
                    f"{curve[-1]['anon'] / 1e6:.0f} MB, mapped {curve[-1]['file'] / 1e6:.0f} MB",
                    flush=True,
                )

            def is_small() -> bool:
                return space_of(root).total <= SPACE_SHARE_MAX * live.total

            started = time.monotonic()
            try:
                _until(is_small, "disk does not come back")
            finally:
                print(f"live: {live}; at most {peak / 1e6:.1f} MB")
                print(f"after {time.monotonic() - started:.1f} s: {space_of(root)}")
        print(f"{len(took)} reads, the slowest {max(took):.3f} s")
        assert collection.count() == RECORDS
        vectors, documents = _records(ROUNDS)
        found = collection.get(ids=["record-7"], include=["embeddings", "documents", "metadatas"])
        assert found["documents"] == [documents[7]]
        assert found["metadatas"] == [{"row": 7, "round": ROUNDS}]
        np.testing.assert_array_equal(np.asarray(found["embeddings"], np.float32), vectors[7:8])
    steady = [point["anon"] + point["file"] for point in curve[-STEADY_ROUNDS:]]
    mean = statistics.mean(steady)
    print(
        f"memory over the last {len(steady)} rounds: {min(steady) / 1e6:.0f} to "
        f"{max(steady) / 1e6:.0f} MB, mean {mean / 1e6:.0f}"
    )
    if LONG:  # A few seconds after a start nothing is flat yet.
        assert max(abs(point - mean) for point in steady) <= MEMORY_SHARE_MAX * mean, steady


@pytest.mark.timeout(7200 if LONG else 600)
def test_i6_deleting_and_dropping_gives_disk_back(tmp_path: Path) -> None:
    kept = [row for row in range(RECORDS) if row % 10 >= DELETED_TENTHS]
    live = _written_once(tmp_path / "once", kept)
    root = tmp_path / "deleted"
    with _server(root) as server, ochredb.HttpClient(server.url) as client:
        collection = client.create_collection("churned", embedding_function=None)
        _write(collection, ROUNDS)
        names = [f"dropped-{number}" for number in range(DROPPED)]
        for name in names:
            dropped = client.create_collection(name, embedding_function=None)
            _write(dropped, ROUNDS, range(RECORDS // 2))
        _until(
            lambda: collection.get_indexing_status().num_unindexed_ops == 0, "it does not settle"
        )
        full = space_of(root)

        def is_small() -> bool:
            now = space_of(root)
            is_small_enough = now.total <= SPACE_SHARE_MAX * live.total or not LONG
            return is_small_enough and now.objects <= SPACE_SHARE_MAX * live.objects

        assert full.objects > 2 * SPACE_SHARE_MAX * live.objects, "there is something to give back"
        for tenth in range(DELETED_TENTHS):
            gone = range(tenth, RECORDS, 10)
            for start in range(0, len(gone), BATCH):
                collection.delete(ids=[f"record-{row}" for row in gone[start : start + BATCH]])
            if names:
                client.delete_collection(names.pop())
        started = time.monotonic()
        try:
            _until(is_small, "disk does not come back")
        finally:
            print(f"live: {live}; before: {full}")
            print(f"after {time.monotonic() - started:.1f} s: {space_of(root)}")
        assert collection.count() == len(kept)
        _, documents = _records(ROUNDS)
        found = collection.get(ids=["record-7", "record-5"], include=["documents"])
        assert (found["ids"], found["documents"]) == (["record-7"], [documents[7]])
