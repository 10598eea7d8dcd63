"""The server's memory: what there is of it, and short garbage collections."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ochredb.clock import Clock

_MEMINFO_FILE, _STATM_FILE = "/proc/meminfo", "/proc/self/statm"
GROUP_FOLDER = "/sys/fs/cgroup/"  # A container's own; version 2.


def available_bytes() -> int | None:
    """Memory that could be taken without others' having to give any; None if nothing tells.

    Of the machine, and of this process's control group, whose page cache gives way.
    """
    found = []
    for line in lines_of(_MEMINFO_FILE):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) << 10)
    limit = lines_of(GROUP_FOLDER + "memory.max")
    if limit and limit[0].isdigit():
        taken = [
            line for line in lines_of(GROUP_FOLDER + "memory.stat") if line.startswith("anon ")
        ]
        found.append(int(limit[0]) - sum(int(line.split()[1]) for line in taken))
    return min(found, default=None)


def resident_bytes() -> int:
    """What this process has in memory; 0 if the system does not tell."""
    lines = lines_of(_STATM_FILE)
    return int(lines[0].split()[1]) * os.sysconf("SC_PAGE_SIZE") if lines else 0


def lines_of(path: str) -> list[str]:
    """Of a file that the system may not have: then none."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read().splitlines()
    except OSError:
        return []


_IDLE_CALLS_FOR_ALL = 10  # So many calls in a row without work between them ...
_ALL_AFTER_S = 3600.0  # ... or so long without one: then everything is looked at.


class ShortCollections:
    """Python's collection of cyclic garbage in short steps.

    A collection of the oldest generation looks at every object while it holds the interpreter's
    lock: 140 ms with 5,000 collections loaded. Instead `tidy` looks, about once a second, at what
    was made since its last call, some milliseconds at most, and exempts what is alive. Nearly all
    of that is freed by its reference count later; what becomes garbage as part of a cycle waits
    until everything is looked at: when the process is idle, or after an hour.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._all_s = clock.monotonic_s()
        self._worked = False  # Since everything was looked at.
        self._idle_calls = 0

    def start(self) -> None:
        """Take the oldest generation over from the interpreter, for this whole process."""
        young, middle, _ = gc.get_threshold()
        gc.set_threshold(young, middle, 1_000_000)  # As good as never.

    def tidy(self, *, idle: bool) -> None:
        """idle: nothing was read or written since the last call."""
        self._worked = self._worked or not idle
        self._idle_calls = self._idle_calls + 1 if idle else 0
        now_s = self._clock.monotonic_s()
        if self._worked and (
            self._idle_calls >= _IDLE_CALLS_FOR_ALL or now_s - self._all_s >= _ALL_AFTER_S
        ):
            self._worked, self._all_s = False, now_s
            gc.unfreeze()
        gc.collect()
        gc.freeze()
