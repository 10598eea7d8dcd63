"""One PostgreSQL server for all of them, a database for each test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ochredb.catalog.migrate_postgres import open_postgres
from ochredb.catalog.postgres_config import PostgresConfig
from ochredb.clock import Clock
from ochredb.ids import IdSource
from ochredb_node import foundation
from ochredb_node.foundation import Catalog
from tests.components.postgres import PostgresServer

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


@pytest.fixture
def nodes_on_postgres(url: str, config: PostgresConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that tests start have their catalog there: those of one path the same one."""
    known: dict[str | None, PostgresConfig] = {}

    def open_catalog(node: Any, clock: Clock, ids: IdSource, _reserve: object) -> Catalog:
        if node.path is None or node.path not in known:
            known[node.path] = replace(config, schema=f"test_{next(_numbers)}")
        database, store_id = open_postgres(url, clock, ids, known[node.path])
        return Catalog(database=database, store_id=store_id, name=database.place, clock=clock)

    monkeypatch.setattr(foundation, "_open_catalog", open_catalog)
