"""Damage, drawn from a seed: a copy of a store with one file that is not as it was.

OCHREDB_DAMAGE_KINDS: only files of these kinds (`kinds_of`), with commas between them.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass

CATALOG = "ochredb.sqlite3"
WAL = CATALOG + "-wal"
GUARDS = {
    "seal": "ochredb.seal",
    "mark": "write.lock",
    "shm": CATALOG + "-shm",
    "marker": "ochredb.txt",
}
"""Files by kind that hold nothing of the records. `check` need not report what they have become:

a damaged seal or mark says nothing (both have checksums of their own) and is made anew, SQLite
makes its index of the write-ahead log anew when nobody has it open, and of the marker only the name
counts. So the store must then answer everything right: an error without a finding is a failure.
"""
HOW = ("bit", "bytes", "zeroed", "cut", "longer", "deleted", "swapped")
HOW_IN_PLACE = ("bit", "bytes", "zeroed", "cut", "longer")
_SECTOR = 4_096
_QUARANTINED_BYTES_MIN = 64 << 10  # Requests of these stores are smaller.


@dataclass(frozen=True, slots=True)
class Mutilation:
    """file: relative to the store. start, stop: the bytes that are other ones; of the old file."""

    file: str
    how: str
    start: int
    stop: int


def kinds_of(store: str) -> dict[str, list[str]]:
    """The files that may be mutilated, by kind. Lock files are empty."""
    found: dict[str, list[str]] = {"catalog": [CATALOG]}
    if os.path.getsize(os.path.join(store, CATALOG)) and os.path.exists(os.path.join(store, WAL)):
        found["wal"] = [WAL]
    found |= {
        kind: [name] for kind, name in GUARDS.items() if os.path.exists(os.path.join(store, name))
    }
    for folder, _, names in os.walk(os.path.join(store, "objects")):
        for name in sorted(names):
            file = os.path.relpath(os.path.join(folder, name), store)
            top = file.split(os.sep)[1]
            kind = name if top == "parts" else top
            size = os.path.getsize(os.path.join(folder, name))
            if kind == "fragments" and size >= _QUARANTINED_BYTES_MIN:
                kind = "quarantine"
            if top != "tmp":
                found.setdefault(kind, []).append(file)
    return {kind: sorted(files) for kind, files in sorted(found.items())}


def copy_store(store: str, target: str) -> None:
    """Objects are linked: they are never changed in place. The catalog is copied, times too."""
    shutil.copytree(
        os.path.join(store, "objects"), os.path.join(target, "objects"), copy_function=os.link
    )
    for name in os.listdir(store):
        path = os.path.join(store, name)
        if os.path.isfile(path):
            shutil.copy2(path, os.path.join(target, name))


def mutilate(store: str, rng: random.Random) -> Mutilation:
    """Change one file, or exchange two, of a store that nobody has open.

    Times of files stay as they were: as if the disk had done it, and not a program.
    """
    kinds = kinds_of(store)
    file = rng.choice(kinds[rng.choice(_wanted(kinds))])
    how = rng.choice(HOW)
    objects = [item for files in kinds.values() for item in files if item.startswith("objects")]
    if how == "swapped" and file in objects:
        other = rng.choice([item for item in objects if item != file])
        first, second = os.path.join(store, file), os.path.join(store, other)
        os.rename(first, first + ".x")
        os.rename(second, first)
        os.rename(first + ".x", second)
        return Mutilation(file, f"swapped with {other}", 0, 0)
    path = os.path.join(store, file)
    with open(path, "rb") as source:
        before = source.read()
    if how == "deleted":
        os.unlink(path)
        return Mutilation(file, how, 0, len(before))
    after, done = _mutilated(file, before, how, rng)
    times = os.stat(path)
    with open(path + ".new", "wb") as target:
        target.write(after)
    os.utime(path + ".new", ns=(times.st_atime_ns, times.st_mtime_ns))
    os.rename(path + ".new", path)
    return done


def mutilate_in_place(store: str, rng: random.Random) -> Mutilation:
    """Change the catalog's files, or what guards them, while another process has them open.

    Not -shm: that is memory which the processes share.
    """
    kinds = {"catalog": CATALOG, "wal": WAL, "seal": GUARDS["seal"], "mark": GUARDS["mark"]}
    there = {kind for kind, name in kinds.items() if os.path.exists(os.path.join(store, name))}
    file = kinds[rng.choice(_wanted(there))]
    path = os.path.join(store, file)
    # A log that is cut or gone was of writes which nobody misses but for appends.
    hows = ("bit", "bytes") if file == WAL else HOW_IN_PLACE
    with open(path, "rb") as source:
        before = source.read()
    after, done = _mutilated(file, before, rng.choice(hows), rng)
    times = os.stat(path)
    with open(path, "r+b") as target:
        target.write(after)
        target.truncate(len(after))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return done


def _wanted(kinds: Iterable[str]) -> list[str]:
    only = os.environ.get("OCHREDB_DAMAGE_KINDS")
    wanted = sorted(kinds if only is None else set(kinds).intersection(only.split(",")))
    assert wanted, f"none of {only} is there"
    return wanted


def _mutilated(file: str, before: bytes, how: str, rng: random.Random) -> tuple[bytes, Mutilation]:
    after, start, stop = before, 0, 0
    while after == before:
        after, start, stop = _changed(before, how, rng)
        how = how if after != before else "bit"  # Zeroes were there already.
    return after, Mutilation(file, how, start, stop)


def _changed(before: bytes, how: str, rng: random.Random) -> tuple[bytes, int, int]:
    size = len(before)
    if how == "cut":
        start = rng.choice(
            [size - 1, rng.randrange(size), rng.randrange(size) // _SECTOR * _SECTOR]
        )
        return before[:start], start, size
    if how == "longer":
        return before + rng.randbytes(rng.choice([1, 8, 5_000])), size, size
    after = bytearray(before)
    start = rng.randrange(size)
    if how == "zeroed":
        start = start // _SECTOR * _SECTOR
        stop = min(size, start + _SECTOR)
        after[start:stop] = bytes(stop - start)
    elif how == "bytes":
        stop = min(size, start + rng.choice([2, 8, 600]))
        after[start:stop] = rng.randbytes(stop - start)
    else:
        stop = start + 1
        after[start] ^= 1 << rng.randrange(8)
    return bytes(after), start, stop
