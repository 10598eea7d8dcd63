"""Writes over several log nodes: applied once, whatever is lost on the way (I8)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from ochredb.cancel import Cancel
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.membership import StaticMembership
from ochredb.cluster.nodes import Nodes
from ochredb.cluster.routed_compactor import RoutedCompactor
from ochredb.cluster.routed_log import RoutedLog
from ochredb.errors import (
    Conflict,
    Exhausted,
    Internal,
    InvalidArgument,
    NotFound,
    OchreError,
    OutcomeUnknown,
    StorageFull,
    Unavailable,
)
from ochredb.ids import IdSource
from ochredb.types import Appended, Op, Operations

from .kernel import ManualClock
from .routing import COLLECTION, World, addresses, refused, simulate

FIRST, SECOND, THIRD = addresses("a", "b", "c")
NAMES = "abc"
Step = Callable[[], Appended] | OchreError


def lost() -> OutcomeUnknown:
    """What a client raises whose connection broke while it waited."""
    return OutcomeUnknown("the connection was lost", unreachable=True)


@dataclass
class Call:
    address: str
    idempotency_key: str | None
    request_id: str | None
    is_sent: bool = True  # What is to be written, so that it may have been.


@dataclass
class Script:
    """What becomes of each call in turn; afterwards all succeed.

    A number: it is answered after so many seconds, if it is not given up before.
    """

    steps: list[Exception | float] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def outcome(self, call: Call, cancel: Cancel | None = None, world: Any = None) -> Appended:
        self.calls.append(call)
        step = self.steps.pop(0) if self.steps else None
        if isinstance(step, Exception):
            raise step
        if step is not None:
            world.calls.append(call.address)
            try:
                world.wait(step, cancel)
            except OchreError as error:  # As a client says it.
                if not call.is_sent:
                    raise
                raise OutcomeUnknown(f"{error}; the write may have happened") from None
        return Appended(1, 1)

    @property
    def asked(self) -> list[str]:
        return [call.address for call in self.calls]


class FakeLog:
    """A client that does what the script says."""

    def __init__(self, script: Script, address: str, world: World | None = None) -> None:
        self._script, self._address, self._world = script, address, world

    def append(
        self,
        _collection_id: str,
        _operations: Operations,
        *,
        idempotency_key: str | None = None,
        request_id: str | None = None,
        cancel: Cancel | None = None,
        **_more: Any,
    ) -> Appended:
        call = Call(self._address, idempotency_key, request_id)
        return self._script.outcome(call, cancel, self._world)

    def submit(
        self,
        _collection_id: str,
        _operations: Operations,
        *,
        idempotency_key: str | None = None,
        request_id: str | None = None,
        cancel: Cancel,
        deliver: Callable[[Appended | BaseException], None],
    ) -> None:
        assert self._world is not None

        def answer() -> None:
            assert self._world is not None
            self._world.clock.sleep(0.001)
            call = Call(self._address, idempotency_key, request_id)
            try:
                deliver(self._script.outcome(call, cancel, self._world))
            except OchreError as error:
                deliver(error)

        self._world.beside(answer)

    def append_evaluated(
        self, _collection_id: str, evaluate: Callable[[], Operations], **more: Any
    ) -> Appended:
        evaluate()
        return self.append("", Operations(op=Op.DELETE, ids=["a"]), **more)

    def repeated(
        self, _collection_id: str, key: str, _request_hash: bytes, *, cancel: Cancel
    ) -> Appended:
        call = Call(self._address, key, None, is_sent=False)
        return self._script.outcome(call, cancel, self._world)

    def compact_now(self, _collection_id: str) -> None:
        self._script.outcome(Call(self._address, None, None))

    def hint(self, _collection_id: str, _last_offset: int) -> None:
        self._script.outcome(Call(self._address, None, None))


def _routed(script: Script, names: str = NAMES) -> RoutedLog:
    clock = ManualClock()
    rng = random.Random(1)
    nodes: Nodes[Any] = Nodes(
        StaticMembership({name: f"{name}:1" for name in names}),
        lambda address: FakeLog(script, address),
        clock=clock,
        rng=rng,
    )
    return RoutedLog(nodes, budget=RetryBudget(clock), ids=IdSource(clock, rng), clock=clock)


def _append(log: RoutedLog, **more: Any) -> Appended:
    one = Operations(op=Op.DELETE, ids=["a"])
    return log.append(COLLECTION, one, cancel=Cancel(30.0, ManualClock()), **more)


class TestRepeats:
    @pytest.mark.parametrize("error", [refused, lost])
    def test_the_next_node_is_asked_under_the_same_name(
        self, error: Callable[[], OchreError]
    ) -> None:
        script = Script([error()])
        log = _routed(script)
        assert _append(log) == Appended(1, 1)
        assert script.asked == [FIRST, SECOND]
        assert script.calls[0].request_id == script.calls[1].request_id is not None
        _append(log)
        assert script.calls[2].request_id != script.calls[0].request_id

    def test_a_clients_key_is_the_name(self) -> None:
        script = Script([lost()])
        _append(_routed(script), idempotency_key="key")
        assert [(call.idempotency_key, call.request_id) for call in script.calls] == [
            ("key", None), ("key", None),
        ]  # fmt: skip

    def test_a_name_that_the_caller_made_is_kept(self) -> None:
        script = Script()
        _append(_routed(script), request_id="mine")
        assert script.calls[0].request_id == "mine"

    @pytest.mark.parametrize(
        "error", [NotFound, InvalidArgument, Conflict, Exhausted, Internal, StorageFull]
    )
    def test_refusals_are_raised_at_once(self, error: type[OchreError]) -> None:
        script = Script([error("no")])
        with pytest.raises(error):
            _append(_routed(script))
        assert script.asked == [FIRST]

    def test_if_nobody_was_reached_nothing_was_written(self) -> None:
        script = Script([refused() for _ in range(100)])
        with pytest.raises(Unavailable) as caught:
            _append(_routed(script))
        assert not isinstance(caught.value, OutcomeUnknown)
        assert 3 <= len(script.calls) <= 20

    def test_if_one_attempt_is_in_doubt_all_are(self) -> None:
        script = Script([refused(), lost(), *(refused() for _ in range(100))])
        with pytest.raises(OutcomeUnknown):
            _append(_routed(script))

    @pytest.mark.parametrize("error", [Exhausted, Internal, StorageFull])
    def test_a_refusal_without_a_look_leaves_the_doubt(self, error: type[OchreError]) -> None:
        script = Script([lost(), error("no")])
        with pytest.raises(OutcomeUnknown):
            _append(_routed(script))

    @pytest.mark.parametrize("error", [NotFound, InvalidArgument, Conflict])
    def test_a_refusal_under_the_lock_ends_it(self, error: type[OchreError]) -> None:
        script = Script([lost(), error("no")])
        with pytest.raises(error):
            _append(_routed(script))

    def test_a_deadline_that_passes_leaves_the_doubt(self) -> None:
        clock = ManualClock()

        class Slow(Script):
            def outcome(
                self, call: Call, cancel: Cancel | None = None, world: Any = None
            ) -> Appended:
                clock.advance(20.0)
                return super().outcome(call, cancel, world)

        log = _routed(Slow([lost(), lost(), lost()]))
        one = Operations(op=Op.DELETE, ids=["a"])
        with pytest.raises(OutcomeUnknown):
            log.append(COLLECTION, one, cancel=Cancel(30.0, clock))


class TestEvaluated:
    def test_what_evaluate_raises_is_not_repeated(self) -> None:
        script = Script()

        def evaluate() -> Operations:
            raise Unavailable("no query node")

        with pytest.raises(Unavailable, match="no query node"):
            _routed(script).append_evaluated(COLLECTION, evaluate, cancel=Cancel())
        assert script.calls == []

    def test_a_lost_answer_is_asked_for_again(self) -> None:
        script = Script([lost()])
        evaluations = []

        def evaluate() -> Operations:
            evaluations.append(1)
            return Operations(op=Op.DELETE, ids=["a"])

        log = _routed(script)
        assert log.append_evaluated(COLLECTION, evaluate, cancel=Cancel()) == Appended(1, 1)
        assert script.asked == [FIRST, SECOND]
        assert script.calls[0].request_id == script.calls[1].request_id is not None


def _in(world: World, script: Script, budget: RetryBudget | None = None) -> RoutedLog:
    """In the simulation, where time passes."""
    nodes: Nodes[Any] = Nodes(
        world.membership,
        lambda address: FakeLog(script, address, world),
        clock=world.clock,
        rng=world.rng,
    )
    return RoutedLog(
        nodes,
        budget=budget or RetryBudget(world.clock),
        ids=IdSource(world.clock, world.rng),
        clock=world.clock,
    )


class TestSubmit:
    """The same without a thread that waits."""

    def _submit(self, world: World, script: Script) -> tuple[Appended | BaseException, float]:
        """The outcome, and the seconds until it was told."""
        log = _in(world, script)
        outcomes: list[Appended | BaseException] = []
        log.submit(
            COLLECTION,
            Operations(op=Op.DELETE, ids=["a"]),
            cancel=Cancel(30.0, world.clock),
            deliver=outcomes.append,
        )
        assert world.clock.monotonic_s() == 0.0, "it does not wait"
        while not outcomes:
            world.clock.sleep(0.001)
        world.clock.sleep(10.0)
        assert len(outcomes) == 1, "told once"
        return outcomes[0], world.clock.monotonic_s() - 10.0

    def test_the_next_node_is_asked_under_the_same_name(self) -> None:
        def work(world: World) -> None:
            script = Script([lost(), refused()])
            outcome, seconds = self._submit(world, script)
            assert outcome == Appended(1, 1)
            assert script.asked == [FIRST, SECOND, THIRD]
            assert len({call.request_id for call in script.calls}) == 1
            assert seconds < 0.02

        simulate(NAMES, work)

    def test_a_second_pass_comes_after_a_pause(self) -> None:
        def work(world: World) -> None:
            script = Script([refused()])
            outcome, seconds = self._submit(world, script)
            assert outcome == Appended(1, 1)
            assert 0.05 <= seconds <= 0.6

        simulate("a", work)

    @pytest.mark.parametrize(
        ("steps", "told"),
        [
            ([refused() for _ in range(100)], Unavailable),
            ([lost(), *(refused() for _ in range(100))], OutcomeUnknown),
            ([lost(), Exhausted("no")], OutcomeUnknown),
            ([lost(), Conflict("no")], Conflict),
            ([Exhausted("no")], Exhausted),
        ],
    )
    def test_failures_are_told_as_append_raises_them(
        self, steps: list[Exception], told: type[OchreError]
    ) -> None:
        def work(world: World) -> None:
            outcome, _ = self._submit(world, Script(list(steps)))
            assert type(outcome) is told

        simulate(NAMES, work)

    def test_a_node_that_does_not_answer_is_given_up(self) -> None:
        def work(world: World) -> None:
            script = Script([1e6])
            outcome, seconds = self._submit(world, script)
            assert outcome == Appended(1, 1)
            assert script.asked == [FIRST, SECOND]
            assert len({call.request_id for call in script.calls}) == 1
            assert 8.0 <= seconds < 8.1

        simulate(NAMES, work)


class Spent(RetryBudget):
    """Without a token."""

    def take(self) -> bool:
        return False


class TestPatience:
    def _append(self, world: World, log: RoutedLog, timeout_s: float = 30.0) -> Appended:
        one = Operations(op=Op.DELETE, ids=["a"])
        return log.append(COLLECTION, one, cancel=Cancel(timeout_s, world.clock))

    def test_a_node_that_does_not_answer_is_given_up_and_passed_over(self) -> None:
        def work(world: World) -> None:
            script = Script([1e6])
            log = _in(world, script)
            assert self._append(world, log) == Appended(1, 1)
            assert script.asked == [FIRST, SECOND]
            assert script.calls[0].request_id == script.calls[1].request_id
            assert world.clock.monotonic_s() == pytest.approx(8.0)
            self._append(world, log)
            assert script.asked == [FIRST, SECOND, SECOND]

        simulate(NAMES, work)

    def test_one_that_was_sent_nothing_is_given_up_too(self) -> None:
        """What ends then is the attempt, not the client's request."""

        def work(world: World) -> None:
            script = Script([1e6])
            log = _in(world, script)
            cancel = Cancel(30.0, world.clock)
            assert log.repeated(COLLECTION, "key", b"hash", cancel=cancel) == Appended(1, 1)
            assert script.asked == [FIRST, SECOND]
            assert world.clock.monotonic_s() == pytest.approx(8.0)

        simulate(NAMES, work)

    def test_without_a_token_it_is_waited_for(self) -> None:
        """All nodes are slow because the catalog is: an answer is on its way."""

        def work(world: World) -> None:
            script = Script([20.0])
            log = _in(world, script, Spent(world.clock))
            assert self._append(world, log) == Appended(1, 1)
            assert script.asked == [FIRST]
            assert world.clock.monotonic_s() == pytest.approx(20.0)

        simulate(NAMES, work)

    def test_one_that_answers_in_time_is_left_alone(self) -> None:
        def work(world: World) -> None:
            script = Script([7.9])
            assert self._append(world, _in(world, script)) == Appended(1, 1)
            world.clock.sleep(60.0)
            assert script.asked == [FIRST]
            assert world.cancelled == []

        simulate(NAMES, work)

    def test_the_deadline_of_the_request_ends_all(self) -> None:
        def work(world: World) -> None:
            with pytest.raises(OutcomeUnknown):
                self._append(world, _in(world, Script([1e6, 1e6])), timeout_s=10.0)
            assert world.clock.monotonic_s() == pytest.approx(10.0)

        simulate(NAMES, work)


class TestCompactor:
    def _compactor(self, script: Script) -> RoutedCompactor:
        clock = ManualClock()
        nodes: Nodes[Any] = Nodes(
            StaticMembership({name: f"{name}:1" for name in NAMES}),
            lambda address: FakeLog(script, address),
            clock=clock,
            rng=random.Random(1),
        )
        return RoutedCompactor(nodes, budget=RetryBudget(clock), clock=clock)

    def test_the_owner_compacts_or_else_another(self) -> None:
        script = Script([refused(), lost()])
        self._compactor(script).compact_now(COLLECTION)
        assert script.asked == [FIRST, SECOND, THIRD]

    def test_a_hint_goes_to_the_owner_and_its_loss_is_nothing(self) -> None:
        script = Script([refused()])
        compactor = self._compactor(script)
        compactor.hint(COLLECTION, 7)
        assert script.asked == [FIRST]
        compactor.hint(COLLECTION, 8)
        assert len(script.calls) == 2
