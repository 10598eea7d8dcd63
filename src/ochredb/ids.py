"""Identifiers: uuid7 (time-ordered) for everything that OchreDB names.

Randomness is an argument (`IdSource` takes a `random.Random`), so a seeded run names the same
things the same way. After a fork the child must draw other numbers than its parent: the default
source reads the operating system's generator, which has no state to copy.
"""

from __future__ import annotations

import random
import uuid

from ochredb.clock import Clock, SystemClock


class IdSource:
    """Makes uuid7 strings: 48 bits of milliseconds, then 74 random bits (RFC 9562)."""

    def __init__(self, clock: Clock | None = None, rng: random.Random | None = None) -> None:
        self._clock = clock or SystemClock()
        self._rng = rng or random.SystemRandom()

    def uuid7(self) -> str:
        milliseconds = self._clock.now_us() // 1000 & (1 << 48) - 1
        bits = self._rng.getrandbits(74)
        value = (
            milliseconds << 80 | 0x7 << 76 | (bits >> 62) << 64 | 0b10 << 62 | bits & (1 << 62) - 1
        )
        return str(uuid.UUID(int=value))


def uuid7_time_us(text: str) -> int:
    """The time inside a uuid7, in microseconds since the epoch. Raises ValueError if it is none."""
    value = uuid.UUID(text)
    if value.version != 7:
        raise ValueError(f"not a uuid7: {text}")
    return (value.int >> 80) * 1000
