"""Writes through log nodes that are not reached, lose answers and come late: applied once (I8)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ochredb.cancel import Cancel
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.membership import StaticMembership
from ochredb.cluster.nodes import Nodes
from ochredb.cluster.routed_log import RoutedLog
from ochredb.errors import OutcomeUnknown, Unavailable
from ochredb.ids import IdSource
from ochredb.types import Op
from ochredb_node.node import Node
from tests.unit.kernel import ManualClock, ids_of, make_collection, operations, running_node

NAMES = "abc"


class Lossy:
    """A client of a real log whose calls are refused, lost, and delayed, as a seed decides.

    A delayed call is given up by its caller, and carried out later, perhaps after its repeat.
    """

    def __init__(self, node: Node, rng: random.Random, late: list[Callable[[], object]]) -> None:
        self._node, self._rng, self._late = node, rng, late

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._node.log, name)

        def call(*args: Any, **more: Any) -> Any:
            chance = self._rng.random()
            if chance < 0.2:
                raise Unavailable("connection refused", unreachable=True)
            if chance < 0.4 and name == "append":
                self._late.append(lambda: method(*args, **more))
                raise OutcomeUnknown("the connection was lost", unreachable=True)
            answer = method(*args, **more)
            if chance < 0.6:
                raise OutcomeUnknown("the connection was lost", unreachable=True)
            return answer

        return call


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node() as node:
        yield node


@pytest.mark.parametrize("seed", range(20))
def test_exactly_once_whatever_is_lost(node: Node, seed: int) -> None:
    """Real logs, lost answers, late arrivals and folding in between; counted in the log itself."""
    rng = random.Random(seed)
    clock = ManualClock()
    late: list[Callable[[], object]] = []
    nodes: Nodes[Any] = Nodes(
        StaticMembership({name: f"{name}:1" for name in NAMES}),
        lambda _address: Lossy(node, rng, late),
        clock=clock,
        rng=rng,
    )
    log = RoutedLog(nodes, budget=RetryBudget(clock), ids=IdSource(clock, rng), clock=clock)
    collection = make_collection(node)
    offsets: dict[int, str] = {}  # Of acknowledged writes: no two have one in common.
    acknowledged, refusals, unknown = set[str](), set[str](), set[str]()
    for number in range(60):
        name = f"id-{number}"
        key = None if rng.random() < 0.5 else f"key-{number}"
        try:
            appended = log.append(
                collection,
                operations(Op.ADD, [name], [[1.0, 2.0]]),
                idempotency_key=key,
                cancel=Cancel(),
            )
        except OutcomeUnknown:
            unknown.add(name)
        except Unavailable:
            refusals.add(name)
        else:
            acknowledged.add(name)
            assert appended.first_offset == appended.last_offset
            assert appended.first_offset not in offsets
            offsets[appended.first_offset] = name
        clock.advance(rng.random() * 20.0)
        while late and rng.random() < 0.5:
            late.pop(rng.randrange(len(late)))()
        if rng.random() < 0.2:
            node.compactor.fold_now(collection)
    for call in late:
        call()
    applied = set(ids_of(node, collection))
    assert acknowledged <= applied <= acknowledged | unknown
    assert not refusals & applied
    last = node.logs.snapshot(collection).last_offset
    assert last == len(applied), "nothing was applied twice"
    assert len(acknowledged) > 40
