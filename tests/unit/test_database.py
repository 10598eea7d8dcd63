"""SQLite as a catalog: durable, fair, safe over a fork, honest when the disk is full (I1)."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, Text, bindparam, func, insert, select

from ochredb import crash_points
from ochredb.catalog.migrate import CATALOG_NAME, open_directory, open_memory
from ochredb.catalog.sqlite import SqliteDatabase, SqliteSession
from ochredb.catalog.statement import Statement
from ochredb.clock import SystemClock
from ochredb.errors import OutcomeUnknown, StorageFull, Unavailable
from ochredb.ids import IdSource
from ochredb.types import Op

from .kernel import ROOT, append, ids_of, make_collection, operations, running_node

_table = Table("things", MetaData(), Column("id", Integer, primary_key=True), Column("text", Text))
_ADD = Statement(insert(_table))
_COUNT = Statement(select(func.count()).select_from(_table))
_LONG = Statement(select(_table.c.id).where(_table.c.text == bindparam("text")))


@pytest.fixture(params=["file", "memory"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqliteDatabase]:
    if request.param == "memory":
        database, _ = open_memory(SystemClock(), IdSource())
    else:
        database, _ = open_directory(str(tmp_path), SystemClock(), IdSource())
    _make_table(database)
    with contextlib.closing(database):
        yield database


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SqliteDatabase]:
    database, _ = open_directory(str(tmp_path), SystemClock(), IdSource())
    _make_table(database)
    with contextlib.closing(database):
        yield database


def _make_table(database: SqliteDatabase) -> None:
    with database.write() as session:
        assert isinstance(session, SqliteSession)
        session.connection.execute("CREATE TABLE things (id INTEGER PRIMARY KEY, text TEXT)")


def _count(database: SqliteDatabase) -> int:
    with database.read() as session:
        row = session.one(_COUNT)
    assert row is not None
    return int(row[0])


def _add(database: SqliteDatabase, number: int, text: str = "") -> None:
    with database.write() as session:
        session.run(_ADD, id=number, text=text)


def _in_child(work: Callable[[], None]) -> None:
    """Run in a forked child; fails here if it fails there."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_every_connection_is_durable(file: SqliteDatabase) -> None:
    """I1 rests on these settings; synchronous=FULL (2) is per connection."""
    _add(file, 1)
    file.checkpoint()
    with file.read(), file.read():
        pass
    connections = list(file._connections)
    assert len(connections) == 4, "a writer, a checkpointer, two readers at once"
    for connection in connections:
        values = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "wal_autocheckpoint", "auto_vacuum")
        }
        assert values == {
            "journal_mode": "wal",
            "synchronous": 2,
            "wal_autocheckpoint": 0,
            "auto_vacuum": 2,  # Incremental.
        }
        assert connection.execute("PRAGMA page_size").fetchone()[0] == 8192
    if sys.platform == "darwin":
        assert all(c.execute("PRAGMA fullfsync").fetchone()[0] == 1 for c in connections)


def test_readers_cannot_write(file: SqliteDatabase) -> None:
    with pytest.raises(Unavailable, match="readonly"), file.read() as session:
        session.run(_ADD, id=1, text="")
    assert _count(file) == 0


def test_an_exception_rolls_everything_back(database: SqliteDatabase) -> None:
    class Stop(Exception):
        pass

    def add_both(first: int, second: int, error: Exception | None) -> None:
        with database.write() as session:
            session.run(_ADD, id=first, text="")
            if error is not None:
                raise error
            session.run(_ADD, id=second, text="")

    with pytest.raises(Stop):
        add_both(1, 2, Stop())
    assert _count(database) == 0
    with pytest.raises(Unavailable, match="UNIQUE"):
        add_both(2, 2, None)
    assert _count(database) == 0
    _add(database, 3)
    assert _count(database) == 1


def test_read_consistent_sees_one_state(file: SqliteDatabase) -> None:
    with file.read_consistent() as session:
        assert session.one(_COUNT) == (0,)
        _add(file, 1)
        assert session.one(_COUNT) == (0,)
        with file.read() as other:
            assert other.one(_COUNT) == (1,)
    assert _count(file) == 1


def test_in_memory_a_reader_never_sees_half_a_transaction() -> None:
    database, _ = open_memory(SystemClock(), IdSource())
    _make_table(database)
    stop, odd = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            odd.append(_count(database) % 2)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(0, 400, 2):
        with database.write() as session:
            session.run(_ADD, id=number, text="")
            session.run(_ADD, id=number + 1, text="")
    stop.set()
    reader.join()
    assert odd
    assert set(odd) == {0}
    with database.write() as session, database.read_consistent() as inner:
        session.run(_ADD, id=1_000, text="")
        assert inner.one(_COUNT) == (401,), "the transaction's own thread reads in it"
    database.close()


def test_connections_do_not_grow_with_the_number_of_threads(file: SqliteDatabase) -> None:
    for _ in range(60):
        thread = threading.Thread(target=_count, args=(file,))
        thread.start()
        thread.join()
    assert len(file._connections) <= 4


