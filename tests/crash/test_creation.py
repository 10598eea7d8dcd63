"""Eight processes create one store at once, on nothing or on what a killed creation left: I6, I7.

OCHREDB_CREATION_ROUNDS (default 12) is how often each.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import alembic.command  # noqa: F401  Imported before the forks, so that they meet.
import pytest

import ochredb

ROUNDS = int(os.environ.get("OCHREDB_CREATION_ROUNDS", "12"))
PROCESSES = 8

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="NOT TESTED: needs fork"),
    pytest.mark.timeout(120 + 20 * ROUNDS),
]


def together(work: Callable[[int], None]) -> list[int]:
    """Exit codes of eight processes that begin at one moment."""
    gate, opener = os.pipe()
    pids = []
    for number in range(PROCESSES):
        pid = os.fork()
        if pid == 0:
            os.close(opener)
            code = 1
            try:
                os.read(gate, 1)
                work(number)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    os.close(opener)
    os.close(gate)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def open_and_write(path: Path, number: int) -> None:
    client = ochredb.PersistentClient(str(path))
    found = client.get_or_create_collection("shared")
    found.add(ids=[f"p{number}"], embeddings=[[float(number), 1.0]])
    assert f"p{number}" in found.get()["ids"]
    client.close()


def check_complete(path: Path) -> None:
    client = ochredb.PersistentClient(str(path))
    try:
        assert [item.name for item in client.list_collections()] == ["shared"]
        found = client.get_collection("shared").get()["ids"]
        assert sorted(found) == [f"p{number}" for number in range(PROCESSES)]
    finally:
        client.close()


@pytest.mark.parametrize("round_number", range(ROUNDS))
def test_eight_create_one_store_at_once(tmp_path: Path, round_number: int) -> None:
    path = tmp_path / f"new-{round_number}" / "below"
    assert together(lambda number: open_and_write(path, number)) == [0] * PROCESSES
    check_complete(path)


@pytest.mark.parametrize("round_number", range(ROUNDS))
def test_eight_complete_what_a_killed_creation_left(tmp_path: Path, round_number: int) -> None:
    path = tmp_path / "data"
    rng = random.Random(round_number)
    for _ in range(rng.randint(1, 3)):
        pid = os.fork()
        if pid == 0:
            ochredb.PersistentClient(str(path))
            time.sleep(60)
            os._exit(0)
        time.sleep(rng.uniform(0.0, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert together(lambda number: open_and_write(path, number)) == [0] * PROCESSES
    check_complete(path)
