"""Cyclic garbage is collected in short steps: the young at once, the old when nobody waits."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from ochredb_node.memory import ShortCollections
from ochredb_node.node import Node

from .kernel import ManualClock, add_rows, ids_of, make_collection, running_node


class _Knot:
    """Refers to itself: only the collector frees it."""

    def __init__(self) -> None:
        self.myself = self


@pytest.fixture(autouse=True)
def collector_as_before() -> Iterator[None]:
    threshold = gc.get_threshold()
    yield
    gc.set_threshold(*threshold)
    gc.unfreeze()


def _dies_after(tidied: ShortCollections, calls: list[bool]) -> bool:
    """Whether a cycle that dies after one call is gone after these further ones."""
    knot = _Knot()
    known = weakref.ref(knot)
    tidied.tidy(idle=False)
    del knot
    for idle in calls:
        tidied.tidy(idle=idle)
    return known() is None


def test_young_garbage_goes_at_once() -> None:
    known = weakref.ref(_Knot())
    ShortCollections(ManualClock()).tidy(idle=False)
    assert known() is None


def test_old_garbage_goes_when_nothing_was_asked_for_some_time() -> None:
    tidied = ShortCollections(ManualClock())
    assert not _dies_after(tidied, [False] * 50)
    assert not _dies_after(tidied, [*[True] * 9, False, *[True] * 9])
    assert _dies_after(tidied, [True] * 10)


def test_old_garbage_of_a_busy_process_goes_after_an_hour() -> None:
    clock = ManualClock()
    tidied = ShortCollections(clock)
    knot = _Knot()
    known = weakref.ref(knot)
    tidied.tidy(idle=False)
    del knot
    clock.advance(3_500)
    tidied.tidy(idle=False)
    assert known() is not None
    clock.advance(200)
    tidied.tidy(idle=False)
    assert known() is None


def test_an_idle_process_looks_at_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[None] = []
    monkeypatch.setattr(gc, "unfreeze", lambda: looks.append(None))
    tidied = ShortCollections(ManualClock())
    for idle in (False, *[True] * 100):
        tidied.tidy(idle=idle)
    assert len(looks) == 1


def test_the_interpreter_leaves_the_oldest_generation_alone() -> None:
    young, middle, _ = gc.get_threshold()
    ShortCollections(ManualClock()).start()
    assert gc.get_threshold() == (young, middle, 1_000_000)


def test_the_node_tells_whether_it_was_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    clock = ManualClock()
    with running_node(clock=clock) as node:
        monkeypatch.setattr(node, "_tidy", told.append)
        collection = make_collection(node)
        _housekeep(node, clock)
        add_rows(node, collection, 0, 10)
        node._housekeep()  # Within a second of a write.
        _housekeep(node, clock)
        ids_of(node, collection)
        _housekeep(node, clock)
        _housekeep(node, clock)
    assert told == [True, False, True, False, True]


def _housekeep(node: Node, clock: ManualClock) -> None:
    clock.advance(2)
    node._housekeep()