_WRITER = """
    import sys
    from ochredb.catalog.sqlite import SqliteDatabase
    from tests.unit.test_database import _add, _count

    database = SqliteDatabase(sys.argv[1] + "/ochredb.sqlite3",
                              write_lock_path=sys.argv[1] + "/write.lock")
    first = int(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    number = 0
    while _count(database) < 300:
        _add(database, first + number)
        number += 1
    print(number)
"""


def test_two_processes_write_fairly(file: SqliteDatabase, tmp_path: Path) -> None:
    """Without the queue in front of BEGIN IMMEDIATE the ratio was 30 to 1."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_WRITER), str(tmp_path), str(number * 10**6)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for number in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    counts = [int(writer.communicate(timeout=60)[0]) for writer in writers]
    assert _count(file) == sum(counts)
    assert min(counts) * 6 >= max(counts), counts


class TestFork:
    """The child forgets the parent's connections, opens its own, and nobody loses anything."""

    def test_child_and_parent_go_on(self, file: SqliteDatabase) -> None:
        _add(file, 1)
        assert _count(file) == 1

        def child() -> None:
            assert file._connections == [], "closed before the fork"
            assert _count(file) == 1
            _add(file, 2)
            file.close()

        _in_child(child)
        _in_child(lambda: _add(file, 3))
        _add(file, 4)
        assert _count(file) == 4

    def test_a_parent_that_closes_does_not_take_the_child_s_commits_along(
        self, file: SqliteDatabase, tmp_path: Path
    ) -> None:
        """I1. With an inherited table of locks it removed the log that the child was writing."""
        _add(file, 1)
        ready, closed = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _add(file, 2)
                os.write(ready[1], b"x")
                os.read(closed[0], 1)
                _add(file, 3)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.read(ready[0], 1)
        file.close()
        os.write(closed[1], b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for descriptor in (*ready, *closed):
            os.close(descriptor)
        connection = sqlite3.connect(tmp_path / CATALOG_NAME)
        assert connection.execute("SELECT id FROM things").fetchall() == [(1,), (2,), (3,)]
        connection.close()

    def test_while_other_threads_read_and_write(self, file: SqliteDatabase) -> None:
        """The fork waits for them; neither side finds the database locked afterwards."""
        stop = threading.Event()
        numbers = iter(range(10_000))

        def work(use: Callable[[], object]) -> None:
            while not stop.is_set():
                use()

        threads = [
            threading.Thread(target=work, args=(lambda: _add(file, next(numbers)),)),
            threading.Thread(target=work, args=(lambda: _count(file),)),
            threading.Thread(target=work, args=(file.checkpoint,)),
        ]
        for thread in threads:
            thread.start()
        try:
            for number in range(5):
                _in_child(partial(_add, file, 100_000 + number))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert _count(file) == next(numbers) + 5

    def test_in_the_middle_of_the_parent_s_transaction(self, file: SqliteDatabase) -> None:
        """The child neither commits it nor keeps its lock."""
        with file.write() as session:
            session.run(_ADD, id=1, text="")

            def child() -> None:
                assert _count(file) == 0

            _in_child(child)
        assert _count(file) == 1
        _in_child(lambda: _add(file, 2))
        assert _count(file) == 2

    def test_a_child_that_outlives_its_parent_does_not_keep_the_write_lock(
        self, file: SqliteDatabase
    ) -> None:
        """The descriptor of the lock is shared over a fork until the child closes its copy."""
        with file.write():
            descriptor = file._write_lock_fd
            used, wait = os.pipe(), os.pipe()
            child = os.fork()
            if child == 0:
                file._check()
                with contextlib.suppress(OSError):
                    os.fstat(descriptor)
                    os.write(used[1], b"still open")
                os.write(used[1], b".")
                os.read(wait[0], 1)
                os._exit(0)
            assert os.read(used[0], 100) == b"."
            os.write(wait[1], b"x")
            os.waitpid(child, 0)
        for descriptor in (*used, *wait):
            os.close(descriptor)

    def test_in_memory_the_child_has_a_copy(self) -> None:
        database, _ = open_memory(SystemClock(), IdSource())
        _make_table(database)
        _add(database, 1)

        def child() -> None:
            _add(database, 2)
            assert _count(database) == 2

        _in_child(child)
        assert _count(database) == 1
        database.close()


class TestCheckpoint:
    def test_it_moves_the_log_into_the_database(self, file: SqliteDatabase, tmp_path: Path) -> None:
        before = (tmp_path / CATALOG_NAME).stat().st_size
        for number in range(20):
            _add(file, number, "x" * 20_000)
        assert (tmp_path / CATALOG_NAME).stat().st_size == before
        file.checkpoint()
        assert (tmp_path / CATALOG_NAME).stat().st_size > before + 300_000

    def test_above_the_bound_the_log_starts_again(
        self, file: SqliteDatabase, tmp_path: Path
    ) -> None:
        wal = tmp_path / (CATALOG_NAME + "-wal")
        for number in range(20):
            _add(file, number, "x" * 20_000)
        size = wal.stat().st_size
        file.checkpoint(restart_above_bytes=100_000)
        for number in range(20, 30):
            _add(file, number, "x" * 20_000)
        assert wal.stat().st_size == size

    def test_writers_are_held_up_only_for_what_came_meanwhile(self, file: SqliteDatabase) -> None:
        file.checkpoint()
        asked: list[str] = []
        assert file._checkpointer is not None
        file._checkpointer.connection.set_trace_callback(asked.append)
        _add(file, 1)
        crash_points.observe(lambda at: _add(file, 2) if at == "checkpoint.copied" else None)
        try:
            file.checkpoint(restart_above_bytes=0)
        finally:
            crash_points.observe(None)
        copied = [one.partition("(")[2] for one in asked if "wal_checkpoint" in one]
        assert copied == ["PASSIVE)", "PASSIVE)", "RESTART)"]

    def test_a_reader_in_the_middle_is_not_in_the_way(self, file: SqliteDatabase) -> None:
        with file.read_consistent() as session:
            assert session.one(_COUNT) == (0,)
            _add(file, 1)
            file.checkpoint()
            assert session.one(_COUNT) == (0,)
        assert _count(file) == 1

    def test_free_pages_go_back(self, file: SqliteDatabase, tmp_path: Path) -> None:
        for number in range(40):
            _add(file, number, "x" * 50_000)
        with file.write() as session:
            assert isinstance(session, SqliteSession)
            session.connection.execute("DELETE FROM things")
        file.checkpoint()
        full = (tmp_path / CATALOG_NAME).stat().st_size
        file.release_free_pages(100_000)
        file.checkpoint()
        assert (tmp_path / CATALOG_NAME).stat().st_size < full / 2

    def test_in_memory_there_is_nothing_to_do(self) -> None:
        database, _ = open_memory(SystemClock(), IdSource())
        database.checkpoint()
        database.close()


def test_after_closing_everything_is_refused_and_nothing_is_lost(
    database: SqliteDatabase, tmp_path: Path
) -> None:
    _add(database, 1)
    database.close()
    database.close()
    for use in (lambda: _count(database), lambda: _add(database, 2), database.checkpoint):
        if use == database.checkpoint and not (tmp_path / CATALOG_NAME).exists():
            continue
        with pytest.raises(Unavailable, match="closed"):
            use()
    if (tmp_path / CATALOG_NAME).exists():
        connection = sqlite3.connect(tmp_path / CATALOG_NAME)
        assert connection.execute("SELECT id FROM things").fetchall() == [(1,)]
        connection.close()


class _FailingCommit:
    """A connection whose COMMIT fails, after or before it took effect."""

    def __init__(self, inner: sqlite3.Connection, *, landed: bool) -> None:
        self._inner, self._landed = inner, landed

    def execute(self, text: str, *arguments: Any) -> sqlite3.Cursor:
        if text == "COMMIT":
            if self._landed:
                self._inner.execute(text)
            raise sqlite3.OperationalError("disk I/O error")
        return self._inner.execute(text, *arguments)


@pytest.mark.parametrize("landed", [False, True])
def test_a_commit_that_fails_has_an_unknown_outcome(file: SqliteDatabase, landed: bool) -> None:
    _add(file, 1)
    writer = file._writer
    assert writer is not None
    failing = _FailingCommit(writer.connection, landed=landed)
    file._writer = SqliteSession(failing)  # type: ignore[arg-type]
    with pytest.raises(OutcomeUnknown):
        _add(file, 2)
    file._writer = writer
    assert _count(file) == 1 + landed
    _add(file, 3)


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="NOT TESTED: mounts a small file system"
)
def test_a_full_disk_refuses_writes_and_the_store_goes_on_after_it(tmp_path: Path) -> None:
    """I12: a clear error, nothing half done, nothing to repair."""
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(mount)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("NOT TESTED: mounting is not permitted here")
    try:
        with running_node(str(mount)) as node:
            collection = make_collection(node)
            append(node, collection, operations(Op.ADD, ["first"], [[1.0]]))
            (mount / "ballast").write_bytes(bytes(6 << 20))
            acknowledged = ["first"]
            refusals: list[StorageFull] = []
            for number in range(200):
                for size in (150_000, 300_000):  # Inline, and as an object.
                    name = f"{number}-{size}"
                    request = operations(Op.ADD, [name], [[1.0]], documents=["x" * size])
                    try:
                        append(node, collection, request)
                    except StorageFull as error:
                        refusals.append(error)
                    else:
                        acknowledged.append(name)
                if len(refusals) >= 4:
                    break
            assert len(refusals) >= 4
            assert all("space" in str(item) for item in refusals), refusals
            assert ids_of(node, collection) == acknowledged
            append(node, collection, operations(Op.DELETE, ["first"]))
            acknowledged.remove("first")
            (mount / "ballast").unlink()
            append(node, collection, operations(Op.ADD, ["after"], [[1.0]]))
            acknowledged.append("after")
            assert ids_of(node, collection) == acknowledged
        with running_node(str(mount)) as node:
            assert ids_of(node, collection) == acknowledged
    finally:
        subprocess.run(["umount", str(mount)], check=True)
