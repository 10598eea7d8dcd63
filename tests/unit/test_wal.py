"""The write-ahead log as SQLite writes it is read as SQLite reads it."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from ochredb.catalog import wal


def _written(folder: Path, page_bytes: int) -> tuple[str, int]:
    """A database, and how many frames SQLite says its log has."""
    folder.mkdir()
    path = str(folder / "database")
    connection = sqlite3.connect(str(folder / "live"), isolation_level=None)
    connection.execute(f"PRAGMA page_size={page_bytes}")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA wal_autocheckpoint=0")
    connection.execute("CREATE TABLE things (number INTEGER PRIMARY KEY, text)")
    rng = random.Random(page_bytes)
    for _ in range(40):
        connection.execute("INSERT INTO things (text) VALUES (?)", (rng.randbytes(2_000),))
    for suffix in ("", "-wal"):
        shutil.copyfile(str(folder / "live") + suffix, path + suffix)
    frames = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1]
    connection.close()
    return path, frames


@pytest.mark.parametrize("page_bytes", [512, 4096, 8192, 65536])
def test_frames_are_those_that_sqlite_counts(tmp_path: Path, page_bytes: int) -> None:
    path, expected = _written(tmp_path / "a", page_bytes)
    with wal.opened(path) as log:
        assert log is not None
        headers, committed = log.whole_frames()
        assert committed == expected == len(headers.page)
        assert log.page_bytes == page_bytes
        assert log.headers(0).page.tolist() == headers.page.tolist()
        assert log.headers(3, 5).commit.tolist() == headers.commit[3:5].tolist()
        later, count = log.whole_frames(7)
        assert count == expected
        assert later.sums.tolist() == headers.sums[7:].tolist()
        for frames in (np.arange(expected), np.arange(2, expected, 3)):
            found = list(log.checked(frames, 0, headers))
            assert np.concatenate([numbers for numbers, _, _ in found]).tolist() == frames.tolist()
            for numbers, some, are_whole in found:
                assert are_whole.all()
                assert all(
                    (frame["words"] == log.content(number)["words"]).all()
                    for number, frame in zip(numbers, some, strict=True)
                )
        assert log.has_commit(expected - 1)
        assert not log.has_commit(expected)
        assert log.is_same()


def test_a_byte_that_changed_ends_the_log_as_it_does_for_sqlite(tmp_path: Path) -> None:
    path, frames = _written(tmp_path / "a", 4096)
    whole = Path(path + "-wal").read_bytes()
    rng = random.Random(1)
    for number in range(30):
        place = rng.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        copy = str(tmp_path / str(number))
        shutil.copyfile(path, copy)
        Path(copy + "-wal").write_bytes(damaged)
        with wal.opened(copy) as log:
            committed = 0 if log is None else log.whole_frames()[1]
        assert committed <= max(0, (place - wal.HEADER_BYTES) // (wal.FRAME_HEADER_BYTES + 4096))
        connection = sqlite3.connect(copy)
        row = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        connection.close()
        assert committed == max(0, row[1]) < frames


def test_a_frame_that_changed_is_told_from_the_others(tmp_path: Path) -> None:
    path, count = _written(tmp_path / "a", 4096)
    with wal.opened(path) as log:
        assert log is not None
        headers = log.headers(0)
        damaged = count // 2
        size = wal.FRAME_HEADER_BYTES + 4096
        with open(path + "-wal", "r+b") as file:
            file.seek(wal.HEADER_BYTES + damaged * size + wal.FRAME_HEADER_BYTES + 100)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
        frames = np.arange(count)
        found = np.concatenate([whole for _, _, whole in log.checked(frames, 0, headers)])
        assert np.flatnonzero(~found).tolist() == [damaged]


def test_no_log_and_what_is_none(tmp_path: Path) -> None:
    path = str(tmp_path / "database")
    for content in (None, b"", b"x" * 31, os.urandom(500)):
        if content is not None:
            Path(path + "-wal").write_bytes(content)
        with wal.opened(path) as log:
            assert log is None
