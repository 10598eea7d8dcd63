"""One PostgreSQL server for all of them, a database for each test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from ochredb.catalog.migrate_postgres import open_postgres
from ochredb.catalog.postgres_config import PostgresConfig
from ochredb.catalog.schema import metadata
from ochredb.clock import Clock
from ochredb.ids import IdSource
from ochredb_node import foundation
from ochredb_node.foundation import Catalog
from tests.components.postgres import PostgresServer
from tests.unit.conftest import clock as clock
from tests.unit.conftest import node as node

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    server = PostgresServer.start(tmp_path_factory.mktemp("postgres-server"))
    yield server
    server.stop()


@pytest.fixture
def url(server: PostgresServer) -> str:
    """Of a database with room for many catalogs, each in a schema of its own."""
    return server.url


@pytest.fixture
def config() -> PostgresConfig:
    """Of an empty schema."""
    return PostgresConfig(
        schema=f"test_{next(_numbers)}",
        lock_timeout_s=5.0,
        statement_timeout_s=10.0,
        wait_timeout_s=3.0,
    )


_migrated: list[PostgresConfig] = []  # Schemas that are used again: a migration takes its time.


@pytest.fixture
def nodes_on_postgres(
    server: PostgresServer,
    url: str,
    config: PostgresConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nodes that tests start have their catalog there: those of one path the same one."""
    known: dict[str | None, PostgresConfig] = {}
    free = iter(_migrated)

    def empty() -> PostgresConfig:
        used = next(free, None)
        if used is None:
            used = replace(config, schema=f"test_{next(_numbers)}")
            _migrated.append(used)
            return used
        with psycopg.connect(f"{url}?options=-csearch_path%3D{used.schema}") as connection:
            for table in metadata.sorted_tables:
                if table.name != "store":
                    connection.execute(f'DELETE FROM "{table.name}"'.encode())
            new_id = [IdSource().uuid7()]
            connection.execute("UPDATE store SET store_id = %s", new_id)
        return used

    def open_catalog(node: Any, clock: Clock, ids: IdSource, _reserve: object) -> Catalog:
        if node.path is None or node.path not in known:
            known[node.path] = empty()
        database, store_id = open_postgres(url, clock, ids, known[node.path])
        return Catalog(database=database, store_id=store_id, name=database.place, clock=clock)

    monkeypatch.setattr(foundation, "_open_catalog", open_catalog)
