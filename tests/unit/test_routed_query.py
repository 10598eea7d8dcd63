"""Reads over several query nodes: failover, hedges, circuits, and what is not repeated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from ochredb.cluster.attempts import RoutingConfig
from ochredb.errors import (
    Corrupt,
    DeadlineExceeded,
    Exhausted,
    Internal,
    InvalidArgument,
    NotFound,
    OchreError,
    Unavailable,
)

from .routing import Behaviour, World, addresses, refused, simulate

FIRST, SECOND, THIRD = addresses("a", "b", "c")
NAMES = "abc"
WARM = 64  # Calls after which it is known how long they take.


def _only(bad: dict[str, Behaviour]) -> Callable[[str], Behaviour]:
    """These nodes behave like this, the others well."""
    return lambda address: bad.get(address, Behaviour())


class TestFailover:
    def test_the_first_of_the_order_answers(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            assert [world.count(query) for _ in range(10)] == [FIRST] * 10
            assert len(world.clients) == 1, "others are not even connected to"

        simulate(NAMES, work)

    def test_the_next_answers_for_one_that_is_not_reached(self) -> None:
        def work(world: World) -> None:
            world.behave = _only({FIRST: Behaviour(error=refused)})
            assert world.count(world.query()) == SECOND
            assert world.calls == [FIRST, SECOND]
            assert world.membership.refreshed == 1
            assert world.clock.monotonic_s() < 0.01, "there is no pause before another node"

        simulate(NAMES, work)

    @pytest.mark.parametrize(
        "error", [NotFound, InvalidArgument, Exhausted, Internal, Corrupt, DeadlineExceeded]
    )
    def test_other_errors_are_raised_at_once(self, error: type[OchreError]) -> None:
        def work(world: World) -> None:
            world.behave = _only({FIRST: Behaviour(error=lambda: error("no"))})
            with pytest.raises(error):
                world.count(world.query())
            assert world.calls == [FIRST]

        simulate(NAMES, work)

    def test_one_that_could_not_be_reached_is_left_alone_for_a_while(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            world.behave = _only({FIRST: Behaviour(error=refused)})
            for _ in range(20):
                assert world.count(query) == SECOND
            assert world.calls.count(FIRST) == 1
            world.behave = _only({})
            world.clock.sleep(1.0)
            assert world.count(query) == FIRST, "a call after the pause finds it back"

        simulate(NAMES, work)

    def test_after_the_pause_one_call_tries_and_the_others_wait_for_its_outcome(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            world.behave = _only({FIRST: Behaviour(error=refused)})
            world.count(query)
            world.behave = _only({FIRST: Behaviour(seconds=0.05)})
            world.clock.sleep(1.0)
            world.calls.clear()
            done = [world.beside(lambda: world.count(query)) for _ in range(10)]
            for one in done:
                one.wait()
            assert Counter(world.calls) == {FIRST: 1, SECOND: 9}

        simulate(NAMES, work)

    def test_one_that_drains_is_left_alone_at_once(self) -> None:
        """It answers, and so fast that every request would cost a repeat."""

        def work(world: World) -> None:
            query = world.query()
            draining = Behaviour(error=lambda: Unavailable("shutting down", draining=True))
            world.behave = _only({FIRST: draining})
            for _ in range(100):
                assert world.count(query) == SECOND
            assert world.calls.count(FIRST) == 1

        simulate(NAMES, work)

    def test_one_whose_store_is_away_is_left_alone_after_three(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            failing = Behaviour(error=lambda: Unavailable("the store does not answer"))
            world.behave = _only({FIRST: failing})
            for _ in range(100):
                assert world.count(query) == SECOND
            assert world.calls.count(FIRST) == 3

        simulate(NAMES, work)

    def test_a_failure_now_and_then_is_none_of_the_node(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            numbers = iter(range(1_000))

            def behave(address: str) -> Behaviour:
                if address == FIRST and next(numbers) % 3:
                    return Behaviour(error=lambda: Unavailable("this collection is busy"))
                return Behaviour()

            world.behave = behave
            for _ in range(60):
                world.count(query)
                world.clock.sleep(1.0)  # Tokens for repeats.
            assert world.calls.count(FIRST) == 60

        simulate(NAMES, work)

    def test_all_are_tried_if_none_is_known_to_be_well(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            world.behave = lambda _address: Behaviour(error=refused)
            with pytest.raises(Unavailable):
                world.count(query)
            world.behave = _only({})
            world.calls.clear()
            assert world.count(query) in (FIRST, SECOND, THIRD)
            assert len(world.calls) == 1

        simulate(NAMES, work)

    def test_it_gives_up_after_so_many_attempts_with_growing_pauses(self) -> None:
        def work(world: World) -> None:
            world.behave = lambda _address: Behaviour(error=refused)
            with pytest.raises(Unavailable, match="refused"):
                world.count(world.query(attempts_max=8, pass_nodes_max=3, pause_s=0.1))
            assert len(world.calls) == 8
            assert 0.15 <= world.clock.monotonic_s() <= 0.5, "two pauses: 0.1 and 0.2 or so"

        simulate(NAMES, work)

    def test_it_does_not_wait_beyond_the_deadline(self) -> None:
        def work(world: World) -> None:
            world.behave = lambda _address: Behaviour(seconds=0.001, error=refused)
            with pytest.raises(Unavailable):
                world.count(world.query(pause_s=1.0, pass_nodes_max=1), timeout_s=0.4)
            assert world.clock.monotonic_s() < 0.1

        simulate(NAMES, work)

    def test_what_came_back_during_the_pauses_answers(self) -> None:
        def work(world: World) -> None:
            world.behave = lambda _address: (
                Behaviour(error=refused) if world.clock.monotonic_s() < 0.05 else Behaviour()
            )
            world.count(world.query())

        simulate("a", work)

    def test_without_members_it_says_so_and_has_the_membership_look(self) -> None:
        def work(world: World) -> None:
            with pytest.raises(Unavailable, match="no member"):
                world.count(world.query())
            assert world.membership.refreshed == 1

        simulate("", work)


class TestStorms:
    def test_what_is_sent_stays_in_proportion_when_all_fail(self) -> None:
        def work(world: World) -> None:
            world.behave = lambda _address: Behaviour(error=refused)
            query = world.query()
            for _ in range(1_000):
                with pytest.raises(Unavailable):
                    world.count(query)
            elapsed_s = world.clock.monotonic_s()
            assert len(world.calls) <= 1_000 + 0.2 * 1_000 + 50 + 5 * elapsed_s
            assert len(world.calls) <= 1_400

        simulate(NAMES, work)

    def test_a_lone_request_is_repeated_all_the_same(self) -> None:
        def work(world: World) -> None:
            world.behave = lambda _address: Behaviour(error=refused)
            with pytest.raises(Unavailable):
                world.count(world.query())
            assert len(world.calls) == RoutingConfig().attempts_max

        simulate(NAMES, work)


class TestHedges:
    def test_a_slow_first_node_is_outrun_and_its_call_cancelled(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            for _ in range(WARM):
                world.count(query)
            world.behave = _only({FIRST: Behaviour(seconds=10.0)})
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
            world.behave = _only({FIRST: Behaviour(seconds=0.03), SECOND: Behaviour(seconds=1.0)})
            world.calls.clear()
            assert world.count(query) == FIRST
            assert world.calls == [FIRST, SECOND]
            world.clock.sleep(0.01)
            assert world.cancelled == [SECOND]

        simulate(NAMES, work)

    def test_nobody_is_hedged_before_it_is_known_how_long_calls_take(self) -> None:
        def work(world: World) -> None:
            world.behave = _only({FIRST: Behaviour(seconds=1.0)})
            assert world.count(world.query()) == FIRST
            assert world.calls == [FIRST]

        simulate(NAMES, work)

    def test_the_delay_follows_the_usual_latency(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            world.behave = lambda _address: Behaviour(seconds=0.2)
            for _ in range(WARM):
                world.count(query)
            world.behave = _only({FIRST: Behaviour(seconds=10.0)})
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
            if share:
                assert len(world.calls) - requests > 0.7 * min(share, slow) * requests

        simulate(NAMES, work)

    def test_a_429_of_the_first_node_is_not_hedged(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            for _ in range(WARM):
                world.count(query)
            world.behave = _only({FIRST: Behaviour(seconds=0.005, error=lambda: Exhausted("no"))})
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
            world.behave = _only(
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
            world.behave = _only(
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
            world.behave = _only(
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
            world.behave = _only(
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
            world.behave = _only({FIRST: Behaviour(seconds=1e6)})
            world.calls.clear()
            for _ in range(100):
                assert world.count(query) == SECOND
            assert 5 <= world.calls.count(FIRST) < 15

        simulate(NAMES, work)

    def test_no_answer_for_long_is_a_failure_whatever_is_usual(self) -> None:
        """Nothing is known yet, and no hedge was earned."""

        def work(world: World) -> None:
            query = world.query()
            world.behave = _only({FIRST: Behaviour(seconds=1e6)})
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


class TestMembers:
    def test_a_client_is_closed_after_the_last_call_to_a_member_that_is_gone(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            world.behave = lambda _address: Behaviour(seconds=1.0)
            done = world.beside(lambda: world.count(query))
            world.clock.sleep(0.1)
            world.membership.become({"x": "x:1"})
            assert world.count(query) == "x:1"
            done.wait()
            assert {client.address: client.closed for client in world.clients} == {
                FIRST: True, "x:1": False,
            }  # fmt: skip

        simulate(NAMES, work)

    def test_a_name_at_a_new_address_is_connected_to_anew(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            world.count(query)
            name = FIRST.partition(":")[0]
            world.membership.become({**world.membership.members.addresses, name: "moved:1"})
            assert world.count(query) == "moved:1"
            assert [client.closed for client in world.clients] == [True, False]

        simulate(NAMES, work)

    def test_a_failed_request_finds_the_new_member_in_its_next_pass(self) -> None:
        def work(world: World) -> None:
            world.behave = lambda address: Behaviour(error=None if address == "new:1" else refused)
            world.membership.on_refresh = lambda: world.membership.become({"a": "new:1"})
            assert world.count(world.query()) == "new:1"

        simulate("a", work)
