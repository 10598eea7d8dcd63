"""Clocks that are set: nothing is deleted early, nothing is kept for ever (I6, I7, I8)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ochredb.ages import Ages
from ochredb.catalog.jobs import Jobs
from ochredb.catalog.pins import PinTable
from ochredb.errors import NotFound
from ochredb.types import Op
from ochredb_node.node import Node

from .kernel import (
    ManualClock,
    add_rows,
    append,
    ids_of,
    make_collection,
    object_keys,
    operations,
    running_node,
)

HOUR_S, DAY_S = 3_600.0, 86_400.0


class SetClock(ManualClock):
    """Its wall time can be set; its monotonic time cannot."""

    def __init__(self) -> None:
        super().__init__()
        self._set_us = 0

    def now_us(self) -> int:
        return super().now_us() + self._set_us

    def jump(self, seconds: float) -> None:
        self._set_us += int(seconds * 1e6)


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def node(tmp_path: Path, clock: SetClock) -> Iterator[Node]:
    with running_node(str(tmp_path), clock=clock, inline_bytes_max=0) as node:
        yield node


def _is_old(ages: Ages, stamp_us: int, age_s: float) -> bool:
    return not ages.before_us(age_s) < stamp_us <= ages.after_us(age_s)


class TestAges:
    @pytest.mark.parametrize("jump_s", [0.0, 0.1, 5.0, HOUR_S, 30 * DAY_S])
    @pytest.mark.parametrize("before_s", [0.0, 1.0, 40.0])
    def test_a_stamp_is_old_when_its_time_has_passed_and_not_before(
        self, clock: SetClock, jump_s: float, before_s: float
    ) -> None:
        ages, stamp_us = Ages(clock), clock.now_us()
        clock.advance(before_s)
        clock.jump(jump_s)
        for _ in range(58 - int(before_s)):
            clock.advance(1)
            assert not _is_old(ages, stamp_us, 60)
        clock.advance(63)  # Once more the whole time, at most.
        assert _is_old(ages, stamp_us, 60)

    @pytest.mark.parametrize("jump_s", [5.0, HOUR_S, 30 * DAY_S])
    def test_a_stamp_from_before_a_jump_back_gets_old(self, clock: SetClock, jump_s: float) -> None:
        ages, stamp_us = Ages(clock), clock.now_us()
        clock.advance(10)
        clock.jump(-jump_s)
        for _ in range(48):
            clock.advance(1)
            assert not _is_old(ages, stamp_us, 60)
        clock.advance(60)
        assert _is_old(ages, stamp_us, 60)

    def test_there_and_back(self, clock: SetClock) -> None:
        ages, first_us = Ages(clock), clock.now_us()
        clock.advance(1)
        clock.jump(DAY_S)
        assert not _is_old(ages, first_us, 60)
        middle_us = clock.now_us()
        clock.advance(1)
        clock.jump(-DAY_S)
        for _ in range(56):
            clock.advance(1)
            assert not _is_old(ages, first_us, 60)
            assert not _is_old(ages, middle_us, 60)
        clock.advance(65)
        assert _is_old(ages, first_us, 60) and _is_old(ages, middle_us, 60)

    def test_after_a_start_the_future_is_believed_for_a_while(self, clock: SetClock) -> None:
        """Nobody saw the jump: perhaps the stamp is a second old."""
        stamp_us = clock.now_us() + int(HOUR_S * 1e6)
        ages = Ages(clock)
        clock.advance(59)
        assert not _is_old(ages, stamp_us, 60)
        clock.advance(2)
        assert _is_old(ages, stamp_us, 60)


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S, 30 * DAY_S])
def test_garbage_is_deleted_a_grace_period_later_whatever_the_clock_does(
    node: Node, clock: SetClock, jump_s: float
) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 10)
    node.compactor.fold_now(collection)
    add_rows(node, collection, 10, 10)
    node.compactor.fold_now(collection)
    node.compactor.collect_now(sweep_orphans=True)
    keys, expected = object_keys(node), ids_of(node, collection)
    clock.advance(5)
    clock.jump(jump_s)
    for _ in range(4):  # In all less than the retention and the grace.
        clock.advance(1)
        node.compactor.collect_now(sweep_orphans=True)
        assert object_keys(node) == keys
    for _ in range(10):
        clock.advance(30)
        node.compactor.collect_now(sweep_orphans=True)
        assert ids_of(node, collection) == expected
    node.namespace.delete_collection("default_tenant", "default_database", "records")
    clock.jump(jump_s)
    for _ in range(10):
        clock.advance(5)
        node.compactor.collect_now(sweep_orphans=True)
        assert object_keys(node), "a reader may still be at it"
    for _ in range(5):
        clock.advance(30)
        node.compactor.collect_now(sweep_orphans=True)
    assert object_keys(node) == set(), "nothing leaks"


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_an_upload_in_progress_is_not_taken_for_an_orphan(
    node: Node, clock: SetClock, jump_s: float
) -> None:
    node.compactor.collect_now(sweep_orphans=True)
    node.store.create(f"parts/{node.ids.uuid7()}/packed", b"x")
    clock.jump(jump_s)
    for _ in range(5):
        clock.advance(10)
        node.compactor.collect_now(sweep_orphans=True)
        assert object_keys(node)
    for _ in range(3):
        clock.advance(40)
        node.compactor.collect_now(sweep_orphans=True)
    assert object_keys(node) == set()


def test_a_lease_does_not_outlive_its_ttl_when_the_clock_is_set_back(
    node: Node, clock: SetClock
) -> None:
    jobs = Jobs(node.database, clock)
    assert jobs.acquire("c", "compact", "other-host/1/x", 60) is not None
    assert jobs.acquire("c", "compact", "me", 60) is None
    clock.jump(-DAY_S)
    lease = jobs.acquire("c", "compact", "me", 60)
    assert lease is not None and lease.fence == 2


def test_a_pin_is_not_released_because_the_clock_was_set_ahead(node: Node, clock: SetClock) -> None:
    pins = PinTable(node.database, clock, node.ages)
    with pins.take("pin", "owner", 120):
        pass
    pins.release_expired()
    clock.jump(DAY_S)
    pins.release_expired()
    pins.check("pin")
    with pins.take("another", "owner", 120):  # Also releases what has expired.
        pass
    pins.check("pin")
    clock.advance(700)
    pins.release_expired()
    with pytest.raises(NotFound):
        pins.check("pin")


def test_a_write_is_not_repeated_because_the_clock_was_set_ahead(
    node: Node, clock: SetClock
) -> None:
    """I8: its key is kept for a day, not until the clock says so."""
    collection = make_collection(node)
    add = operations(Op.ADD, ["a"], [[1.0] * 4])
    first = append(node, collection, add, idempotency_key="key")
    node._housekeep()
    clock.jump(2 * DAY_S)
    for _ in range(23):
        clock.advance(HOUR_S)
        node._housekeep()
        again = append(node, collection, add, idempotency_key="key")
        assert again.repeated and again.first_offset == first.first_offset
    clock.advance(3 * HOUR_S)
    node._housekeep()
    assert not append(node, collection, add, idempotency_key="key").repeated
