"""Who reads when a query node has too much to do: bounded, fair, and refused in time (I9)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import pytest

import ochredb_query.admission
from ochredb.cancel import Cancel, Cancelled
from ochredb.errors import DeadlineExceeded, Exhausted, NotFound
from ochredb.peers import GetRequest, QueryNode, QueryRequest
from ochredb.testing.simulation.scheduler import Process, Scheduler, SimulatedClock
from ochredb.testing.simulation.threads import SimulatedEvent, simulated_threads
from ochredb_query.admission import Admission, AdmissionConfig
from ochredb_query.admitted import AdmittedQuery

_T = TypeVar("_T")


class World:
    """Reads of tenants on a simulated clock. answered, refused: reads by tenant."""

    def __init__(self, scheduler: Scheduler, process: Process, config: AdmissionConfig) -> None:
        self._scheduler, self._process = scheduler, process
        self.clock = SimulatedClock(scheduler, process)
        self.admission = Admission(config, self.clock, random.Random(1))
        self.answered, self.refused = Counter[str](), Counter[str]()
        self.seconds = Counter[str]()
        self.running = self.running_most = 0
        self.retry_after_s: list[float] = []
        self.is_over = False

    def read(
        self, tenant: str, seconds: float, *, units: float = 1.0, timeout_s: float | None = None
    ) -> None:
        """One read that takes so long. Raises as a turn does."""
        with self.admission.turn(tenant, (tenant, seconds), units, Cancel(timeout_s, self.clock)):
            self.running += 1
            self.running_most = max(self.running_most, self.running)
            self.clock.sleep(seconds)
            self.running -= 1
        self.answered[tenant] += 1
        self.seconds[tenant] += cast("int", seconds)

    def client(self, tenant: str, seconds: float, pause_s: float = 0.0) -> None:
        """Reads one after the other until the end; comes back at once after a refusal."""

        def work() -> None:
            while not self.is_over:
                try:
                    self.read(tenant, seconds)
                except Exhausted as refusal:
                    self.refused[tenant] += 1
                    self.retry_after_s.append(refusal.retry_after_s)
                    self.clock.sleep(0.05)
                self.clock.sleep(pause_s)

        self.beside(work)

    def beside(self, work: Callable[[], object]) -> SimulatedEvent:
        done = SimulatedEvent(self._scheduler)
        task = self._scheduler.spawn(self._process, work)
        task.on_done.append(done.set)
        return done


def simulate(work: Callable[[World], _T], **config: Any) -> _T:
    scheduler = Scheduler(1)
    process = scheduler.process("query node")
    with simulated_threads(scheduler, [ochredb_query.admission]):
        world = World(scheduler, process, AdmissionConfig(**config))
        task = scheduler.spawn(process, lambda: work(world))
        scheduler.run(lambda: task.is_done)
    if task.error is not None:
        raise task.error
    result: _T = task.result
    return result


class TestBounds:
    def test_so_many_run_and_the_others_wait(self) -> None:
        def work(world: World) -> None:
            done = [world.beside(lambda: world.read("a", 0.01)) for _ in range(20)]
            for one in done:
                one.wait()
            assert world.answered["a"] == 20
            assert world.running_most == 4
            assert world.clock.monotonic_s() == pytest.approx(0.05)
            assert (world.admission.running, world.admission.queued) == (0, 0)

        simulate(work, running_max=4, queue_max=100)

    def test_when_too_many_wait_the_next_is_refused_at_once(self) -> None:
        def work(world: World) -> None:
            for _ in range(10):
                world.beside(lambda: world.read("a", 1.0))
            world.clock.sleep(0.1)
            assert world.admission.queued == 6
            with pytest.raises(Exhausted, match="6 reads wait"):
                world.read("a", 1.0)
            assert world.clock.monotonic_s() == pytest.approx(0.1)

        simulate(work, running_max=4, queue_max=6)

    def test_the_pause_that_is_asked_for_is_what_the_queue_takes(self) -> None:
        def work(world: World) -> None:
            world.read("a", 0.08)  # Now it is known how long they take.
            for _ in range(104):
                world.beside(lambda: world.read("a", 0.08))
            world.clock.sleep(0.001)
            with pytest.raises(Exhausted) as caught:
                world.read("a", 0.08)
            wait_s = 100 * 0.08 / 4
            assert wait_s <= caught.value.retry_after_s <= 1.5 * wait_s

        simulate(work, running_max=4, queue_max=100)

    def test_long_reads_leave_room_for_short_ones(self) -> None:
        def work(world: World) -> None:
            world.read("a", 10.0)
            for _ in range(20):
                world.beside(lambda: world.read("a", 10.0))
            world.clock.sleep(0.001)
            assert world.admission.running == 4
            began_s = world.clock.monotonic_s()
            world.read("a", 0.001, units=0.0001)
            assert world.clock.monotonic_s() - began_s == pytest.approx(0.001)

        simulate(work, running_max=8, queue_max=100)

    def test_settings_are_checked(self) -> None:
        for wrong in ({"running_max": 1}, {"queue_max": -1}, {"long_s": 0.0}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                AdmissionConfig(**wrong)
        config = AdmissionConfig(running_max=8, queue_max=10)
        assert config.threads > 18


class TestWaiting:
    def test_a_deadline_ends_it_and_leaves_no_trace(self) -> None:
        def work(world: World) -> None:
            for _ in range(2):
                world.beside(lambda: world.read("a", 5.0))
            world.clock.sleep(0.1)
            with pytest.raises(DeadlineExceeded):
                world.read("a", 1.0, timeout_s=0.5)
            assert world.clock.monotonic_s() == pytest.approx(0.6)
            assert world.admission.queued == 0

        simulate(work, running_max=2)

    def test_a_client_that_goes_away_gives_up_its_place_in_the_queue(self) -> None:
        def work(world: World) -> None:
            cancel = Cancel(None, world.clock)
            for _ in range(2):
                world.beside(lambda: world.read("a", 5.0))
            world.clock.sleep(0.1)
            raised: list[BaseException] = []

            def wait() -> None:
                try:
                    with world.admission.turn("a", "kind", 1.0, cancel):
                        raise AssertionError("it had no turn")
                except Cancelled as error:
                    raised.append(error)

            done = world.beside(wait)
            world.clock.sleep(0.1)
            cancel.cancel()
            done.wait()
            assert raised
            assert world.admission.queued == 0

        simulate(work, running_max=2)

    def test_a_read_that_fails_gives_its_place_back(self) -> None:
        def work(world: World) -> None:
            for _ in range(10):
                with (
                    pytest.raises(NotFound),
                    world.admission.turn("a", "kind", 1.0, Cancel(None, world.clock)),
                ):
                    raise NotFound("gone")
            assert world.admission.running == 0

        simulate(work, running_max=2)


class TestFairness:
    """One tenant floods, nine are quiet."""

    QUIET = tuple(f"quiet-{number}" for number in range(9))

    def test_the_quiet_ones_get_their_share(self) -> None:
        """Each wants more than it can get: all get the same."""

        def work(world: World) -> None:
            for _ in range(100):
                world.client("flood", 0.01)
            for tenant in self.QUIET:
                for _ in range(3):
                    world.client(tenant, 0.01)
            world.clock.sleep(10.0)
            world.is_over = True
            fair = 10.0 / 0.01 * 4 / 10
            counts = [world.answered[tenant] for tenant in (*self.QUIET, "flood")]
            assert min(counts) > 0.9 * fair
            assert max(counts) < 1.1 * fair

        simulate(work, running_max=4, queue_max=64)

    def test_those_that_ask_for_little_get_all_of_it_soon(self) -> None:
        def work(world: World) -> None:
            for _ in range(80):
                world.client("flood", 0.01)
            for tenant in self.QUIET:
                world.client(tenant, 0.01, pause_s=0.19)
            world.clock.sleep(10.0)
            world.is_over = True
            for tenant in self.QUIET:
                # 0.2 s a round if it never waited; it may wait for one read to end.
                assert world.answered[tenant] > 0.9 * 10.0 / 0.2
            used = sum(world.answered.values())
            assert used > 0.98 * 10.0 / 0.01 * 4, "and no place is left empty for that"

        simulate(work, running_max=4, queue_max=64)

    def test_a_flood_drowns_the_one_that_makes_it(self) -> None:
        """The queue is full all the time, and nobody else is ever refused."""

        def work(world: World) -> None:
            for _ in range(80):
                world.client("flood", 0.01)
            for tenant in self.QUIET:
                for _ in range(2):
                    world.client(tenant, 0.01)
            world.clock.sleep(10.0)
            world.is_over = True
            assert world.refused["flood"] > 1_000
            assert 0.1 <= min(world.retry_after_s) <= max(world.retry_after_s) <= 30.0
            assert not any(world.refused[tenant] for tenant in self.QUIET)

        simulate(work, running_max=4, queue_max=32)

    def test_shares_are_of_time_not_of_requests(self) -> None:
        def work(world: World) -> None:
            for _ in range(20):
                world.client("long", 0.09)
                world.client("short", 0.01)
            world.clock.sleep(10.0)
            world.is_over = True
            assert world.seconds["long"] == pytest.approx(world.seconds["short"], rel=0.1)
            assert world.answered["short"] > 8 * world.answered["long"]

        simulate(work, running_max=4, queue_max=64)

    def test_what_was_not_used_is_not_saved_up(self) -> None:
        def work(world: World) -> None:
            for _ in range(20):
                world.client("a", 0.01)
            world.clock.sleep(100.0)
            for _ in range(20):
                world.client("late", 0.01)
            before = world.answered["a"]
            world.clock.sleep(10.0)
            world.is_over = True
            assert world.answered["a"] - before == pytest.approx(world.answered["late"], rel=0.1), (
                "from now on half and half"
            )

        simulate(work, running_max=4, queue_max=64)


class _Node:
    """Answers with what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., str]:
        def method(*_args: object, **_more: object) -> str:
            self.asked.append(name)
            return name

        return method


