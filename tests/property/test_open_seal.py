"""The seal of a catalog that is open: whatever is done to a whole one, it is never accused; and
where the seal speaks, no byte of the file could be another one.

Writers, checkpoints of every kind, kills at every durable step, torn copies, forks, and tools that
know nothing of seals take turns, drawn from a seed.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ochredb import crash_points
from ochredb.catalog import shrink, wal
from ochredb.catalog.migrate import CATALOG_NAME, open_directory
from ochredb.catalog.seal import SEAL_FILE
from ochredb.catalog.seal_check import compare
from ochredb.catalog.seal_format import CLOSED, decode
from ochredb.catalog.sqlite import SqliteDatabase, SqliteSession
from ochredb.clock import SystemClock
from ochredb.ids import IdSource

STEPS = 60
POINTS = (
    "seal.opened", "seal.removed", "seal.synced", "seal.renamed", "seal.begun",
    "checkpoint.copied", "seal.settled", "seal.closed",
)  # fmt: skip


class Life:
    """One catalog and those who use it. spoke, silent: how often the seal could tell or not."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self._folder, self._rng = folder, rng
        self._number = 0
        self.root = str(folder / "0")
        os.makedirs(self.root)
        self.users: list[SqliteDatabase] = []
        self._readers: list[sqlite3.Connection] = []
        self.spoke = self.silent = 0
        self.open()
        with self.user.write("tenant-create") as session:
            assert isinstance(session, SqliteSession)
            session.connection.execute("CREATE TABLE things (number INTEGER PRIMARY KEY, text)")

    @property
    def user(self) -> SqliteDatabase:
        return self._rng.choice(self.users)

    def open(self) -> None:
        if len(self.users) < 3:
            self.users.append(open_directory(self.root, SystemClock(), IdSource())[0])

    def close(self) -> None:
        self.stop_reading()  # In this process, whose locks are one's when files are closed.
        user = self.user
        self.users.remove(user)
        user.close()
        if not self.users:
            self.open()

    def write(self) -> None:
        with self.user.write("tenant-create") as session:
            assert isinstance(session, SqliteSession)
            for _ in range(self._rng.choice([1, 1, 3, 40])):
                text = self._rng.randbytes(self._rng.choice([10, 3_000, 30_000]))
                session.connection.execute("INSERT INTO things (text) VALUES (?)", (text,))

    def take_back(self) -> None:
        with contextlib.suppress(ZeroDivisionError), self.user.write("tenant-create") as session:
            assert isinstance(session, SqliteSession)
            session.connection.execute("PRAGMA cache_size=5")  # Pages are spilled to the log.
            for _ in range(30):
                text = self._rng.randbytes(20_000)
                session.connection.execute("INSERT INTO things (text) VALUES (?)", (text,))
            raise ZeroDivisionError

    def delete(self) -> None:
        with self.user.write("tenant-create") as session:
            assert isinstance(session, SqliteSession)
            share = self._rng.choice([2, 5])
            session.connection.execute(f"DELETE FROM things WHERE number % {share} = 0")

    def free(self) -> None:
        self.user.release_free_pages(self._rng.choice([1, 100]))

    def rewrite(self) -> None:
        if not self._readers:
            shrink.rewrite(self.user)

    def checkpoint(self) -> None:
        self.user.checkpoint()

    def restart(self) -> None:
        if not self._readers:
            self.user.checkpoint(restart_above_bytes=0)

    def cut_log(self) -> None:
        shrink.cut_log(self.user)

    def fork(self) -> None:
        user = self.user
        user.before_fork()
        user.after_fork_in_parent()

    def read_long(self) -> None:
        reader = self._foreign()
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM things").fetchone()
        self._readers.append(reader)

    def stop_reading(self) -> None:
        while self._readers:
            self._readers.pop().close()

    def _foreign(self) -> sqlite3.Connection:
        return sqlite3.connect(os.path.join(self.root, CATALOG_NAME), isolation_level=None)

    def others_look(self) -> None:
        connection = self._foreign()
        connection.execute("SELECT count(*) FROM things").fetchone()
        connection.close()

    def others_write(self) -> None:
        if self._is_closed():  # As it was closed, it is not.
            return
        connection = self._foreign()
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("INSERT INTO things (text) VALUES ('others')")
        connection.close()

    def _is_closed(self) -> bool:
        sealed = decode(Path(self.root, SEAL_FILE).read_bytes()) if self._is_sealed() else None
        return sealed is not None and sealed.state.kind == CLOSED

    def _is_sealed(self) -> bool:
        return os.path.exists(os.path.join(self.root, SEAL_FILE))

    def others_checkpoint(self) -> None:
        connection = self._foreign()
        how = self._rng.choice(["PASSIVE", "PASSIVE", "RESTART", "TRUNCATE"])
        connection.execute("PRAGMA busy_timeout=0")
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute(f"PRAGMA wal_checkpoint({how})")
        connection.close()

    def kill(self) -> None:
        """Go on with a copy, as if everybody had been killed."""
        self._go_on(self.copy())

    def kill_in_a_checkpoint(self) -> None:
        """After some of the pages were copied, and one of them only in part."""
        copies: list[str] = []

        def begun(point: str) -> None:
            if point == "seal.begun" and not copies:
                copies.append(self.copy())
                _copy_some(copies[0], self._rng)

        with _observed(begun):
            self.user.checkpoint()
        if copies:
            self._go_on(copies[0])

    def kill_at_a_step(self) -> None:
        copies: list[str] = []
        wanted = self._rng.choice(POINTS)

        def at(point: str) -> None:
            if point == wanted and not copies:
                copies.append(self.copy())

        with _observed(at):
            for work in (self.write, self.checkpoint, self.write, self.close):
                work()
        if copies:
            self._go_on(copies[0])

    def _go_on(self, root: str) -> None:
        self.stop_reading()
        for user in self.users:
            user.close()
        self.users = []
        self.root = root
        self.look(root)
        if self._rng.randrange(3) == 0:
            self.others_look()
        self.open()

    def copy(self) -> str:
        """By another process: closing the files would drop this one's locks of them."""
        self._number += 1
        root = str(self._folder / str(self._number))
        subprocess.run(["cp", "-a", self.root, root], check=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(root, CATALOG_NAME + "-shm"))
        return root

    def look(self, root: str | None = None) -> None:
        """Is it accused, and is what the seal speaks of really watched?"""
        for user in self.users:
            assert user.seal is not None
            assert user.seal.problem() is None
        root = root or self.copy()
        seal, catalog = os.path.join(root, SEAL_FILE), os.path.join(root, CATALOG_NAME)
        before = Path(seal).read_bytes() if os.path.exists(seal) else None
        compared = compare(seal, catalog)
        if compared is None:
            self.silent += 1
            if before is not None:  # `compare` may have taken it away.
                Path(seal).write_bytes(before)
            return
        assert compared.problem is None
        self.spoke += 1
        if root == self.root:
            return
        with wal.opened(catalog) as log:
            logged = set() if log is None else set(log.whole_frames()[0].page.tolist())
        page_bytes = compared.sealed.block_bytes
        pages = [
            page for page in range(os.path.getsize(catalog) // page_bytes) if page + 1 not in logged
        ]
        if not pages:
            return
        page = self._rng.choice(pages)
        status = os.stat(catalog)
        place = page * page_bytes + self._rng.randrange(page_bytes)
        with open(catalog, "r+b") as file:
            file.seek(place)
            was = file.read(1)[0]
            file.seek(place)
            file.write(bytes([was ^ 1 << self._rng.randrange(8)]))
        os.utime(catalog, ns=(status.st_atime_ns, status.st_mtime_ns))
        found = compare(seal, catalog)
        assert found is not None
        unknown = page >= len(compared.sealed.checksums) or compared.sealed.checksums[page] == 0
        assert unknown or self._behind_the_end(catalog, page) or found.wrong == [page]

    def _behind_the_end(self, catalog: str, page: int) -> bool:
        """Of the database, as some commit in the log says."""
        with wal.opened(catalog) as log:
            if log is None:
                return False
            commits = log.whole_frames()[0].commit
        return bool(((commits > 0) & (commits <= page)).any())


@contextlib.contextmanager
def _observed(observer: Callable[[str], None]) -> Iterator[None]:
    crash_points.observe(observer)
    try:
        yield
    finally:
        crash_points.observe(None)


def _copy_some(root: str, rng: random.Random) -> None:
    catalog = os.path.join(root, CATALOG_NAME)
    with wal.opened(catalog) as log:
        assert log is not None
        headers, _ = log.whole_frames()
        latest = {page: frame for frame, page in enumerate(headers.page.tolist())}
        chosen = rng.sample(sorted(latest), rng.randrange(len(latest) + 1))
        with open(catalog, "r+b") as file:
            for number, page in enumerate(chosen):
                content = log.content(latest[page])["words"].tobytes()
                file.seek((page - 1) * log.page_bytes)
                file.write(content[: 4096 if number == 0 else None])


@pytest.mark.parametrize("seed", range(int(os.environ.get("OCHREDB_SEAL_SEEDS", "12"))))
def test_a_whole_catalog_is_never_accused(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    life = Life(tmp_path, rng)
    works = [
        *[life.write] * 6, life.delete, life.take_back, *[life.checkpoint] * 5, life.restart,
        life.free, life.rewrite, life.cut_log, life.fork, life.open, life.close, life.read_long,
        *[life.stop_reading] * 2, life.kill, life.kill_in_a_checkpoint, life.kill_at_a_step,
    ]  # fmt: skip
    if seed % 2:
        works += [life.others_look, life.others_write, life.others_checkpoint]
    for _ in range(STEPS):
        rng.choice(works)()
        life.look()
    assert life.spoke > (STEPS // 4 if seed % 2 == 0 else 0), (life.spoke, life.silent)
    life.stop_reading()
    for user in life.users:
        user.close()
