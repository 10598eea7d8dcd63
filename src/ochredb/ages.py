"""How old something is, by a wall clock that may be set while we look.

What is stamped with wall time and kept "for a grace period" is deleted early if the clock jumps
ahead in between. So whoever deletes by age watches the wall clock against the monotonic one, and
adds the jumps that it has seen during that period to the age that it asks for:

    stamped 10:00:00   clock set from 10:00:05 to 11:00:05   asked at 11:00:10 for 60 s

The stamp looks 3,610 s old and is 10; with the jump of 3,600 s added it must look 3,660 s old.
Stamps made after the jump wait up to twice as long, and once the period has passed since the jump
nothing is added. A jump before this process began to look is not seen, and one of a suspended
machine is seen, although its time has passed: that only delays.
"""

from __future__ import annotations

import threading
from collections import deque

from ochredb.clock import Clock

_TOLERANCE_US = 500_000  # More than clocks are slewed by between two looks.
_NEVER_US = 1 << 62
_REMEMBERED_S = 8 * 86_400.0  # Longer than anything is kept by age.


class Ages:
    """Thread-safe. Looks whenever it is asked: jumps between two looks are summed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._difference_us = self._looked()
        self._since_s = clock.monotonic_s()  # The start, or the last jump back.
        self._jumps: deque[tuple[float, int]] = deque()  # Forward: when seen, and by how much.

    def before_us(self, age_s: float) -> int:
        """The wall time before which a stamp is surely `age_s` seconds old."""
        return self._clock.now_us() - int((age_s + self.slack_s(age_s)) * 1e6)

    def slack_s(self, age_s: float) -> float:
        """Seconds by which a stamp may look older than it is, if it is not yet `age_s` old."""
        with self._lock:
            now_s = self._look()
            return sum(by for at, by in self._jumps if now_s - at <= age_s) / 1e6

    def after_us(self, age_s: float) -> int:
        """The wall time after which a stamp must be from before a jump back, and `age_s` old.

        Without end while that cannot be told, because the clock was not watched for so long.
        """
        with self._lock:
            if self._look() - self._since_s <= age_s:
                return _NEVER_US
        return self._clock.now_us() + _TOLERANCE_US

    def _look(self) -> float:
        """Note a jump since the last look; returns the monotonic time."""
        now_s, difference_us = self._clock.monotonic_s(), self._looked()
        jump_us = difference_us - self._difference_us
        self._difference_us = difference_us
        if jump_us > _TOLERANCE_US:
            self._jumps.append((now_s, jump_us))
        elif jump_us < -_TOLERANCE_US:
            self._since_s = now_s
        while self._jumps and now_s - self._jumps[0][0] > _REMEMBERED_S:
            self._jumps.popleft()
        return now_s

    def _looked(self) -> int:
        return self._clock.now_us() - int(self._clock.monotonic_s() * 1e6)
