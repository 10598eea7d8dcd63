"""A share of a read that takes long is asked of the next node too: when, and how often."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ochredb.cancel import Cancel
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.rendezvous import order
from ochredb.peers import GetRequest, PartsRequest
from ochredb.types import Snapshot
from ochredb_query.scatter import Scatter

from .routing import COLLECTION, Behaviour, World, only, simulate

NAMES = "abc"
PART = "part"
FIRST, SECOND, HERE = order(PART, NAMES)
WARM = 64  # Shares after which it is known how long they take.


def _request(*part_ids: str) -> PartsRequest:
    snapshot = Snapshot(
        collection_id=COLLECTION,
        state="live",
        revision=0,
        dimension=2,
        version=1,
        indexed_offset=0,
        next_offset=1,
        floor_offset=0,
    )
    return PartsRequest(snapshot=snapshot, part_ids=part_ids, request=GetRequest())


@dataclass
class Reader:
    """The last node of the part's order, which asks the first. here_s: its own share takes."""

    world: World
    here_s: float = 0.0
    budget: RetryBudget = field(init=False)
    scatter: Scatter = field(init=False)

    def __post_init__(self) -> None:
        clock = self.world.clock
        self.budget = RetryBudget(clock)
        self.scatter = Scatter(self.world.nodes(), HERE, self.budget, clock)

    def read(self) -> tuple[str, float]:
        """Who answered for the part, and after how long."""
        began_s = self.world.clock.monotonic_s()
        shares = self.scatter.gather(
            COLLECTION, _request(), [(FIRST, _request(PART))], self._here, Cancel(30.0)
        )
        return shares[1].node, self.world.clock.monotonic_s() - began_s

    def _here(self, _request: PartsRequest, _with_tail: bool) -> Any:
        if self.here_s:
            self.world.clock.sleep(self.here_s)
        return HERE


def run(work: Callable[[World, Reader], None]) -> None:
    simulate(NAMES, lambda world: work(world, Reader(world)))


def warm(world: World, reader: Reader, seconds: float) -> None:
    world.behave = lambda _address: Behaviour(seconds=seconds)
    for _ in range(WARM):
        assert reader.read()[0] == FIRST
    world.behave = only({f"{FIRST}:1": Behaviour(seconds=10.0)})
    world.calls.clear()


def test_the_next_is_asked_after_as_long_as_most_shares_take() -> None:
    def work(world: World, reader: Reader) -> None:
        warm(world, reader, 0.2)
        name, taken_s = reader.read()
        assert name == SECOND
        assert 0.2 <= taken_s < 0.21
        assert world.calls == [f"{FIRST}:1", f"{SECOND}:1"]
        assert world.cancelled, "the loser is called off"
        assert (reader.budget.counted.hedges, reader.budget.counted.repeats) == (1, 0)

    run(work)


def test_what_takes_less_than_ten_milliseconds_is_not_hedged() -> None:
    def work(world: World, reader: Reader) -> None:
        warm(world, reader, 0.001)
        assert 0.01 <= reader.read()[1] < 0.012
        world.behave = only({f"{FIRST}:1": Behaviour(seconds=0.009)})
        world.calls.clear()
        assert reader.read()[0] == FIRST
        assert world.calls == [f"{FIRST}:1"]

    run(work)


def test_before_that_is_known_it_is_a_second() -> None:
    def work(world: World, reader: Reader) -> None:
        world.behave = only({f"{FIRST}:1": Behaviour(seconds=10.0)})
        name, taken_s = reader.read()
        assert name == SECOND
        assert 1.0 <= taken_s < 1.01

    run(work)


def test_a_share_that_came_while_this_node_did_its_own_is_not_late() -> None:
    def work(world: World, reader: Reader) -> None:
        warm(world, reader, 0.02)
        world.behave = lambda _address: Behaviour(seconds=0.02)
        reader.here_s = 0.5
        assert reader.read()[0] == FIRST
        assert world.calls == [f"{FIRST}:1"]

    run(work)


def test_hedges_stay_within_their_share() -> None:
    def work(world: World, reader: Reader) -> None:
        warm(world, reader, 0.02)
        world.behave = lambda _address: Behaviour(
            seconds=world.rng.uniform(0.1, 0.9) if world.rng.random() < 0.5 else 0.02
        )
        for number in range(WARM + 1, 1_000):
            reader.read()
            assert reader.budget.counted.hedges <= 0.05 * number
        assert reader.budget.counted.hedges > 0
        assert reader.budget.counted.repeats == 0

    run(work)
