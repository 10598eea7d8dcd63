"""Identifiers: uuid7 (time-ordered) for everything that OchreDB names.

Randomness is an argument (`IdSource` takes a `random.Random`), so a seeded run names the same
things the same way. After a fork the child must draw other numbers than its parent: the default
source hands out the operating system's random bytes, and a child forgets those of its parent.
"""

from __future__ import annotations

import os
import random
import threading
import uuid

from ochredb.clock import Clock, SystemClock

_STOCK_BYTES = 4_096


class _SystemBits:
    """Bits of the operating system's generator, fetched in stock. Thread-safe.

    A system call for each would give the interpreter away, and getting it back can take a while.
    """

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._stock, self._used = b"", 0

    def getrandbits(self, count: int) -> int:
        size = -(-count // 8)
        with self._lock:
            if self._used + size > len(self._stock):
                self._stock, self._used = os.urandom(_STOCK_BYTES), 0
            start = self._used
            self._used += size
            drawn = self._stock[start : self._used]
        return int.from_bytes(drawn, "little") >> (8 * size - count)


_SYSTEM_BITS = _SystemBits()


class IdSource:
    """Makes uuid7 strings: 48 bits of milliseconds, then 74 random bits (RFC 9562)."""

    def __init__(self, clock: Clock | None = None, rng: random.Random | None = None) -> None:
        self._clock = clock or SystemClock()
        self._rng = rng or _SYSTEM_BITS

    def uuid7(self) -> str:
        milliseconds = self._clock.now_us() // 1000 & (1 << 48) - 1
        bits = self._rng.getrandbits(74)
        value = (
            milliseconds << 80 | 0x7 << 76 | (bits >> 62) << 64 | 0b10 << 62 | bits & (1 << 62) - 1
        )
        text = f"{value:032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def uuid7_time_us(text: str) -> int:
    """The time inside a uuid7, in microseconds since the epoch. Raises ValueError if it is none."""
    value = uuid.UUID(text)
    if value.version != 7:
        raise ValueError(f"not a uuid7: {text}")
    return (value.int >> 80) * 1000
