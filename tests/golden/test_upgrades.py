"""Migrations: crashes at every step, releases of different age at once, older processes at work."""

from __future__ import annotations

import contextlib
import importlib
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import httpx
import pytest

from ochredb.cancel import Cancel
from ochredb.catalog import migrate
from ochredb.catalog.migrate import CATALOG_NAME, format_version, open_directory
from ochredb.catalog.schema import FORMAT_VERSION
from ochredb.clock import SystemClock
from ochredb.errors import InvalidArgument, NewerFormat
from ochredb.ids import IdSource
from ochredb.integrity import check
from ochredb.parts.arrays import read_directory, write_directory
from ochredb.testing.server_process import ochredb_server
from ochredb.types import Op, Operations
from ochredb_node import foundation
from ochredb_node.cli import main
from ochredb_node.node import Node, NodeConfig

from . import test_can_read_old as golden
from .make import rows
from .stores import HERE, VERSIONS, become_next_release, rebuild

ROOT = HERE.parent.parent
OLD = [name for name in VERSIONS if name != f"v{FORMAT_VERSION}"]
_API = "/api/v2/tenants/default_tenant/databases/default_database/collections"


def _tables(path: Path) -> list[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(path / CATALOG_NAME)) as connection:
        return sorted(connection.execute("SELECT name, sql FROM sqlite_master"))


def _checked(path: Path) -> None:
    """The store answers what was written by the release that made it."""
    node = Node(NodeConfig(path=str(path)))
    node.start(background=False)
    assert golden._rows(node) == golden._expected()
    node.close()


_CRASHER = """
    import os, signal, sys
    from pathlib import Path
    import alembic.command, sqlalchemy  # Once, not in each child.
    from ochredb.catalog import migrate
    from ochredb.clock import SystemClock
    from ochredb.ids import IdSource
    from tests.golden.stores import rebuild

    def open_until(path, statements):
        left, connect = [statements], migrate._connect

        def connected(path):
            connection = connect(path)

            def before(_statement):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            connection.set_trace_callback(before)
            return connection

        migrate._connect = connected
        migrate.open_directory(path, SystemClock(), IdSource())[0].close()

    version, root = sys.argv[1], Path(sys.argv[2])
    for statements in range(1_000):
        path = root / str(statements)
        if version == "new":
            path.mkdir()
        else:
            rebuild(version, path)
        child = os.fork()
        if child == 0:
            open_until(str(path), statements)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
    print(statements)
"""


@pytest.mark.parametrize("version", ["new", *OLD])
def test_a_kill_at_every_statement_leaves_the_old_format_or_the_new(
    version: str, tmp_path: Path
) -> None:
    """I1: SIGKILL before each statement of a creation or a migration, then an ordinary start."""
    (tmp_path / "stores").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(_CRASHER), version, str(tmp_path / "stores")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    count = int(done.stdout)
    assert count > 10
    if version != "new":
        rebuild(version, tmp_path / "before")
    rebuild(VERSIONS[-1], tmp_path / "after")
    _checked(tmp_path / "after")
    finished = 0
    for number in range(count + 1):
        path = tmp_path / "stores" / str(number)
        found = format_version(str(path))
        finished += found == FORMAT_VERSION
        if version == "new":
            assert found in (None, FORMAT_VERSION)
            if found is None and (path / CATALOG_NAME).exists():
                assert _tables(path) == []
            open_directory(str(path), SystemClock(), IdSource())[0].close()
            assert format_version(str(path)) == FORMAT_VERSION
            continue
        if found != FORMAT_VERSION:
            assert f"v{found}" == version
            assert _tables(path) == _tables(tmp_path / "before")
        _checked(path)
        names = [name for name, _ in _tables(path)]
        assert names == [name for name, _ in _tables(tmp_path / "after")]
    assert finished >= 1


