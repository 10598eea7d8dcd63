"""The races of `tests/distributed/postgres/test_races.py` on one directory, between processes.

SQLite's locks are POSIX's, which belong to a process: between connections of one process they
never come into play. (With a `fcntl` that locks nothing the tests below fail, and those of
`test_races.py` do not.) So each node and namespace is in a process of its own here, started anew,
and the scripts, unchanged, hold proxies: each call is answered there by a thread, and errors come
back.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ochredb.catalog.migrate import open_directory
from ochredb.catalog.namespace import Namespace
from ochredb.clock import SystemClock
from ochredb.ids import IdSource
from tests.distributed.postgres import test_races as races
from tests.distributed.postgres.test_races import Hand
from tests.distributed.postgres.test_races import (
    test_appends_drops_compactions_and_collections_at_once as test_everything_at_once,  # noqa: F401
)
from tests.unit.kernel import running_node


def _namespace(path: str) -> Namespace:
    database, _ = open_directory(path, SystemClock(), IdSource())
    return Namespace(database, SystemClock(), IdSource())


_open = contextlib.ExitStack()  # What this process has open, if it is one of those started here.


def _hand(path: str) -> Hand:
    node = running_node(path, inline_bytes_max=0, grace_s=0.2)
    return Hand(_open.enter_context(node))


class Process(BaseManager):
    """One with a store open."""

    if TYPE_CHECKING:

        def namespace(self, path: str) -> Namespace: ...

        def hand(self, path: str) -> Hand: ...


Process.register("namespace", _namespace)
Process.register("hand", _hand)


@pytest.fixture(scope="module")
def processes() -> Iterator[list[Process]]:
    spawned = multiprocessing.get_context("spawn")
    found = [Process(ctx=spawned) for _ in range(6)]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(found)) as pool:
        for started in [pool.submit(process.__enter__) for process in found]:
            stack.push(started.result())
        yield found


@pytest.fixture
def no_deadlocks() -> None:
    """SQLite has one writer."""


@pytest.fixture
def hands(processes: list[Process], tmp_path: Path) -> list[Hand]:
    return [process.hand(str(tmp_path / "store")) for process in processes[:3]]


class TestNames(races.TestNames):
    @pytest.fixture
    def names(self, processes: list[Process], tmp_path: Path) -> list[Namespace]:
        found = [process.namespace(str(tmp_path)) for process in processes]
        found[0].ensure_defaults()
        return found
