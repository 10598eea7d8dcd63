"""A start whose connection to PostgreSQL breaks at any byte says that it is unavailable."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from ochredb.catalog.migrate_postgres import format_version, open_postgres
from ochredb.catalog.postgres_config import PostgresConfig
from ochredb.clock import SystemClock
from ochredb.errors import OutcomeUnknown, Unavailable
from ochredb.ids import IdSource
from tests.components.tcp_proxy import TcpProxy

# The first answers are of the connection; the last are of a catalog that is there, or is created.
BYTES = [*range(1, 2_000, 61), 3_000, 5_000, 10_000, 20_000]


@pytest.mark.parametrize("exists", [False, True], ids=["created", "opened"])
def test_connections_break_while_a_catalog_is_opened(
    url: str, config: PostgresConfig, exists: bool
) -> None:
    clock = SystemClock()
    if exists:
        open_postgres(url, clock, IdSource(clock), config)[0].close()
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    proxy = TcpProxy.start([(parts.hostname, parts.port)])
    through = url.replace(f"{parts.hostname}:{parts.port}", proxy.address)
    broken = 0
    try:
        for count in BYTES:
            proxy.reset_after_bytes = count
            try:
                open_postgres(through, clock, IdSource(clock), config)[0].close()
            except (Unavailable, OutcomeUnknown):
                broken += 1
    finally:
        proxy.stop()
    assert broken >= 10
    database, store_id = open_postgres(url, clock, IdSource(clock), config)
    database.close()
    assert store_id
    assert format_version(url, clock, config) is not None
