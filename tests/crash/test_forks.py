"""Programs that fork: a preloading master with workers (gunicorn), pools, forks amid busy threads.

Each program runs in a process of its own, so that one that hangs is a failure and no more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]  # Where processes that are started here run.


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="NOT TESTED: no fork here")

# What an application does when it is loaded, before the master forks its workers.
PRELOAD = """
import os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")  # Newer Pythons warn of forking with threads.
import numpy as np
import ochredb

client = ochredb.PersistentClient(sys.argv[1])
notes = client.get_or_create_collection("notes")

def rows(prefix, count):
    vectors = np.random.default_rng(len(prefix)).random((count, 8), np.float32)
    return dict(ids=[f"{prefix}-{i}" for i in range(count)], embeddings=vectors,
                documents=[f"{prefix} number {i}" for i in range(count)],
                metadatas=[{"who": prefix} for _ in range(count)])

def use(prefix):
    "Writes and reads of every kind; sees its own."
    notes.add(**rows(prefix, 20))
    assert notes.get(where={"who": prefix}, limit=50)["ids"] == rows(prefix, 20)["ids"]
    found = notes.query(query_embeddings=np.random.default_rng(1).random((30, 8), np.float32))
    assert len(found["ids"]) == 30
    assert notes.get(where_document={"$contains": prefix + " number 7"})["ids"] == [prefix + "-7"]

use("master")
"""

GUNICORN = (
    PRELOAD
    + """
def worker(number):
    threads = [threading.Thread(target=use, args=(f"w{number}t{i}",)) for i in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(notes.get(where={"who": f"w{number}t0"})["ids"]) == 20

def spawn(number, work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(90)
            work(number)
            code = 0
        finally:
            os._exit(code)
    return pid

def idle(number):
    notes.count()
    time.sleep(90)

victim = spawn(9, idle)
workers = [spawn(number, worker) for number in range(3)]
use("beside")
os.kill(victim, signal.SIGKILL)
assert os.waitpid(victim, 0)[1] == signal.SIGKILL
workers.append(spawn(3, worker))
for pid in workers:
    assert os.waitpid(pid, 0)[1] == 0, "a worker failed"
assert notes.count() == 20 * (2 + 3 * 4), notes.count()
client.close()
late = ochredb.PersistentClient(sys.argv[1]).get_collection("notes")
assert late.count() == 20 * (2 + 3 * 4)
print("fine")
"""
)

POOLS = (
    PRELOAD
    + """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

def task(number):
    use(f"task{number}")
    return os.getpid()

forking = multiprocessing.get_context("fork")
with forking.Pool(3) as pool:
    assert os.getpid() not in pool.map(task, range(6))
with ProcessPoolExecutor(2, mp_context=forking) as pool:
    list(pool.map(task, range(6, 10)))
process = forking.Process(target=lambda: (use("process"), sys.exit(0)))
process.start(); process.join()
assert process.exitcode == 0
assert notes.count() == 20 * 12, notes.count()
print("fine")
"""
)

BUSY = (
    PRELOAD
    + """
place = sys.argv[1] if sys.argv[2] == "directory" else None
if place is None:
    client = ochredb.EphemeralClient()
    notes = client.get_or_create_collection("notes")
stop = threading.Event()

def busy(number):
    step = 0
    while not stop.is_set():
        step += 1
        notes.upsert(**rows(f"busy{number}", 2))
        notes.query(query_embeddings=np.random.default_rng(1).random((30, 8), np.float32))

threads = [threading.Thread(target=busy, args=(number,), daemon=True) for number in range(3)]
for thread in threads: thread.start()
for number in range(8):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(60)
            use(f"child{number}")
            grandchild = os.fork() if number % 4 == 0 else -1
            if grandchild == 0:
                use(f"grandchild{number}")
            elif grandchild > 0:
                assert os.waitpid(grandchild, 0)[1] == 0
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, f"child {number} failed"
stop.set()
for thread in threads: thread.join()
use("after")
print("fine")
"""
)


def run(script: str, *arguments: str) -> None:
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert process.stdout.strip().endswith("fine"), process.stdout + process.stderr[-6000:]
    assert process.returncode == 0


@pytest.mark.timeout(240)
def test_a_preloading_master_and_its_workers(tmp_path: Path) -> None:
    run(GUNICORN, str(tmp_path / "data"))


@pytest.mark.timeout(240)
def test_pools_of_processes(tmp_path: Path) -> None:
    run(POOLS, str(tmp_path / "data"))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("place", ["directory", "memory"])
def test_forks_while_other_threads_are_at_work(tmp_path: Path, place: str) -> None:
    """The child inherits locks that nobody will open, and must not need them."""
    run(BUSY, str(tmp_path / "data"), place)
