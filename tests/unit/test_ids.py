"""Identifiers: their time, their order, and that nobody draws the same twice."""

from __future__ import annotations

import os
import random
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochredb.ids import IdSource, uuid7_time_us


class _At:
    """A clock that stands still."""

    def __init__(self, now_us: int) -> None:
        self._now_us = now_us

    def now_us(self) -> int:
        return self._now_us

    def monotonic_s(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        raise AssertionError("ids do not wait")


@given(milliseconds=st.integers(0, (1 << 48) - 1), seed=st.integers(0, 99))
def test_a_uuid7_carries_its_time(milliseconds: int, seed: int) -> None:
    text = IdSource(_At(milliseconds * 1_000 + 999), random.Random(seed)).uuid7()
    value = uuid.UUID(text)
    assert (value.version, value.variant) == (7, uuid.RFC_4122)
    assert str(value) == text
    assert uuid7_time_us(text) == milliseconds * 1_000


def test_later_ids_sort_behind() -> None:
    texts = [IdSource(_At(now_us)).uuid7() for now_us in range(0, 10**9, 10**7)]
    assert texts == sorted(texts)


def test_a_seed_gives_the_same_ids_and_no_seed_does_not() -> None:
    one, two = (IdSource(_At(1), random.Random(5)) for _ in range(2))
    assert [one.uuid7() for _ in range(9)] == [two.uuid7() for _ in range(9)]
    assert len({IdSource(_At(1)).uuid7() for _ in range(1_000)}) == 1_000


@pytest.mark.parametrize("text", ["", "x", str(uuid.UUID(int=0)), str(uuid.UUID(int=4 << 76))])
def test_other_identifiers_have_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=r"uuid|UUID"):
        uuid7_time_us(text)


def test_children_of_a_fork_draw_other_numbers() -> None:
    source, drawn = IdSource(_At(1)), set()
    source.uuid7()  # What the parent has in stock is not for its children.
    for _ in range(3):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, source.uuid7().encode())
            os._exit(0)
        os.waitpid(child, 0)
        drawn.add(os.read(read, 100))
        os.close(read)
        os.close(write)
    assert len(drawn) == 3
