"""A fork's child leaves the connections of its parent alone, whatever it does first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import pytest

from ochredb.catalog.migrate_postgres import open_postgres
from ochredb.catalog.postgres import PostgresDatabase
from ochredb.catalog.postgres_config import PostgresConfig
from ochredb.clock import SystemClock
from ochredb.ids import IdSource
from tests.unit.kernel import sql

_ME = "SELECT pg_backend_pid()"


def _written(database: PostgresDatabase) -> int:
    with database.write() as session:
        return int(session.all(sql(_ME))[0][0])


def _read(database: PostgresDatabase) -> int:
    with database.read() as session:
        return int(session.all(sql(_ME))[0][0])


def _read_consistent(database: PostgresDatabase) -> int:
    with database.read_consistent() as session:
        return int(session.all(sql(_ME))[0][0])


def _read_once(database: PostgresDatabase) -> int:
    return database.read_once(lambda session: int(session.all(sql(_ME))[0][0]))


@pytest.mark.parametrize("look", [_written, _read, _read_consistent, _read_once])
def test_the_first_thing_that_a_child_does(
    url: str, config: PostgresConfig, look: Callable[[PostgresDatabase], int]
) -> None:
    database, _ = open_postgres(url, SystemClock(), IdSource(), config)
    with contextlib.closing(database):
        ours = look(database)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, str(look(database)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            theirs = answer.read()
        os.waitpid(child, 0)
        assert theirs and int(theirs) != ours
        assert look(database) == ours