class TestAdmittedQuery:
    def _full(self) -> tuple[_Node, AdmittedQuery, Any]:
        """One whose places are all taken, and nobody may wait."""
        world: Any = SimulatedClock(Scheduler(1), Process("p"))
        admission = Admission(AdmissionConfig(running_max=2, queue_max=0), world, random.Random(1))
        turns = [admission.turn("other", "kind", 1.0, Cancel()) for _ in range(2)]
        for turn in turns:
            turn.__enter__()
        node = _Node()
        return node, AdmittedQuery(cast("QueryNode", node), lambda _id: "t", admission), turns

    def test_reads_wait_for_a_turn_and_shares_of_reads_do_not(self) -> None:
        node, query, turns = self._full()
        request = QueryRequest(embeddings=np.ones((3, 2), np.float32))
        reads: list[Callable[[], object]] = [
            lambda: query.get("c", GetRequest(), cancel=Cancel()),
            lambda: query.query("c", request, cancel=Cancel()),
            lambda: query.count("c", cancel=Cancel()),
            lambda: query.match("c", GetRequest(), cancel=Cancel()),
        ]
        for read in reads:
            with pytest.raises(Exhausted):
                read()
        assert node.asked == []
        query.search_parts("c", cast("Any", None), cancel=Cancel())
        query.indexing_status("c", cancel=Cancel())
        assert node.asked == ["search_parts", "indexing_status"]
        for turn in turns:
            turn.__exit__(None, None, None)
        assert [read() for read in reads] == ["get", "query", "count", "match"]

    def test_the_tenant_is_looked_up_once(self) -> None:
        asked: list[str] = []

        def tenant_of(collection_id: str) -> str:
            asked.append(collection_id)
            if collection_id == "gone":
                raise NotFound("Collection [gone] does not exist.")
            return "t"

        clock: Any = SimulatedClock(Scheduler(1), Process("p"))
        admission = Admission(AdmissionConfig(), clock, random.Random(1))
        query = AdmittedQuery(cast("QueryNode", _Node()), tenant_of, admission)
        for _ in range(3):
            query.count("c", cancel=Cancel())
        assert asked == ["c"]
        with pytest.raises(NotFound):
            query.count("gone", cancel=Cancel())
