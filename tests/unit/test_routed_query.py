"""Reads over several query nodes: failover, circuits, waiting, and what is not repeated."""

from __future__ import annotations

from collections import Counter

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

from .routing import Behaviour, World, addresses, only, refused, simulate

FIRST, SECOND, THIRD = addresses("a", "b", "c")
NAMES = "abc"


class TestFailover:
    def test_the_first_of_the_order_answers(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            assert [world.count(query) for _ in range(10)] == [FIRST] * 10
            assert len(world.clients) == 1, "others are not even connected to"

        simulate(NAMES, work)

    def test_the_next_answers_for_one_that_is_not_reached(self) -> None:
        def work(world: World) -> None:
            world.behave = only({FIRST: Behaviour(error=refused)})
            query = world.query()
            assert world.count(query) == SECOND
            assert world.calls == [FIRST, SECOND]
            assert world.membership.refreshed == 1
            assert world.clock.monotonic_s() < 0.01, "there is no pause before another node"
            assert (query._budget.counted.repeats, query._nodes.open_circuits) == (1, 1)
            world.behave = only({})
            world.clock.sleep(10.0)
            assert world.count(query) == FIRST
            assert (query._budget.counted.repeats, query._nodes.open_circuits) == (1, 0)

        simulate(NAMES, work)

    @pytest.mark.parametrize(
        "error", [NotFound, InvalidArgument, Exhausted, Internal, Corrupt, DeadlineExceeded]
    )
    def test_other_errors_are_raised_at_once(self, error: type[OchreError]) -> None:
        def work(world: World) -> None:
            world.behave = only({FIRST: Behaviour(error=lambda: error("no"))})
            with pytest.raises(error):
                world.count(world.query())
            assert world.calls == [FIRST]

        simulate(NAMES, work)

    def test_one_that_could_not_be_reached_is_left_alone_for_a_while(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            world.behave = only({FIRST: Behaviour(error=refused)})
            for _ in range(20):
                assert world.count(query) == SECOND
            assert world.calls.count(FIRST) == 1
            world.behave = only({})
            world.clock.sleep(1.0)
            assert world.count(query) == FIRST, "a call after the pause finds it back"

        simulate(NAMES, work)

    def test_after_the_pause_one_call_tries_and_the_others_wait_for_its_outcome(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            world.behave = only({FIRST: Behaviour(error=refused)})
            world.count(query)
            world.behave = only({FIRST: Behaviour(seconds=0.05)})
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
            world.behave = only({FIRST: draining})
            for _ in range(100):
                assert world.count(query) == SECOND
            assert world.calls.count(FIRST) == 1

        simulate(NAMES, work)

    def test_one_whose_store_is_away_is_left_alone_after_three(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            failing = Behaviour(error=lambda: Unavailable("the store does not answer"))
            world.behave = only({FIRST: failing})
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
            world.behave = only({})
            world.calls.clear()
            assert world.count(query) in (FIRST, SECOND, THIRD)
            assert len(world.calls) == 1

        simulate(NAMES, work)

    def test_while_all_are_gone_it_waits_and_asks_seldom(self) -> None:
        def work(world: World) -> None:
            world.behave = lambda _address: Behaviour(error=refused)
            with pytest.raises(Unavailable, match="refused"):
                world.count(world.query())
            assert 3.5 <= world.clock.monotonic_s() <= 5.5
            assert 3 <= len(world.calls) <= 20

        simulate(NAMES, work)

    def test_it_gives_up_after_so_many_attempts(self) -> None:
        def work(world: World) -> None:
            world.behave = lambda _address: Behaviour(error=lambda: Unavailable("store away"))
            with pytest.raises(Unavailable, match="store away"):
                world.count(world.query(attempts_max=4))
            assert len(world.calls) == 4
            assert 0.05 <= world.clock.monotonic_s() <= 0.2, "one pause"

        simulate(NAMES, work)

    def test_it_does_not_wait_beyond_the_deadline(self) -> None:
        def work(world: World) -> None:
            world.behave = lambda _address: Behaviour(seconds=0.001, error=refused)
            query = world.query(pause_s=1.0, pause_s_max=1.0, pass_nodes_max=1)
            with pytest.raises(Unavailable):
                world.count(query, timeout_s=0.4)
            assert world.clock.monotonic_s() < 0.1

        simulate(NAMES, work)

    def test_all_that_wait_go_on_when_one_has_found_it_back(self) -> None:
        def work(world: World) -> None:
            query = world.query()
            world.behave = lambda _address: Behaviour(error=refused)
            done = [world.beside(lambda: world.count(query)) for _ in range(200)]
            world.clock.sleep(3.0)
            before = len(world.calls)
            assert before < 200 * 3 + 20, "each has tried each once, and few have tried again"
            world.behave = only({})
            for one in done:
                one.wait()
            assert len(world.calls) == before + 200, "and nobody needed a token"
            assert world.clock.monotonic_s() < 5.0

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
            world.behave = lambda _address: Behaviour(error=lambda: Unavailable("store away"))
            query = world.query()

            def ask() -> None:
                with pytest.raises(Unavailable):
                    world.count(query)

            done = [world.beside(ask) for _ in range(1_000)]
            for one in done:
                one.wait()
            elapsed_s = world.clock.monotonic_s()
            assert 1_000 < len(world.calls) <= 1_000 + 0.2 * 1_000 + 50 + 5 * elapsed_s
            assert elapsed_s < 10.0

        simulate(NAMES, work)

    def test_while_a_role_is_gone_hardly_anything_is_sent_after_the_first_attempts(self) -> None:
        def work(world: World) -> None:
            world.behave = lambda _address: Behaviour(error=refused)
            query = world.query()

            def ask() -> None:
                with pytest.raises(Unavailable):
                    world.count(query)

            done = [world.beside(ask) for _ in range(1_000)]
            for one in done:
                one.wait()
            assert len(world.calls) <= 3 * 1_000 + 50

        simulate(NAMES, work)

    def test_a_lone_request_is_repeated_all_the_same(self) -> None:
        def work(world: World) -> None:
            world.behave = lambda _address: Behaviour(error=lambda: Unavailable("store away"))
            with pytest.raises(Unavailable):
                world.count(world.query())
            assert len(world.calls) == RoutingConfig().attempts_max

        simulate(NAMES, work)


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
