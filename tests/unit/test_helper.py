"""When a server's helping process is started, asked, and let go."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from ochredb.clock import SystemClock
from ochredb_node.helper import Helper
from ochredb_node.supervisor import Supervisor

from .kernel import ManualClock


class FakeSupervisor(Supervisor):
    def __init__(self) -> None:
        super().__init__([], 1, clock=SystemClock(), rng=random.Random(1))
        self.is_up = self.is_stopped = False

    def start(self) -> None:
        self.is_up = True

    @property
    def running(self) -> int:
        return int(self.is_up)

    def stop(self, timeout_s: float) -> None:
        assert timeout_s > 0
        self.is_up, self.is_stopped = False, True


@dataclass
class World:
    clock: ManualClock = field(default_factory=ManualClock)
    is_read: bool = True
    is_needed: bool = False
    made: list[FakeSupervisor] = field(default_factory=list)
    helper: Helper = field(init=False)

    def __post_init__(self) -> None:
        self.helper = Helper(
            self._make,
            clock=self.clock,
            is_read=lambda: self.is_read,
            is_needed=lambda: self.is_needed,
        )

    def _make(self) -> FakeSupervisor:
        self.made.append(FakeSupervisor())
        return self.made[-1]


@pytest.fixture
def world() -> World:
    return World()


def test_it_is_started_for_large_work_beside_reads_alone(world: World) -> None:
    assert not world.helper.takes(False), "small work"
    world.is_read = False
    assert not world.helper.takes(True), "nobody reads"
    assert not world.made
    world.is_read = True
    assert world.helper.takes(True)
    assert len(world.made) == 1
    world.is_read = False
    assert world.helper.takes(False), "while it runs it does all"
    assert len(world.made) == 1


def test_what_does_not_come_up_takes_nothing(world: World) -> None:
    assert world.helper.takes(True)
    world.made[0].is_up = False  # Killed, say; the supervisor tries again later.
    assert world.helper.takes(True), "it may still be starting"
    world.clock.advance(6.0)
    assert not world.helper.takes(True)
    world.made[0].is_up = True
    assert world.helper.takes(True)


def test_it_ends_when_there_was_nothing_to_do_for_a_while(world: World) -> None:
    world.helper.turn()
    world.helper.takes(True)
    world.is_needed = True
    for _ in range(30):
        world.clock.advance(1.0)
        world.helper.turn()
    assert not world.made[0].is_stopped, "something is written, or it is at work"
    world.is_needed = False
    for _ in range(9):
        world.clock.advance(1.0)
        world.helper.turn()
    assert not world.made[0].is_stopped
    world.clock.advance(1.0)
    world.helper.turn()
    assert world.made[0].is_stopped
    assert world.helper.takes(True)
    assert len(world.made) == 2, "as often as it takes"


def test_closing_ends_it_for_good(world: World) -> None:
    world.helper.takes(True)
    world.helper.close()
    assert world.made[0].is_stopped
    assert not world.helper.takes(True)
    assert len(world.made) == 1
    world.helper.close()
