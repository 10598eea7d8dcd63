"""A catalog's write-ahead log gives its space back when nothing is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ochredb.catalog.migrate import CATALOG_NAME, open_directory
from ochredb.catalog.sqlite import SqliteDatabase
from ochredb.clock import SystemClock
from ochredb.ids import IdSource

from .test_database import _COUNT, _add, _count, _make_table


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SqliteDatabase]:
    database, _ = open_directory(str(tmp_path), SystemClock(), IdSource())
    _make_table(database)
    with contextlib.closing(database):
        yield database


def test_when_nothing_is_written_the_log_takes_no_space(
    file: SqliteDatabase, tmp_path: Path
) -> None:
    wal = tmp_path / (CATALOG_NAME + "-wal")
    for number in range(30):
        _add(file, number, "x" * 100_000)
    size = wal.stat().st_size
    assert size > 2_000_000
    assert not file.checkpoint(), "written since the last call"
    _add(file, 30)
    assert not file.checkpoint()
    assert wal.stat().st_size == size, "the next writes go there"
    assert file.checkpoint()
    assert wal.stat().st_size == 0
    _add(file, 31)
    assert not file.checkpoint()
    assert _count(file) == 32


def test_cutting_the_log_does_not_wait_for_a_reader(file: SqliteDatabase, tmp_path: Path) -> None:
    wal = tmp_path / (CATALOG_NAME + "-wal")
    for number in range(30):
        _add(file, number, "x" * 100_000)
    with file.read_consistent() as session:
        assert session.one(_COUNT) == (30,)
        for _ in range(3):
            file.checkpoint()
        assert session.one(_COUNT) == (30,)
    _add(file, 30)
    for _ in range(2):
        file.checkpoint()
    assert wal.stat().st_size == 0
    assert _count(file) == 31
