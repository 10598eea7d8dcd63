"""Dropped collections and closed clients let go of files, maps, threads and memory.

Counted by the kernel, in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]  # Where processes that are started here run.


pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="NOT TESTED: counted in /proc"
)

COUNTING = """
import gc, os, sys, threading, time
import numpy as np
import ochredb
from ochredb_node.node import Node
from ochredb_node.shared import _embedded

path = os.path.realpath(sys.argv[1])

def fds():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            pass
    return [name for name in found if name.startswith(path)]

def maps():
    with open("/proc/self/maps") as file:
        return [line for line in file if path in line]

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

def until(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, (fds(), maps()[:5], threading.enumerate())
        time.sleep(0.1)

def fill(client, name):
    found = client.get_or_create_collection(name)
    for batch in range(3):
        vectors = np.random.default_rng(batch).random((1000, 64), np.float32)
        found.upsert(ids=[f"{batch}-{i}" for i in range(1000)], embeddings=vectors,
                     documents=[f"document {batch} {i}" for i in range(1000)])
        node = _embedded._nodes[path]
        node.compactor.compact_now(str(found.id))
    found.query(query_embeddings=[[0.5] * 64])
    found.get(where_document={"$contains": "document 1 7"})
"""

DROPPED = (
    COUNTING
    + """
client = ochredb.PersistentClient(path)
fill(client, "kept")
kept_fds, kept_maps = len(fds()), len(maps())
assert kept_maps > 1, maps()
names = ["dropped-1", "dropped-2"]
for name in names:
    fill(client, name)
assert len(maps()) > kept_maps
for name in names:
    client.delete_collection(name)
until(lambda: len(maps()) <= kept_maps)
until(lambda: len(fds()) <= kept_fds + 2)  # Connections of the catalog, kept for the next reads.
assert client.get_collection("kept").count() == 3000
print("fine")
"""
)

DROPPED_GRAPHS = (
    COUNTING
    + """
def heap_mb():
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024 / 1e6

client = ochredb.PersistentClient(path)
vectors = np.random.default_rng(7).random((2_100, 1_024), np.float32)

def life():
    made = client.create_collection("graph")
    for start in range(0, len(vectors), 300):
        made.add(ids=[str(i) for i in range(start, start + 300)],
                 embeddings=vectors[start : start + 300])
    node = _embedded._nodes[path]
    node.compactor.compact_now(str(made.id))
    version = node.logs.snapshot(str(made.id)).version
    (part,) = node.versions.parts(str(made.id), version)
    assert part.manifest.has_graph
    answer = made.query(query_embeddings=vectors[:3], n_results=5)
    assert answer["ids"][0][0] == "0"
    client.delete_collection("graph")
    until(lambda: not any("/objects/" in line for line in maps()))

for _ in range(2):
    life()
gc.collect()
before = heap_mb()
for _ in range(5):
    life()
gc.collect()
until(lambda: heap_mb() - before < 20)  # Each graph has 8.6 MB of vectors.
print("fine")
"""
)

CLOSED = (
    COUNTING
    + """
def life():
    first, second = ochredb.PersistentClient(path), ochredb.PersistentClient(path)
    if not second.list_collections():
        fill(first, "notes")
    notes = second.get_collection("notes")
    notes.query(query_embeddings=[[0.5] * 64])
    notes.upsert(ids=["x"], embeddings=[[0.1] * 64])
    first.close()
    assert notes.count() == 3001, "the second client is still open"
    second.close()
    gc.collect()
    assert fds() == [], fds()
    until(lambda: maps() == [])

life()
threads = threading.active_count()
for _ in range(2):
    life()
before = resident_mb()
for _ in range(5):
    life()
assert threading.active_count() <= threads, threading.enumerate()
assert resident_mb() - before < 20, (before, resident_mb())
print("fine")
"""
)


def run(script: str, path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert process.stdout.strip() == "fine", process.stdout + process.stderr[-5000:]


@pytest.mark.timeout(300)
def test_dropped_collections_let_go(tmp_path: Path) -> None:
    run(DROPPED, tmp_path / "data")


@pytest.mark.timeout(300)
def test_dropped_graphs_give_their_memory_back(tmp_path: Path) -> None:
    run(DROPPED_GRAPHS, tmp_path / "data")


@pytest.mark.timeout(300)
def test_closed_clients_let_go(tmp_path: Path) -> None:
    run(CLOSED, tmp_path / "data")
