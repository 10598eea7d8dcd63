"""A store that is far away, and what a cache of it has on its disk."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from ochredb.checksum import xxh3
from ochredb.clock import SystemClock
from ochredb.errors import Corrupt, Unavailable
from ochredb.ids import IdSource
from ochredb.storage.cached import CachedStore
from ochredb.storage.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ochredb.storage.base import Begin, Take

MB = 1 << 20


class FarStore(MemoryStore):
    """Counts what is fetched, piece by piece, and may be told to wait or to give wrong bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.downloads: list[str] = []
        self.ranges: list[tuple[str, int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.wrong_times = 0
        self.fail_times = 0

    def download(self, key: str, begin: Begin) -> int | None:
        content = self.get(key)
        self.downloads.append(key)
        self.gate.wait(30)
        if self.fail_times:
            self.fail_times -= 1
            raise Unavailable("the network is down")
        take = begin(len(content))
        for start in range(0, len(content), 100_000):
            piece = bytearray(content[start : start + 100_000])
            if self.wrong_times and not start:
                self.wrong_times -= 1
                piece[0] ^= 1
            take(start, memoryview(piece))
        return xxh3(content)

    def download_ranges(
        self, key: str, size: int, ranges: Sequence[tuple[int, int]], take: Take
    ) -> None:
        content = self.get(key)
        self.ranges += [(key, start, stop) for start, stop in ranges]
        self.gate.wait(30)
        if len(content) != size:
            raise Corrupt(f"{key} has {len(content)} bytes instead of {size}", key=key)
        for start, stop in ranges:
            if self.fail_times:
                self.fail_times -= 1
                raise Unavailable("the network is down")
            piece = bytearray(content[start:stop])
            if self.wrong_times:
                self.wrong_times -= 1
                piece[0] ^= 1
            take(start, memoryview(piece))


def cached(far: MemoryStore, folder: str, bytes_max: int = 64 * MB) -> CachedStore:
    return CachedStore(far, folder, bytes_max, SystemClock(), IdSource())


def kept_files(folder: str) -> list[str]:
    return [entry.path for entry in os.scandir(f"{folder}/objects")]


def kept_bytes(folder: str) -> int:
    return sum(os.stat(path).st_size for path in kept_files(folder))


def leftovers(folder: str) -> list[str]:
    return os.listdir(f"{folder}/tmp")
