"""PostgreSQL as a catalog: durable, honest about what it does not know, back after an outage."""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from ochredb.catalog import statement
from ochredb.catalog.database import Aborted, Database, Session, whole
from ochredb.catalog.migrate_postgres import format_version, open_postgres
from ochredb.catalog.namespace import DEFAULT_TENANT, Namespace
from ochredb.catalog.postgres import PostgresDatabase
from ochredb.catalog.postgres_config import PostgresConfig
from ochredb.catalog.postgres_session import PostgresSession
from ochredb.catalog.schema import FORMAT_VERSION
from ochredb.clock import SystemClock
from ochredb.errors import InvalidArgument, NewerFormat, OutcomeUnknown, Unavailable
from ochredb.ids import IdSource
from ochredb_node.cli import main
from tests.components.postgres import PostgresServer
from tests.components.tcp_proxy import TcpProxy
from tests.unit.kernel import sql

_ADD = "INSERT INTO things VALUES ({}, '{}')"


@pytest.fixture
def database(url: str, config: PostgresConfig) -> Iterator[PostgresDatabase]:
    """With a table of its own."""
    database, _ = open_postgres(url, SystemClock(), IdSource(), config)
    with contextlib.closing(database):
        with database.write() as session:
            session.run(sql("CREATE TABLE things (id int PRIMARY KEY, text text)"))
            session.run(sql("INSERT INTO things VALUES (1, 'a'), (2, 'b')"))
        yield database


def _texts(database: PostgresDatabase) -> list[str]:
    with database.read() as session:
        return [text for (text,) in session.all(sql("SELECT text FROM things ORDER BY id"))]


def _process(session: Session) -> int:
    """The server's process behind a session."""
    assert isinstance(session, PostgresSession)
    return session.connection.info.backend_pid


def _wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


