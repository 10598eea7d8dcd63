"""The races of `tests/distributed/postgres/test_races.py`, on SQLite: several catalogs and nodes of
one directory, each with its own connections, in one process. Between processes: see
`test_races_of_processes.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ochredb.catalog.database import Database
from ochredb.catalog.migrate import open_directory
from ochredb.catalog.namespace import Namespace
from ochredb.clock import SystemClock
from ochredb.ids import IdSource
from tests.distributed.postgres import test_races as races
from tests.distributed.postgres.test_races import (
    hands as hands,
)
from tests.distributed.postgres.test_races import (
    nodes as nodes,
)
from tests.distributed.postgres.test_races import (
    test_appends_drops_compactions_and_collections_at_once as test_everything_at_once,  # noqa: F401
)
from tests.distributed.postgres.test_races import (
    test_of_many_who_let_go_of_one_object_the_last_one_is as test_letting_go,  # noqa: F401
)


@pytest.fixture
def no_deadlocks() -> None:
    """SQLite has one writer."""


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Database]:
    database, _ = open_directory(str(tmp_path), SystemClock(), IdSource())
    with contextlib.closing(database):
        yield database


class TestNames(races.TestNames):
    @pytest.fixture
    def names(self, tmp_path: Path) -> Iterator[list[Namespace]]:
        with contextlib.ExitStack() as stack:
            found = []
            for _ in range(6):
                database, _ = open_directory(str(tmp_path), SystemClock(), IdSource())
                stack.enter_context(contextlib.closing(database))
                found.append(Namespace(database, SystemClock(), IdSource()))
            found[0].ensure_defaults()
            yield found
