"""Pauses between attempts of a call to S3."""

from __future__ import annotations

import random

import pytest

from ochredb.errors import Unavailable
from ochredb.storage.s3_failures import Attempts

from .kernel import ManualClock

ERROR = Unavailable("the endpoint fails")


def pauses_s(seed: int, allowed_s: float = 1e9, count: int = 9) -> list[float]:
    clock = ManualClock()
    attempts, pauses = Attempts(clock, random.Random(seed), allowed_s), []
    for _ in range(count):
        begun_s = clock.monotonic_s()
        attempts.pause(ERROR)
        pauses.append(clock.monotonic_s() - begun_s)
    return pauses


def test_those_that_fail_together_do_not_come_back_together() -> None:
    """Each pause is drawn from all of nothing to the longest, which doubles up to two seconds."""
    drawn = [pauses_s(seed) for seed in range(200)]
    for number, longest_s in enumerate((0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0)):
        shares = sorted(pauses[number] / longest_s for pauses in drawn)
        assert 0.0 <= shares[0] < 0.1
        assert 0.9 < shares[-1] <= 1.0 + 1e-6
        assert 0.4 < shares[100] < 0.6


def test_no_attempt_begins_after_the_deadline() -> None:
    with pytest.raises(Unavailable, match="the endpoint fails"):
        pauses_s(1, allowed_s=3.0, count=100)
