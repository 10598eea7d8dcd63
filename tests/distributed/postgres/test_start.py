"""A start whose connection to PostgreSQL breaks at any byte says that it is unavailable; one that
PostgreSQL does not let in, that a setting is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from ochredb.catalog.migrate_postgres import format_version, open_postgres
from ochredb.catalog.postgres_config import PostgresConfig
from ochredb.clock import SystemClock
from ochredb.errors import InvalidArgument, OutcomeUnknown, Unavailable
from ochredb.ids import IdSource
from tests.components.postgres import PostgresServer
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


@pytest.fixture
def guarded(server: PostgresServer) -> Iterator[str]:
    """Where the server lets `app` in with a password, `right`, and hardly anybody else."""
    server.execute("CREATE ROLE app LOGIN PASSWORD 'right'")
    rules = server.folder / "data" / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(
        "host all postgres 127.0.0.1/32 trust\nlocal all all trust\n"
        "host all app 127.0.0.1/32 scram-sha-256\nhost all nobody 127.0.0.1/32 trust\n"
    )
    server.execute("SELECT pg_reload_conf()")
    yield f"{server.host}:{server.port}"
    rules.write_text(before)
    server.execute("SELECT pg_reload_conf()")
    server.execute("DROP ROLE app")


@pytest.mark.parametrize(
    ("who", "why"),
    [
        ("app:wrong@{}/postgres", 'password authentication failed for user "app"'),
        ("app@{}/postgres", "no password supplied"),
        ("nobody@{}/postgres", 'role "nobody" does not exist'),
        ("postgres@{}/none", 'database "none" does not exist'),
        ("stranger:s3cret@{}/postgres", "no pg_hba.conf entry"),
        ("app:wrong@{},127.0.0.1:9/postgres", "password authentication failed"),
    ],
)
def test_who_is_not_let_in_is_told_so(
    guarded: str, config: PostgresConfig, who: str, why: str
) -> None:
    url, clock = "postgresql://" + who.format(guarded), SystemClock()
    # A reload takes a moment.
    for left in range(50, -1, -1):
        try:
            open_postgres(url, clock, IdSource(clock), config)[0].close()
        except InvalidArgument as error:
            if why in str(error) or not left:
                break
        clock.sleep(0.1)
    with pytest.raises(InvalidArgument) as caught:
        open_postgres(url, clock, IdSource(clock), config)
    assert str(caught.value).startswith("catalog_url: ") and why in str(caught.value)
    assert "wrong" not in str(caught.value) and "s3cret" not in str(caught.value)


def test_a_server_that_is_away_or_full_is_waited_for(
    server: PostgresServer, config: PostgresConfig
) -> None:
    clock = SystemClock()
    with pytest.raises(Unavailable, match="refused"):
        open_postgres("postgresql://postgres@127.0.0.1:9/x", clock, IdSource(clock), config)
    server.execute("ALTER DATABASE template1 CONNECTION LIMIT 0")
    server.execute("CREATE ROLE plain LOGIN")
    url = f"postgresql://plain@{server.host}:{server.port}/template1"
    try:
        with pytest.raises(Unavailable, match="too many connections"):
            open_postgres(url, clock, IdSource(clock), config)
    finally:
        server.execute("ALTER DATABASE template1 CONNECTION LIMIT -1")
        server.execute("DROP ROLE plain")
