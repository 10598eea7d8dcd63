"""A second node that is asked when the first takes long: how often, and who is cancelled."""

from __future__ import annotations

import pytest

from ochredb.errors import DeadlineExceeded, Exhausted, NotFound

from .routing import Behaviour, World, addresses, only, refused, simulate

FIRST, SECOND, THIRD = addresses("a", "b", "c")
NAMES = "abc"
WARM = 64  # Calls after which it is known how long they take.


class TestHedges:
    def test_a_slow_first_node_is_outrun_and_its_call_cancelled(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            for _ in range(WARM):
                world.count(query)
            world.behave = only({FIRST: Behaviour(seconds=10.0)})
            began_s = world.clock.monotonic_s()
            world.calls.clear()
            assert world.count(query) == SECOND
            assert world.calls == [FIRST, SECOND]
            assert world.cancelled, "the loser is cancelled"
            assert world.clock.monotonic_s() - began_s < 0.02, "10 ms, then the second's answer"

        simulate(NAMES, work)

    def test_a_second_node_that_loses_is_cancelled(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            for _ in range(WARM):
                world.count(query)
            world.behave = only({FIRST: Behaviour(seconds=0.03), SECOND: Behaviour(seconds=1.0)})
            world.calls.clear()
            assert world.count(query) == FIRST
            assert world.calls == [FIRST, SECOND]
            world.clock.sleep(0.01)
            assert world.cancelled == [SECOND]

        simulate(NAMES, work)

    def test_nobody_is_hedged_before_it_is_known_how_long_calls_take(self) -> None:
        def work(world: World) -> None:
            world.behave = only({FIRST: Behaviour(seconds=1.0)})
            assert world.count(world.query()) == FIRST
            assert world.calls == [FIRST]

        simulate(NAMES, work)

    def test_the_delay_follows_the_usual_latency(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            world.behave = lambda _address: Behaviour(seconds=0.2)
            for _ in range(WARM):
                world.count(query)
            world.behave = only({FIRST: Behaviour(seconds=10.0)})
            began_s = world.clock.monotonic_s()
            world.count(query)
            assert 0.2 <= world.clock.monotonic_s() - began_s < 0.21

        simulate(NAMES, work)

    @pytest.mark.parametrize("slow", [0.04, 0.5, 1.0])
    @pytest.mark.parametrize("share", [0.05, 0.01, 0.0])
    def test_hedges_stay_within_their_share(self, share: float, slow: float) -> None:
        """However many requests are slow, and also right after a quiet time."""

        def work(world: World) -> None:
            query = world.query(hedge_share=share)
            for _ in range(WARM):
                world.count(query)
            world.behave = lambda _address: Behaviour(
                seconds=world.rng.uniform(0.02, 2.0) if world.rng.random() < slow else 0.001
            )
            requests = 2_000
            for number in range(WARM + 1, requests + 1):
                world.count(query)
                assert len(world.calls) - number <= share * number
            counted = query._budget.counted
            assert counted.hedges + counted.repeats == len(world.calls) - requests
            if share:
                assert len(world.calls) - requests > 0.7 * min(share, slow) * requests

        simulate(NAMES, work)

    def test_a_429_of_the_first_node_is_not_hedged(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            for _ in range(WARM):
                world.count(query)
            world.behave = only({FIRST: Behaviour(seconds=0.005, error=lambda: Exhausted("no"))})
            world.calls.clear()
            with pytest.raises(Exhausted):
                world.count(query)
            world.clock.sleep(1.0)
            assert world.calls == [FIRST]

        simulate(NAMES, work)

    def test_a_429_of_the_second_node_ends_hedges_to_it_until_it_may_be_asked(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            for _ in range(200):
                world.count(query)
            world.behave = only(
                {
                    FIRST: Behaviour(seconds=0.05),
                    SECOND: Behaviour(error=lambda: Exhausted("no", retry_after_s=2.0)),
                }
            )
            world.calls.clear()
            for _ in range(5):
                assert world.count(query) == FIRST, "the 429 of a hedge is not the answer"
            assert world.calls.count(SECOND) == 1
            world.clock.sleep(2.0)
            world.count(query)
            assert world.calls.count(SECOND) == 2

        simulate(NAMES, work)

    def test_a_hedge_under_way_is_the_failover_of_a_first_that_fails(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            for _ in range(WARM):
                world.count(query)
            world.behave = only(
                {FIRST: Behaviour(0.03, error=refused), SECOND: Behaviour(seconds=0.1)}
            )
            world.calls.clear()
            assert world.count(query) == SECOND
            assert world.calls == [FIRST, SECOND]

        simulate(NAMES, work)

    def test_if_both_fail_the_third_is_asked(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            for _ in range(WARM):
                world.count(query)
            world.behave = only(
                {FIRST: Behaviour(0.03, error=refused), SECOND: Behaviour(0.03, error=refused)}
            )
            world.calls.clear()
            assert world.count(query) == THIRD
            assert world.calls == [FIRST, SECOND, THIRD]

        simulate(NAMES, work)

    def test_not_found_by_the_second_is_the_answer(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            for _ in range(WARM):
                world.count(query)
            world.behave = only(
                {FIRST: Behaviour(seconds=5.0), SECOND: Behaviour(error=lambda: NotFound("gone"))}
            )
            with pytest.raises(NotFound):
                world.count(query)
            assert world.clock.monotonic_s() < 1.0

        simulate(NAMES, work)

    def test_the_deadline_ends_both(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            for _ in range(WARM):
                world.count(query)
            world.behave = lambda _address: Behaviour(seconds=60.0)
            began_s = world.clock.monotonic_s()
            with pytest.raises(DeadlineExceeded):
                world.count(query, timeout_s=1.0)
            assert world.clock.monotonic_s() - began_s < 1.01

        simulate(NAMES, work)

    def test_a_silent_node_is_soon_passed_over(self) -> None:
        """As behind a partition: it accepts calls and never answers."""

        def work(world: World) -> None:
            query = world.query()
            for _ in range(400):
                world.count(query)
            world.behave = only({FIRST: Behaviour(seconds=1e6)})
            world.calls.clear()
            for _ in range(100):
                assert world.count(query) == SECOND
            assert 5 <= world.calls.count(FIRST) < 15

        simulate(NAMES, work)

    def test_no_answer_for_long_is_a_failure_whatever_is_usual(self) -> None:
        """Nothing is known yet, and no hedge was earned."""

        def work(world: World) -> None:
            query = world.query()
            world.behave = only({FIRST: Behaviour(seconds=1e6)})
            assert world.count(query) == SECOND
            assert world.clock.monotonic_s() == pytest.approx(2.001)

        simulate(NAMES, work)

    def test_calls_that_all_take_long_are_not_taken_for_failures(self) -> None:
        def work(world: World) -> None:
            query = world.query(hedge_share=0.0)
            world.behave = lambda _address: Behaviour(seconds=1.5)
            for _ in range(WARM):
                world.count(query)
            world.behave = lambda _address: Behaviour(seconds=4.0)
            world.count(query)
            assert len(world.calls) == WARM + 1

        simulate(NAMES, work)

    def test_a_lone_node_is_asked_alone(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            for _ in range(WARM):
                world.count(query)
            world.behave = lambda _address: Behaviour(seconds=1.0)
            world.count(query)
            assert len(world.calls) == WARM + 1

        simulate("a", work)
