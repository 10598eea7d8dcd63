"""Stores that may only be read: mounted read-only, or another user's; with and without a log."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ochredb
from ochredb.api.exceptions import ChromaError
from ochredb.backup.source import Started
from ochredb.catalog.read_only import read_only_reason
from ochredb.clock import SystemClock
from ochredb.errors import Unavailable
from ochredb.integrity import check, check_store
from ochredb.integrity.unpinned import open_to_read
from ochredb.testing.server_process import ServerProcess, free_port
from ochredb.vacuum import vacuum

ROOT = Path(__file__).resolve().parents[2]  # Where processes that are started here run.


IDS = ["a", "b", "c"]
NOBODY = 65534
# Writes one more record for each line that it reads.
WRITER = """
import sys, ochredb
client = ochredb.PersistentClient(sys.argv[1])
found = client.get_or_create_collection("notes")
found.upsert(ids=["a", "b"], embeddings=[[1.0, 0.0], [2.0, 0.0]], documents=["x", "y"])
found.upsert(ids=["c"], embeddings=[[3.0, 0.0]], documents=["z"])
print("ready", flush=True)
for line in sys.stdin:
    found.upsert(ids=[line.strip()], embeddings=[[9.0, 9.0]])
    print("done", flush=True)
client.close() if hasattr(client, "close") else None
"""


class Writer:
    """A process that writes into a store until it is closed or killed."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self._expect("ready")

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == word

    def write(self, name: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        self._expect("done")

    def end(self, *, kill: bool) -> None:
        if kill:
            self._process.send_signal(signal.SIGKILL)
        self._process.communicate()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """An empty directory on a file system of its own; `freeze` makes that read-only."""
    point = tmp_path / "mounted"
    point.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(point)], capture_output=True
    )
    if made.returncode != 0:
        pytest.skip("NOT TESTED: no right to mount")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


def freeze(point: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)


def thaw(point: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(point)], check=True)


def files_of(point: Path) -> set[str]:
    return {path.name for path in point.iterdir()}


def temporary_copies() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("ochredb-read-only-*"))


@pytest.fixture(autouse=True)
def open_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that other users can get into, unlike pytest's; copies are made in one inside."""
    assert tmp_path.exists()  # Made before the place of temporary files is changed.
    folder = Path(tempfile.mkdtemp())
    os.chmod(folder, 0o755)
    copies = folder / "copies"
    copies.mkdir()
    os.chmod(copies, 0o1777)
    monkeypatch.setenv("TMPDIR", str(copies))
    monkeypatch.setattr("tempfile.tempdir", str(copies))
    yield folder
    shutil.rmtree(folder)


def check_reads(path: Path) -> None:
    """Everything is there, and every kind of write is refused by name."""
    client = ochredb.PersistentClient(str(path))
    try:
        found = client.get_or_create_collection("notes")
        assert found.get()["ids"] == IDS
        assert found.count() == 3
        assert found.query(query_embeddings=[[3.0, 0.0]], n_results=1)["ids"] == [["c"]]
        refused: list[Any] = [
            lambda: found.add(ids=["d"], embeddings=[[1.0, 1.0]]),
            lambda: found.add(ids=["d"], embeddings=[[1.0, 1.0]], documents=["x" * 600_000]),
            lambda: found.delete(ids=["a"]),
            lambda: found.delete(where_document={"$contains": "x"}),
            lambda: client.create_collection("new"),
            lambda: client.delete_collection("notes"),
            lambda: found.modify(name="other"),
        ]
        for write in refused:
            with pytest.raises(ChromaError, match="open for reading only"):
                write()
        assert found.get()["ids"] == IDS
    finally:
        client.close()
    assert temporary_copies() == []


def test_after_a_writer_was_killed(mounted: Path) -> None:
    """Its commits are in the write-ahead log only."""
    writer = Writer(mounted)
    writer.end(kill=True)
    assert {"ochredb.sqlite3-wal", "ochredb.sqlite3-shm"} <= files_of(mounted)
    freeze(mounted)
    check_reads(mounted)


