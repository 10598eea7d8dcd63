"""Time as an argument: the only module that asks the host what time it is."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Wall time for records, monotonic time for waiting."""

    def now_us(self) -> int:
        """Microseconds since the epoch; may jump."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that never go backwards, from an arbitrary origin."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait; a simulated clock returns when its time has come."""
        ...


class SystemClock:
    """The host's clocks."""

    def now_us(self) -> int:
        return time.time_ns() // 1000

    def monotonic_s(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
