"""Nodes of a role that answer, fail and are slow on a simulated clock; and who routes to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ochredb.cluster.budget
import ochredb.cluster.hedge
import ochredb.cluster.latencies
import ochredb.cluster.membership
import ochredb.cluster.nodes
import ochredb.cluster.timer
import ochredb_query.scatter
from ochredb.cancel import Cancel, Cancelled
from ochredb.cluster.attempts import RoutingConfig
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.membership import Members
from ochredb.cluster.nodes import Nodes
from ochredb.cluster.rendezvous import order
from ochredb.cluster.routed_query import RoutedQuery
from ochredb.errors import DeadlineExceeded, OchreError, Unavailable
from ochredb.peers import PartsRequest
from ochredb.testing.simulation.scheduler import Process, Scheduler, SimulatedClock
from ochredb.testing.simulation.threads import SimulatedEvent, simulated_threads

_T = TypeVar("_T")
_THREADED = (
    ochredb.cluster.budget,
    ochredb.cluster.hedge,
    ochredb.cluster.latencies,
    ochredb.cluster.membership,
    ochredb.cluster.nodes,
    ochredb.cluster.timer,
    ochredb_query.scatter,
)
COLLECTION = "collection"


def refused() -> Unavailable:
    """What a client raises that could not connect."""
    return Unavailable("connection refused", unreachable=True)


@dataclass
class Behaviour:
    """Of one call: it takes so long, then answers or raises."""

    seconds: float = 0.001
    error: Callable[[], OchreError] | None = None


def only(bad: dict[str, Behaviour]) -> Callable[[str], Behaviour]:
    """These nodes behave like this, the others well."""
    return lambda address: bad.get(address, Behaviour())


@dataclass
class FakeMembership:
    """Members that a test changes."""

    members: Members = field(default_factory=Members)
    refreshed: int = 0
    on_refresh: Callable[[], None] = lambda: None

    def become(self, addresses: dict[str, str]) -> None:
        self.members = self.members.then(addresses)

    def refresh(self) -> None:
        self.refreshed += 1
        self.on_refresh()

    def close(self) -> None:
        pass


class FakeQuery:
    """A client: it knows its address, and does what the world says that node does."""

    def __init__(self, world: World, address: str) -> None:
        self._world, self.address = world, address
        self.closed = False

    def count(self, collection_id: str, *, cancel: Cancel) -> str:
        assert not self.closed, "a call with a client that was closed"
        assert collection_id == COLLECTION
        world = self._world
        world.calls.append(self.address)
        behaviour = world.behave(self.address)
        world.wait(behaviour.seconds, cancel)
        if behaviour.error is not None:
            raise behaviour.error()
        return self.address

    def begin_search_parts(
        self, collection_id: str, _request: PartsRequest, *, cancel: Cancel
    ) -> Callable[[], Any]:
        """The node begins at once, whenever somebody waits for it."""
        assert collection_id == COLLECTION
        world = self._world
        world.calls.append(self.address)
        seconds, began_s = world.behave(self.address).seconds, world.clock.monotonic_s()

        def wait() -> str:
            world.wait(max(0.0, began_s + seconds - world.clock.monotonic_s()), cancel)
            return self.address

        return wait

    def search_parts(self, collection_id: str, request: PartsRequest, *, cancel: Cancel) -> Any:
        return self.begin_search_parts(collection_id, request, cancel=cancel)()


@dataclass
class World:
    """calls, cancelled: addresses in the order of their calls. Addresses are `NAME:1`."""

    scheduler: Scheduler
    process: Process
    clock: SimulatedClock
    membership: FakeMembership
    rng: random.Random
    behave: Callable[[str], Behaviour] = lambda _address: Behaviour()
    calls: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    clients: list[FakeQuery] = field(default_factory=list)

    def connect(self, address: str) -> FakeQuery:
        self.clients.append(FakeQuery(self, address))
        return self.clients[-1]

    def close(self, client: FakeQuery) -> None:
        assert not client.closed
        client.closed = True

    def wait(self, seconds: float, cancel: Cancel) -> None:
        """As a client waits for its node."""
        remaining_s = cancel.remaining_s()
        ends_early = remaining_s is not None and remaining_s < seconds
        told = SimulatedEvent(self.scheduler)
        take_back = cancel.when_cancelled(told.set)
        if told.wait(remaining_s if ends_early else seconds):
            self.cancelled.append(self.calls[-1])
            raise Cancelled("the call was cancelled")
        take_back()
        if ends_early:
            raise DeadlineExceeded("the node did not answer in time")

    def nodes(self) -> Nodes[Any]:
        return Nodes(
            self.membership, self.connect, clock=self.clock, rng=self.rng, close=self.close
        )

    def query(self, **config: Any) -> RoutedQuery:
        return RoutedQuery(
            self.nodes(),
            budget=RetryBudget(self.clock),
            clock=self.clock,
            config=RoutingConfig(**config),
        )

    def count(self, query: RoutedQuery, timeout_s: float | None = 30.0) -> str:
        """The address of the node that answered."""
        answer: Any = query.count(COLLECTION, cancel=Cancel(timeout_s, self.clock))
        assert isinstance(answer, str)
        return answer

    def beside(self, work: Callable[[], object]) -> SimulatedEvent:
        """In a thread of its own; the event is set when that is over."""
        done = SimulatedEvent(self.scheduler)
        task = self.scheduler.spawn(self.process, work)
        task.on_done.append(done.set)
        return done


def simulate(names: Sequence[str], work: Callable[[World], _T], seed: int = 1) -> _T:
    """Run `work` as a task of the simulation, with nodes of these names."""
    scheduler = Scheduler(seed)
    process = scheduler.process("frontend")
    with simulated_threads(scheduler, _THREADED):
        membership = FakeMembership()
        membership.become({name: f"{name}:1" for name in names})
        clock = SimulatedClock(scheduler, process)
        world = World(scheduler, process, clock, membership, random.Random(seed))
        task = scheduler.spawn(process, lambda: work(world))
        scheduler.run(lambda: task.is_done)
    if task.error is not None:
        raise task.error
    result: _T = task.result
    return result


def addresses(*names: str) -> Iterator[str]:
    """In the order in which they are asked for the collection."""
    return (f"{name}:1" for name in order(COLLECTION, names))