@pytest.mark.parametrize("version", OLD)
def test_an_old_store_answers_the_same_and_lives_on(version: str, tmp_path: Path) -> None:
    """Migrated, then folded, merged, overwritten, collected; and opened again."""
    rebuild(version, tmp_path)
    node = Node(NodeConfig(path=str(tmp_path)))
    node.start(background=False)
    collection = golden._collection(node)
    assert golden._rows(node) == golden._expected()
    node.compactor.compact_now(collection)
    assert golden._rows(node) == golden._expected()
    before = {item.key for item in node.store.list("parts/")}
    names = [row["id"] for row in golden._expected()]
    for _ in range(4):  # More than four small parts: they are merged.
        node.log.append(
            collection,
            Operations(op=Op.UPDATE, ids=names, uris=["new"] * len(names)),
            cancel=Cancel(),
        )
        node.compactor.compact_now(collection)
    expected = [{**row, "uri": "new"} for row in golden._expected()]
    assert golden._rows(node) == expected
    node.close()
    node = Node(NodeConfig(path=str(tmp_path)))
    node.start(background=False)
    later = SystemClock().now_us() + 3_600_000_000
    node.versions.release_replaced(later, 100)
    world = node.compactor._world
    assert world.objects.mark_due(later, 1_000)
    node.compactor.collect_now(sweep_orphans=False)
    assert before.isdisjoint(item.key for item in node.store.list("parts/"))
    assert golden._rows(node) == expected
    node.close()


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """This process is of the release after this one."""
    monkeypatch.setattr(migrate, "STEPS", migrate.STEPS)
    monkeypatch.setattr(migrate, "FORMAT_VERSION", FORMAT_VERSION)
    return become_next_release(tmp_path / "steps")


def test_an_older_server_at_work_refuses_to_go_on(tmp_path: Path, next_release: int) -> None:
    """Its next write is refused inside its transaction, its reads about a second later."""
    data = tmp_path / "data"
    rebuild(VERSIONS[-1], data)
    with ochredb_server(data) as server, httpx.Client(base_url=server.url) as http:
        found = http.get(f"{_API}/golden").json()["id"]
        body = {"ids": ["new"], "embeddings": [[1, 2, 3, 4]]}
        assert http.post(f"{_API}/{found}/add", json=body).status_code == 201
        database, _ = open_directory(str(data), SystemClock(), IdSource())
        database.close()
        refused = http.post(f"{_API}/{found}/add", json=body)
        assert refused.status_code == 503
        message = refused.json()["message"]
        assert (
            f"format version {next_release}; this OchreDB reads up to {FORMAT_VERSION}" in message
        )
        while (answer := http.get(f"{_API}/{found}/count")).status_code == 200:
            assert answer.json() == len(golden._expected()) + 1
        assert (answer.status_code, answer.json()["message"]) == (503, message)
    assert server.output_tail().count("Traceback") == 0
    with pytest.raises(Exception, match=rf"format version {next_release}; .*install a newer"):
        ochredb_server(data).start()
    assert format_version(str(data)) == next_release


def test_an_embedded_process_notices_too(tmp_path: Path, next_release: int) -> None:
    data = tmp_path / "data"
    rebuild(VERSIONS[-1], data)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(migrate, "FORMAT_VERSION", FORMAT_VERSION)
    old = Node(NodeConfig(path=str(data)))
    old.start(background=False)
    collection = golden._collection(old)
    monkey.undo()
    database, _ = open_directory(str(data), SystemClock(), IdSource())
    assert golden._rows(old) == golden._expected(), "until it looks"
    for _ in range(2):
        with pytest.raises(NewerFormat, match=f"{next_release}; this OchreDB reads up to"):
            old.log.append(collection, rows(200, 1), cancel=Cancel())
        with pytest.raises(NewerFormat):
            old.compactor.compact_now(collection)
        with pytest.raises(NewerFormat):
            golden._rows(old)
    old.close()
    with database.write():
        pass
    database.close()


