"""Calls made later, and work done beside, without a thread for each."""

from __future__ import annotations

from functools import partial

from ochredb.cluster.timer import Helpers, Timer
from ochredb.testing.simulation.threads import SimulatedEvent

from .routing import World, simulate


def test_calls_come_in_the_order_in_which_they_are_due() -> None:
    def work(world: World) -> None:
        timer, clock = Timer(world.clock), world.clock
        made: list[tuple[str, float]] = []

        def note(name: str) -> None:
            made.append((name, clock.monotonic_s()))

        for name, delay_s in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
            timer.call_later(delay_s, partial(note, name))
        clock.sleep(10.0)
        assert made == [("a", 1.0), ("b", 2.0), ("c", 3.0)]

    simulate("", work)


def test_one_that_fails_does_not_stop_the_others() -> None:
    def work(world: World) -> None:
        timer = Timer(world.clock)
        made: list[int] = []
        timer.call_later(1.0, lambda: [][0])
        timer.call_later(2.0, lambda: made.append(2))
        world.clock.sleep(10.0)
        assert made == [2]

    simulate("", work)


def test_what_nobody_wants_any_more_neither_wakes_the_thread_nor_takes_memory() -> None:
    def work(world: World) -> None:
        timer = Timer(world.clock)
        done: set[int] = set()
        for number in range(10_000):
            timer.call_later(
                8.0, lambda: world.calls.append("made"), partial(done.__contains__, number)
            )
            world.clock.sleep(0.001)
            done.add(number)
            assert len(timer._heap) <= 3
        world.clock.sleep(20.0)
        assert world.calls == []

    simulate("", work)


def test_after_closing_nothing_is_called() -> None:
    def work(world: World) -> None:
        timer = Timer(world.clock)
        timer.call_later(1.0, lambda: world.calls.append("made"))
        timer.close()
        timer.call_later(1.0, lambda: world.calls.append("made"))
        world.clock.sleep(5.0)
        assert world.calls == []

    simulate("", work)


def test_helpers_are_few_and_used_again() -> None:
    def work(world: World) -> None:
        helpers = Helpers(threads_max=2)
        go_on = SimulatedEvent(world.scheduler)
        assert helpers.run(go_on.wait)
        assert helpers.run(go_on.wait)
        assert not helpers.run(go_on.wait), "nothing waits for one"
        go_on.set()
        world.clock.sleep(0.1)
        for _ in range(10):
            assert helpers.run(lambda: world.calls.append("made"))
            world.clock.sleep(0.1)
        assert len(world.calls) == 10
        assert len(helpers._threads) == 2
        helpers.close()
        world.clock.sleep(0.1)
        assert not any(thread.is_alive() for thread in helpers._threads)
        assert not helpers.run(go_on.wait)

    simulate("", work)
