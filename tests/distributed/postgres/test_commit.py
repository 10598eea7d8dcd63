"""A process of PostgreSQL that is ended while it commits has not refused to."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from ochredb.catalog.migrate_postgres import open_postgres
from ochredb.catalog.postgres_config import PostgresConfig
from ochredb.catalog.postgres_session import PostgresSession
from ochredb.clock import SystemClock
from ochredb.errors import OutcomeUnknown, Unavailable
from ochredb.ids import IdSource
from tests.components.postgres import PostgresServer
from tests.unit.kernel import sql

_STATE = "SELECT state FROM pg_stat_activity WHERE query LIKE '%COMMIT' AND pid = "


@pytest.mark.parametrize("send", ["run", "later"])
def test_what_was_committed_is_never_told_to_have_failed(
    server: PostgresServer, config: PostgresConfig, send: str
) -> None:
    """As by a fast shutdown: what it says behind the commit is that it was ended."""
    database, _ = open_postgres(server.url, SystemClock(), IdSource(), config)
    processes: list[int] = []

    def end_it() -> None:
        deadline = time.monotonic() + 20.0
        while not processes or server.execute(f"{_STATE}{processes[0]}") != [("active",)]:
            assert time.monotonic() < deadline, "it never committed"
        server.execute(f"SELECT pg_terminate_backend({processes[0]})")

    with contextlib.closing(database):
        with database.write() as session:
            session.run(sql("CREATE TABLE things (id int PRIMARY KEY)"))
        thread = threading.Thread(target=end_it)
        thread.start()
        outcome: Unavailable | None = None
        try:
            with database.write() as session:
                assert isinstance(session, PostgresSession)
                session.run(sql("SET LOCAL commit_delay = 100000"))
                session.run(sql("SET LOCAL commit_siblings = 0"))
                processes.append(session.connection.info.backend_pid)
                getattr(session, send)(sql("INSERT INTO things VALUES (1)"))
        except Unavailable as error:
            outcome = error
        thread.join()
        with database.read() as session:
            assert session.all(sql("SELECT id FROM things")) == [(1,)]
        assert outcome is None or isinstance(outcome, OutcomeUnknown)
