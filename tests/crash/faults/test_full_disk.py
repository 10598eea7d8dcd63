"""A disk that is really full: nothing acknowledged is lost, reads go on, writes resume (I12)."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path

from ochredb.integrity import check

from .conftest import Connect
from .support import (
    Written,
    eager_server,
    fill,
    part_files,
    process_time_s,
    small_disk,
    temporary_files,
    wait_until,
)

SIZES = (200, 100_000, 900_000)  # In the log's row, and as an object.


def refused_until_full(written: Written, refusals: int) -> list[str]:
    """Write records of all sizes until so many writes of each were refused; the refusals' texts."""
    texts: list[str] = []
    left = dict.fromkeys(SIZES, refusals)
    number = 0
    while any(left.values()):
        size = SIZES[number % 3]
        number += 1
        answer = written.add(size, "upsert" if number % 2 else "add")
        if answer.status not in (200, 201):
            assert answer.status == 507, answer
            assert int(answer.headers["retry-after"]) >= 1
            texts.append(answer.body["message"])
            left[size] = max(0, left[size] - 1)
        assert number < 2000, "the disk does not get full"
    return texts


def objects_of(data: Path, collection: str) -> list[Path]:
    """Files that a collection refers to now."""
    with contextlib.closing(
        sqlite3.connect(f"file:{data}/ochredb.sqlite3?mode=ro", uri=True)
    ) as db:
        rows = db.execute("SELECT key FROM object_references WHERE collection = ?", [collection])
        return [data / "objects" / key for (key,) in rows]


def test_a_full_disk(tmp_path: Path, connect: Connect) -> None:
    with small_disk(tmp_path / "disk", "64m") as disk:
        data, ballast = disk / "data", disk / "ballast"
        with eager_server(data, tmp_path / "server.log") as server:
            client = connect(server)
            kept = Written(client, client.create("kept"))
            dropped = Written(client, client.create("dropped"))
            for _ in range(3):
                assert dropped.add(900_000).status == 201
            wait_until((data / "reserve").exists, "space is kept back")
            ballast.write_bytes(bytes(38 << 20))  # More than a part of all that fits beside it.
            texts = refused_until_full(kept, 3)
            assert all(str(data) in text and "bytes free" in text for text in texts)
            fill(disk / "more")

            # Reads go on, other writes are refused, and so is what is new.
            kept.check()
            for source in (server.url, str(data)):
                report = check(source)
                assert not report.is_damaged, report.findings
                assert report.objects > 0
            assert kept.add(10).status == 507
            assert client.call("POST", "collections", {"name": "another"}).status == 507
            # Deletes are taken.
            name = next(iter(kept.documents))
            answer = kept.delete(name)
            assert answer.status == 200, answer
            kept.check()
            # Compaction, merging, collecting and checkpoints meet the full disk again and again.
            time.sleep(4)
            kept.check()
            assert temporary_files(data) == []
            used = process_time_s(server.pid)
            time.sleep(2)
            assert process_time_s(server.pid) - used < 1.0, "background work spins"
            # A collection can be dropped, and gives its space back.
            kept_alive = objects_of(data, dropped.collection)
            assert kept_alive, "in fragments, or folded into parts already"
            assert client.call("DELETE", "collections/dropped").status == 200
            wait_until(
                lambda: not any(path.exists() for path in kept_alive),
                "the dropped collection's objects are collected",
            )
            kept.check()

            # Started on the full disk, after a kill and after a stop: as before.
            for number in range(2):
                # With what deletes may have used up a start needs no more space.
                os.truncate(ballast, ballast.stat().st_size - (8 << 20))
                wait_until((data / "reserve").exists, "space is kept back again")
                fill(disk / f"yet-more-{number}")
                if number == 0:
                    server.kill()
                else:
                    assert server.stop() == 0
                fill(disk / f"even-more-{number}")
                assert not check(str(data)).is_damaged, "nobody else has it open"
                server.start()
                kept.client = client = connect(server)
                kept.check()
                # Opening it may have folded the write-ahead log, and so made space.
                assert kept.add(10).status in (201, 507)
                name = next(iter(kept.documents))
                answer = kept.delete(name)
                assert answer.status in (200, 507), answer  # What was kept back may be used up.
                kept.check()

            # Space is back: writes resume, unasked, and so does the work in the background.
            for path in (ballast, *disk.glob("*more*")):
                path.unlink()
            waited_s = wait_until(lambda: kept.add(10).status == 201, "writes resume")
            print(f"writes resumed after {waited_s:.2f} s")
            for size in SIZES:
                assert kept.add(size).status == 201
            wait_until(lambda: part_files(data) != [], "the log is folded into parts")
            kept.check()
            assert (data / "reserve").exists()
            assert server.stop() == 0
            server.start()
            kept.client = connect(server)
            kept.check()


def test_a_disk_too_small_from_the_start_says_so(tmp_path: Path, connect: Connect) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        data = disk / "data"
        with eager_server(data, tmp_path / "server.log") as server:
            client = connect(server)
            create = {"name": "small", "get_or_create": True}
            wait_until(
                lambda: client.call("POST", "collections", create).status == 507,
                "too little space is noticed",
            )
            assert client.call("GET", "collections").status == 200