def test_after_a_writer_was_killed_without_its_shared_memory(mounted: Path) -> None:
    writer = Writer(mounted)
    writer.end(kill=True)
    (mounted / "ochredb.sqlite3-shm").unlink()
    freeze(mounted)
    check_reads(mounted)


def test_a_vacuum_is_refused_in_words(mounted: Path, caplog: pytest.LogCaptureFixture) -> None:
    Writer(mounted).end(kill=False)
    freeze(mounted)
    with pytest.raises(Unavailable, match=r"failed: .* is open for reading only"):
        vacuum(str(mounted))
    assert "Traceback" not in caplog.text


def test_after_a_writer_has_ended_in_good_order(mounted: Path) -> None:
    writer = Writer(mounted)
    writer.end(kill=False)
    assert not {"ochredb.sqlite3-wal", "ochredb.sqlite3-shm"} & files_of(mounted)
    freeze(mounted)
    assert read_only_reason(str(mounted)) == "its file system is read-only"
    check_reads(mounted)
    client = ochredb.PersistentClient(str(mounted))
    assert len(temporary_copies()) == 1
    client.close()


def flip(path: Path, place: int) -> None:
    """One bit of a file, which keeps its size."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("killed", [True, False])
def test_it_can_be_checked(mounted: Path, killed: bool) -> None:
    """Where a failing disk is read-only, damage must be found all the same."""
    Writer(mounted).end(kill=False)  # Folds what it has, so that there is an object.
    if killed:
        Writer(mounted).end(kill=True)
    objects = [path for path in (mounted / "objects" / "parts").rglob("*") if path.is_file()]
    freeze(mounted)
    before = files_of(mounted)
    report = check(str(mounted))
    assert not report.is_damaged, report.findings
    assert report.objects == len(objects) > 0
    assert any("its file system is read-only" in note for note in report.notes)
    assert (files_of(mounted), temporary_copies()) == (before, [])
    thaw(mounted)
    flip(objects[0], 5)
    freeze(mounted)
    report = check(str(mounted))
    assert [finding.place for finding in report.findings] == [
        str(objects[0].relative_to(mounted / "objects"))
    ]
    if not killed:  # Then it is sealed.
        thaw(mounted)
        flip(mounted / "ochredb.sqlite3", 2_000)
        freeze(mounted)
        (finding,) = check(str(mounted)).findings
        assert finding.place == "catalog", finding
    assert temporary_copies() == []


def test_what_was_collected_while_nothing_was_pinned_is_no_damage(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may write: the state that is checked loses an object in the middle."""
    path = open_folder / "theirs"
    writer = Writer(path)
    writer.write("d")
    writer.end(kill=True)
    with ochredb.PersistentClient(str(path)) as client:
        big = client.create_collection("big")
        big.add(ids=["x"], embeddings=[[1.0, 1.0]], documents=["x" * 600_000])
        opened = open_to_read(str(path), SystemClock(), "a test says so")
        begin = opened.begin

        def then_drop(owner: str) -> Started:
            started = begin(owner)
            client.delete_collection("big")
            for name in (path / "objects" / "fragments").iterdir():
                name.unlink()  # As garbage collection does, a minute later.
            return started

        monkeypatch.setattr(opened, "begin", then_drop)
        with contextlib.closing(opened):
            report = check_store(opened, SystemClock())
    assert report.objects > 0
    assert not report.is_damaged, report.findings