def test_a_process_that_only_reads_notices_too(
    tmp_path: Path, next_release: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    rebuild(VERSIONS[-1], data)
    monkeypatch.setattr(foundation, "read_only_reason", lambda _path: "a test")
    reader = Node(NodeConfig(path=str(data)))
    reader.start()
    assert golden._rows(reader) == golden._expected()
    open_directory(str(data), SystemClock(), IdSource())[0].close()
    assert format_version(str(data)) == next_release

    def read_on() -> None:
        while golden._rows(reader) == golden._expected():
            time.sleep(0.05)

    with pytest.raises(NewerFormat, match=f"{next_release}; this OchreDB reads up to"):
        read_on()
    reader.close()
    again = Node(NodeConfig(path=str(data)))
    with pytest.raises(InvalidArgument, match="install a newer OchreDB"):
        again.start()


_OPENER = """
    import sys
    from pathlib import Path
    from ochredb.catalog import migrate
    from ochredb.clock import SystemClock
    from ochredb.errors import InvalidArgument
    from ochredb.ids import IdSource
    from tests.golden.stores import become_next_release

    if sys.argv[2] != "old":
        become_next_release(Path(sys.argv[2]))
    sys.stdin.readline()
    try:
        database, store_id = migrate.open_directory(sys.argv[1], SystemClock(), IdSource())
    except InvalidArgument as error:
        assert sys.argv[2] == "old" and "install a newer OchreDB" in str(error), error
        print("refused")
    else:
        print(store_id)
        database.close()
"""


@pytest.mark.parametrize("version", OLD)
def test_two_releases_open_one_store_at_once(version: str, tmp_path: Path) -> None:
    rebuild(version, tmp_path / "data")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_OPENER), str(tmp_path / "data"), release],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for release in ("old", str(tmp_path / "one"), "old", str(tmp_path / "two"))
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=100)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert answers[1] == answers[3] != "refused"
    assert {answers[0], answers[2]} <= {"refused", answers[1]}
    assert format_version(str(tmp_path / "data")) == FORMAT_VERSION + 1


def test_the_command_migrates_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    rebuild("v1", data)
    before = (data / CATALOG_NAME).read_bytes()
    assert main(["migrate", str(data), "--dry-run"]) == 0
    assert (
        f"format version 1 and would get format version {FORMAT_VERSION}" in capsys.readouterr().out
    )
    assert (data / CATALOG_NAME).read_bytes() == before
    assert main(["migrate", str(data)]) == 0
    assert f"from format version 1 to {FORMAT_VERSION}" in capsys.readouterr().out
    assert main(["migrate", str(data)]) == 0
    assert "already" in capsys.readouterr().out
    _checked(data)
    with contextlib.closing(sqlite3.connect(data / CATALOG_NAME)) as connection:
        connection.execute("UPDATE store SET format_version = 99")
        connection.commit()
    assert main(["migrate", str(data)]) == 1
    assert f"99; this OchreDB reads up to {FORMAT_VERSION}" in capsys.readouterr().err
    assert main(["migrate", str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "nowhere").exists()


def test_a_section_of_a_newer_release_is_named_with_both_versions() -> None:
    sections = {"ids/directory": memoryview(write_directory({"format": 2}))}
    with pytest.raises(NewerFormat, match="ids/directory of a part has format version 2"):
        read_directory(sections.get, "ids/directory", 1)


def test_a_newer_store_is_refused_and_not_touched(tmp_path: Path, next_release: int) -> None:
    rebuild(VERSIONS[-1], tmp_path / "data")
    open_directory(str(tmp_path / "data"), SystemClock(), IdSource())[0].close()
    before = (tmp_path / "data" / CATALOG_NAME).read_bytes()
    monkey = pytest.MonkeyPatch()
    monkey.setattr(migrate, "FORMAT_VERSION", FORMAT_VERSION)
    with pytest.raises(
        InvalidArgument, match=f"{next_release}; this OchreDB reads up to {FORMAT_VERSION}"
    ):
        open_directory(str(tmp_path / "data"), SystemClock(), IdSource())
    with pytest.raises(InvalidArgument, match="install a newer OchreDB"):
        check(str(tmp_path / "data"))  # It is not damaged.
    assert main(["repair", str(tmp_path / "data")]) == 1
    monkey.undo()
    assert (tmp_path / "data" / CATALOG_NAME).read_bytes() == before


def test_an_older_store_that_may_only_be_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuild(VERSIONS[0], tmp_path / "data")
    module = importlib.import_module("ochredb.integrity.check")  # Not the function.
    monkeypatch.setattr(module, "read_only_reason", lambda _: "a test says so")
    with pytest.raises(InvalidArgument, match="open it once where it can be written"):
        check(str(tmp_path / "data"))