class TestSettings:
    def test_every_connection_is_durable_whatever_the_server_says(
        self, url: str, config: PostgresConfig
    ) -> None:
        careless = f"{url}?options=-csynchronous_commit%3Doff"
        database, _ = open_postgres(careless, SystemClock(), IdSource(), config)
        shown = ["synchronous_commit", "lock_timeout", "statement_timeout", "application_name"]
        shown += ["idle_in_transaction_session_timeout", "tcp_user_timeout"]  # Of lost clients.
        with contextlib.closing(database):
            for block in (database.write, database.read_consistent):
                with block() as session:
                    values = [session.all(sql(f"SHOW {name}"))[0][0] for name in shown]
                assert values == ["on", "5s", "10s", "ochredb", "10s", "10000"]

    def test_a_server_that_loses_writes_is_refused(
        self, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        server = PostgresServer.start(tmp_path_factory.mktemp("careless"), fsync="off")
        try:
            with pytest.raises(InvalidArgument, match="fsync=off"):
                open_postgres(server.url, SystemClock(), IdSource())
            config = PostgresConfig(allow_fsync_off=True)
            open_postgres(server.url, SystemClock(), IdSource(), config)[0].close()
        finally:
            server.stop()

    @pytest.mark.parametrize(
        ("url", "problem"),
        [
            ("postgresql://postgres@127.0.0.1:1/x", "127.0.0.1:1/x is unavailable"),
            ("mysql://me:secret@there/x", "catalog_url"),
        ],
    )
    def test_a_wrong_url_is_told_without_its_password(self, url: str, problem: str) -> None:
        with pytest.raises((Unavailable, InvalidArgument), match=problem) as caught:
            open_postgres(url, SystemClock(), IdSource())
        assert "secret" not in str(caught.value)

    def test_a_schema_has_a_plain_name(self) -> None:
        for name in ("", "a; DROP", "Upper", "pg_mine", "x" * 64):
            with pytest.raises(InvalidArgument, match="schema"):
                PostgresConfig(schema=name)

    def test_time_is_the_servers(self, url: str, config: PostgresConfig) -> None:
        class Astray(SystemClock):
            def now_us(self) -> int:
                return super().now_us() + 7_200_000_000

        database, _ = open_postgres(url, Astray(), IdSource(), config)
        with contextlib.closing(database):
            database.check_format()
            assert abs(database.clock.now_us() - SystemClock().now_us()) < 500_000


class TestMigration:
    def test_those_who_start_together_agree(self, url: str, config: PostgresConfig) -> None:
        def start() -> str:
            database, store_id = open_postgres(url, SystemClock(), IdSource(), config)
            database.close()
            return store_id

        assert format_version(url, SystemClock(), config) is None
        with ThreadPoolExecutor(4) as pool:
            found = [future.result() for future in [pool.submit(start) for _ in range(4)]]
        assert len(set(found)) == 1
        assert format_version(url, SystemClock(), config) == FORMAT_VERSION

    def test_another_programs_tables_are_left_alone(
        self, server: PostgresServer, url: str, config: PostgresConfig
    ) -> None:
        server.execute(f"CREATE SCHEMA {config.schema}")
        server.execute(f"CREATE TABLE {config.schema}.jobs (id int)")
        with pytest.raises(InvalidArgument, match="a schema of its own"):
            open_postgres(url, SystemClock(), IdSource(), config)

    def test_who_is_older_stops(
        self, server: PostgresServer, database: PostgresDatabase, config: PostgresConfig
    ) -> None:
        newer = FORMAT_VERSION + 1
        server.execute(f"UPDATE {config.schema}.store SET format_version = {newer}")
        assert _texts(database) == ["a", "b"], "reads go on until somebody looks"
        with pytest.raises(NewerFormat, match="install a newer OchreDB"), database.write():
            pass
        with pytest.raises(NewerFormat):
            _texts(database)
        with pytest.raises(InvalidArgument, match="install a newer OchreDB"):
            open_postgres(server.url, SystemClock(), IdSource(), config)

    def test_housekeeping_notices(
        self, server: PostgresServer, database: PostgresDatabase, config: PostgresConfig
    ) -> None:
        server.execute(f"UPDATE {config.schema}.store SET format_version = 99")
        with pytest.raises(NewerFormat):
            database.check_format()

    def test_a_migration_waits_for_writers_and_they_for_it(
        self, server: PostgresServer, database: PostgresDatabase, config: PostgresConfig
    ) -> None:
        lock = f"SELECT pg_try_advisory_xact_lock({database.lock_key})"
        with database.write() as session:
            session.run(sql("UPDATE things SET text = 'c'"))
            assert server.execute(lock) == [(False,)]
        assert server.execute(lock) == [(True,)]
        with psycopg.connect(server.url) as other:
            other.execute(f"SELECT pg_advisory_xact_lock({database.lock_key})".encode())
            hurried = replace(config, lock_timeout_s=0.2)
            writer = PostgresDatabase(server.url, hurried, SystemClock(), random.Random(1))
            with (
                contextlib.closing(writer),
                pytest.raises(Unavailable, match="too long"),
                writer.write(),
            ):
                pass

    def test_the_command_creates_and_migrates(
        self,
        url: str,
        config: PostgresConfig,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        arguments = ["migrate", "--catalog-url", url, "--catalog-schema", config.schema]
        assert main([*arguments, "--dry-run"]) == 0
        assert format_version(url, SystemClock(), config) is None
        assert main(arguments) == 0
        monkeypatch.setenv("OCHREDB_CATALOG_URL", url)  # As `ochredb serve` is told.
        monkeypatch.setenv("OCHREDB_CATALOG_SCHEMA", config.schema)
        assert main(["migrate"]) == 0
        told = capsys.readouterr().out.splitlines()
        assert told == [
            f"the catalog is not there yet and would get format version {FORMAT_VERSION}",
            "the catalog: created",
            f"the catalog has format version {FORMAT_VERSION} already",
        ]
        assert main(["migrate", "somewhere", "--catalog-url", url]) == 2


class TestTransactions:
    def test_an_exception_rolls_everything_back(self, database: PostgresDatabase) -> None:
        class Stop(Exception):
            pass

        def add_and_stop() -> None:
            with database.write() as session:
                session.run(sql(_ADD.format(3, "c")))
                session.later(sql(_ADD.format(4, "d")))
                raise Stop

        with pytest.raises(Stop):
            add_and_stop()
        assert _texts(database) == ["a", "b"]

    def test_what_is_sent_later_is_there_before_what_follows(
        self, database: PostgresDatabase
    ) -> None:
        with database.write() as session:
            session.later(sql(_ADD.format(3, "c")))
            assert session.all(sql("SELECT count(*) FROM things")) == [(3,)]
            session.run_many(sql("DELETE FROM things WHERE id = :n"), [{"n": 1}, {"n": 2}])
            found = session.each(sql("SELECT text FROM things WHERE id = :n"), [{"n": 1}, {"n": 3}])
            assert found == [[], [("c",)]]
            session.later(sql(_ADD.format(4, "d")))
        assert _texts(database) == ["c", "d"]

    def test_what_fails_later_fails_the_transaction(self, database: PostgresDatabase) -> None:
        def add_both() -> None:
            with database.write() as session:
                session.run(sql(_ADD.format(3, "c")))
                session.later(sql(_ADD.format(1, "again")))

        with pytest.raises(Aborted, match="nothing was changed"):
            add_both()
        assert _texts(database) == ["a", "b"]

    def test_a_reader_cannot_write(self, database: PostgresDatabase) -> None:
        with pytest.raises(Unavailable, match="readonly"), database.read() as session:
            session.run(sql(_ADD.format(3, "c")))
        with pytest.raises(Unavailable, match="read-only"), database.read_consistent() as session:
            session.run(sql(_ADD.format(3, "c")))

    def test_read_consistent_sees_one_state(self, database: PostgresDatabase) -> None:
        with database.read_consistent() as session:
            before = session.all(sql("SELECT * FROM things"))
            with database.write() as other:
                other.run(sql(_ADD.format(3, "c")))
            assert session.all(sql("SELECT * FROM things")) == before
            with database.read() as other:
                assert other.all(sql("SELECT count(*) FROM things")) == [(3,)]

    def test_a_deadlock_is_repeated_as_a_whole(self, database: PostgresDatabase) -> None:
        class Table:
            def __init__(self) -> None:
                self._db: Database = database
                self.meeting = threading.Barrier(2)
                self.attempts = 0

            @whole
            def swap(self, first: int, second: int) -> None:
                self.attempts += 1
                with self._db.write() as session:
                    session.run(sql(f"UPDATE things SET text = text || 'x' WHERE id = {first}"))
                    with contextlib.suppress(threading.BrokenBarrierError):
                        self.meeting.wait(0.5)
                    session.run(sql(f"UPDATE things SET text = text || 'x' WHERE id = {second}"))

        table = Table()
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(table.swap, 1, 2), pool.submit(table.swap, 2, 1)]:
                future.result()
        assert table.attempts > 2
        assert _texts(database) == ["axx", "bxx"]

    def test_a_lock_that_is_never_free_and_a_statement_that_never_ends(
        self, database: PostgresDatabase, config: PostgresConfig, url: str
    ) -> None:
        hurried = replace(config, lock_timeout_s=0.1, statement_timeout_s=0.3)
        other = PostgresDatabase(url, hurried, SystemClock(), random.Random(1))
        change = sql("UPDATE things SET text = 'z' WHERE id = 1")
        with contextlib.closing(other), database.write() as session:
            session.run(change)
            with pytest.raises(Unavailable, match="held what is to be"), other.write() as late:
                late.run(change)
            with pytest.raises(Unavailable, match="statement timeout"), other.read() as reader:
                reader.all(sql("SELECT pg_sleep(5)"))
        assert _texts(database) == ["z", "b"]

    def test_all_connections_in_use_is_told(
        self, database: PostgresDatabase, config: PostgresConfig, url: str
    ) -> None:
        few = replace(config, connections_max=1, wait_timeout_s=0.1)
        other = PostgresDatabase(url, few, SystemClock(), random.Random(1))
        with contextlib.closing(other), other.write():
            with other.read() as session:  # Those who read have connections of their own.
                assert session.one(sql("SELECT 1")) == (1,)
            with pytest.raises(Unavailable, match="are in use"), other.write():
                pass
        with pytest.raises(Unavailable, match="closed"), other.write():
            pass


class TestOutages:
    def test_a_connection_lost_within_a_transaction_changes_nothing(
        self, server: PostgresServer, database: PostgresDatabase
    ) -> None:
        def add_both() -> None:
            with database.write() as session:
                session.run(sql(_ADD.format(3, "c")))
                server.execute(f"SELECT pg_terminate_backend({_process(session)}, 5000)")
                session.run(sql(_ADD.format(4, "d")))

        with pytest.raises(Unavailable) as caught:
            add_both()
        assert not isinstance(caught.value, OutcomeUnknown)
        assert _texts(database) == ["a", "b"]

    @pytest.mark.parametrize("end", ["pg_terminate_backend", "pg_cancel_backend"])
    def test_a_commit_whose_end_nobody_saw_is_unknown(
        self, server: PostgresServer, database: PostgresDatabase, end: str
    ) -> None:
        """It waits for a standby, and an administrator ends the wait: the server says "success"."""
        processes: list[int] = []
        server.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        server.execute("SELECT pg_reload_conf()")

        def waits() -> bool:
            text = "SELECT wait_event FROM pg_stat_activity WHERE pid = " + str(processes[0])
            return bool(processes) and server.execute(text) == [("SyncRep",)]

        def end_it() -> None:
            _wait_until(lambda: processes and waits())
            server.execute(f"SELECT {end}({processes[0]})")

        def write() -> None:
            with database.write() as session:
                processes.append(_process(session))
                session.later(sql(_ADD.format(3, "c")))

        try:
            _wait_until(lambda: server.execute("SHOW synchronous_standby_names") == [("nobody",)])
            thread = threading.Thread(target=end_it)
            thread.start()
            with pytest.raises(OutcomeUnknown, match="commit"):
                write()
            thread.join()
        finally:
            server.execute("ALTER SYSTEM RESET synchronous_standby_names")
            server.execute("SELECT pg_reload_conf()")
        assert _texts(database) == ["a", "b", "c"]

    def test_a_timeout_does_not_end_a_commit(
        self, server: PostgresServer, database: PostgresDatabase, config: PostgresConfig, url: str
    ) -> None:
        hurried = replace(config, statement_timeout_s=0.2)
        other = PostgresDatabase(url, hurried, SystemClock(), random.Random(1))
        slow = (
            "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN PERFORM pg_sleep(0.6); RETURN NULL; END'"
        )
        with database.write() as session:
            session.run(sql(slow))
            session.run(
                sql(
                    "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON things DEFERRABLE"
                    " INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION dawdle()"
                )
            )
        with contextlib.closing(other):
            for number, send in ((3, "run"), (4, "later")):
                with other.write() as session:
                    getattr(session, send)(sql(_ADD.format(number, "c")))
        assert _texts(database) == ["a", "b", "c", "c"]

    def test_a_server_behind_a_network_that_swallows_everything_is_given_up(
        self,
        server: PostgresServer,
        database: PostgresDatabase,
        config: PostgresConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("ochredb.catalog.postgres._PATIENCE_S", 0.2)
        proxy = TcpProxy.start([(server.host, server.port)])
        through = f"postgresql://postgres@{proxy.host}:{proxy.port}/postgres"
        hurried = replace(config, statement_timeout_s=0.3, commit_timeout_s=0.5)
        other = PostgresDatabase(through, hurried, SystemClock(), random.Random(1))

        def swallow(when: str) -> None:
            with other.write() as session:
                session.run(sql(_ADD.format(3, when)))
                proxy.silent = True
                if when == "before the commit":
                    session.run(sql(_ADD.format(4, "d")))

        try:
            with contextlib.closing(other):
                with pytest.raises(Unavailable, match="no answer") as caught:
                    swallow("before the commit")
                assert not isinstance(caught.value, OutcomeUnknown)
                proxy.silent = False
                assert _texts(other) == ["a", "b"]
                with pytest.raises(OutcomeUnknown, match="no answer"):
                    swallow("at the commit")
                proxy.silent = False
                assert _texts(other) in (["a", "b"], ["a", "b", "at the commit"])
        finally:
            proxy.stop()

    @pytest.mark.parametrize("how", ["stop", "kill"])
    def test_it_is_used_again_as_soon_as_it_is_back(
        self, server: PostgresServer, database: PostgresDatabase, how: str
    ) -> None:
        with ThreadPoolExecutor(8) as pool:  # Several connections that will be dead.
            list(pool.map(lambda _: _texts(database), range(40)))
        getattr(server, how)()
        with pytest.raises(Unavailable, match="unavailable"):
            _texts(database)
        with pytest.raises(Unavailable, match="unavailable"), database.write():
            pass
        server.restart()
        assert _texts(database) == ["a", "b"]
        with database.write() as session:
            session.run(sql(_ADD.format(3, "c")))
        server.restart()  # Nobody was told.
        with database.write() as session:
            session.run(sql(_ADD.format(4, "d")))
        server.restart()
        assert _texts(database) == ["a", "b", "c", "d"]

    def test_a_standby_is_refused(
        self, server: PostgresServer, database: PostgresDatabase, tmp_path: Path
    ) -> None:
        """Also if the URL asks for any server that answers."""
        standby = server.standby(tmp_path)
        try:
            for url in (standby.url, f"{standby.url}?target_session_attrs=any"):
                with pytest.raises(Unavailable, match="standby"):
                    open_postgres(url, SystemClock(), IdSource(), database.config)
        finally:
            standby.stop()


class TestTexts:
    def test_any_text_is_kept_in_the_order_of_its_bytes(self, database: PostgresDatabase) -> None:
        names = [
            "abc",
            "Zebra",
            "_under",
            "a\0b",
            "a\1b",
            "a\1\2",
            "a\0\1\0",
            "ab",
            "Ärger",
            "日本",
            "a-b",
        ]
        namespace = Namespace(database, database.clock, IdSource())
        for name in random.Random(5).sample(names, len(names)):
            namespace.create_tenant(name * 3)
            assert namespace.get_tenant(name * 3)["name"] == name * 3
        with database.read() as session:
            found = session.all(sql("SELECT name FROM tenants ORDER BY name"))
        assert found == sorted(found)
        assert {name for (name,) in found} == {name * 3 for name in names}

    def test_a_name_that_no_index_takes_is_bad_input(self, database: PostgresDatabase) -> None:
        namespace = Namespace(database, database.clock, IdSource())
        rng = random.Random(3)
        longest = "".join(rng.choice("\0\1") for _ in range(1_000))
        namespace.create_tenant(longest)
        assert namespace.get_tenant(longest)["name"] == longest
        with pytest.raises(InvalidArgument, match="name has 1001 bytes"):
            namespace.create_tenant("x" * 1_001)

    def test_listing_takes_any_limit(self, database: PostgresDatabase) -> None:
        namespace = Namespace(database, database.clock, IdSource())
        assert namespace.list_databases(DEFAULT_TENANT, limit=None) == []


def test_every_statement_of_the_catalog_is_understood(database: PostgresDatabase) -> None:
    """Planned by the server, with parameters of no type: each must have the one it needs."""
    texts = statement._shipped()["postgresql"].values()
    assert len(texts) > 100
    connection = database.connect()
    with contextlib.closing(connection):
        for text, _ in texts:
            names = dict.fromkeys(re.findall(r"%\((\w+)\)s", text))
            connection.execute(f"EXPLAIN {text}".encode(), names)