def test_a_server_on_a_read_only_file_system(mounted: Path, tmp_path: Path) -> None:
    writer = Writer(mounted)
    writer.end(kill=True)
    freeze(mounted)
    command = [sys.executable, "-m", "ochredb_node.cli", "run", "--path", str(mounted), "--port"]
    port = free_port()
    with ServerProcess([*command, str(port)], port, tmp_path / "output") as server:
        url = f"{server.url}/api/v2/tenants/default_tenant/databases/default_database/collections"
        with urllib.request.urlopen(f"{url}/notes", timeout=30) as answer:
            found = json.load(answer)["id"]
        with urllib.request.urlopen(f"{url}/{found}/count", timeout=30) as answer:
            assert json.load(answer) == 3
        body = json.dumps({"ids": ["d"], "embeddings": [[1.0, 1.0]]}).encode()
        request = urllib.request.Request(
            f"{url}/{found}/add", body, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == 403
        text = json.load(refused.value)
        assert "open for reading only: its file system is read-only" in text["message"]
        assert not check(server.url).is_damaged


def test_nothing_is_made_on_a_read_only_file_system(mounted: Path) -> None:
    freeze(mounted)
    with pytest.raises(ChromaError, match="read-only file system"):
        ochredb.PersistentClient(str(mounted))


# Imports what it will need while it can: the interpreter's files may be out of reach afterwards.
AS_NOBODY = """
import os, sys, ochredb
import ochredb.catalog.read_only, ochredb_node.tidier
client = ochredb.PersistentClient(sys.argv[1] + "-of-its-own")
found = client.get_or_create_collection("notes")
found.add(ids=["x"], embeddings=[[1.0, 0.0]])
found.get(), found.count(), found.delete(ids=["x"])
try:
    client.create_collection("notes")
except Exception as error:
    print(error, file=sys.stderr)
client.close()
os.setgid({nobody}); os.setuid({nobody})
client = ochredb.PersistentClient(sys.argv[1])
found = client.get_collection("notes")
"""


def as_nobody(path: Path, steps: str) -> subprocess.Popen[str]:
    """A process of a user who may read everything and write nothing of the store."""
    script = AS_NOBODY.format(nobody=NOBODY) + steps
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


ANSWER = """
for line in sys.stdin:
    print(",".join(found.get()["ids"]), flush=True)
try:
    found.delete(ids=["a"])
except Exception as error:
    print(error, flush=True)
client.close()
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or not sys.platform.startswith("linux"),
    reason="NOT TESTED: permissions are tested by becoming another user",
)
def test_another_user_reads_what_writers_write_before_and_after_it_opens(open_folder: Path) -> None:
    """I4: beside a live writer, without one (from a copy), and when one comes back."""
    path = open_folder / "theirs"
    path.mkdir()
    writer = Writer(path)
    reader = as_nobody(path, ANSWER)
    assert reader.stdin is not None and reader.stdout is not None

    def seen() -> str:
        assert reader.stdin is not None and reader.stdout is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
        return reader.stdout.readline().strip()

    assert seen() == "a,b,c"
    writer.write("d")
    assert seen() == "a,b,c,d"
    writer.end(kill=True)
    assert seen() == "a,b,c,d"
    writer = Writer(path)
    writer.write("e")
    assert seen() == "a,b,c,d,e"
    writer.end(kill=False)
    late = as_nobody(path, ANSWER)
    writer = Writer(path)
    writer.write("f")
    writer.end(kill=False)
    answers, _ = late.communicate("\n")
    assert answers.splitlines()[0] == "a,b,c,d,e,f"
    assert "open for reading only: this user may not write there" in answers
    assert seen() == "a,b,c,d,e,f"
    reader.stdin.close()
    assert "open for reading only" in reader.stdout.read()
    reader.stdout.close()
    reader.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: see above")
def test_a_copy_is_made_anew_when_a_writer_comes(open_folder: Path) -> None:
    path = open_folder / "theirs"
    path.mkdir()
    Writer(path).end(kill=False)
    reader = as_nobody(path, ANSWER)
    assert reader.stdin is not None and reader.stdout is not None
    for name, expected in (("d", "a,b,c,d"), ("e", "a,b,c,d,e")):
        writer = Writer(path)
        writer.write(name)
        for _ in range(2):
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline().strip() == expected
        writer.end(kill=False)
    reader.communicate()
    assert temporary_copies() == []


def test_of_a_store_that_can_be_written_there_is_no_reason(tmp_path: Path) -> None:
    path = tmp_path / "ours"
    assert read_only_reason(str(path)) is None
    Writer(path).end(kill=False)
    assert read_only_reason(str(path)) is None
