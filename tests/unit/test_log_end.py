"""The log when it is closed, when memory runs out, and where a doubtful write waits (I1, I8)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ochredb.cancel import Cancel
from ochredb.catalog.appends import AppendRequest
from ochredb.errors import OchreError, OutcomeUnknown, OutOfMemory, Unavailable
from ochredb.types import Appended, Op, Operations
from ochredb_node.node import Node

from .kernel import append, ids_of, make_collection, operations, running_node, submit

Outcome = Appended | BaseException


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(str(tmp_path / "store")) as node:
        yield node


def _add(*ids: str) -> Operations:
    return operations(Op.ADD, ids, [[1.0, 1.0]] * len(ids))


def _submitted(node: Node, collection: str, name: str, outcomes: dict[str, Outcome]) -> None:
    def deliver(outcome: Outcome) -> None:
        outcomes[name] = outcome

    node.log.submit(collection, _add(name), cancel=Cancel(), deliver=deliver)


class _HeldFlush:
    """Holds every flush until it is let go: a disk that does not answer."""

    def __init__(self, node: Node) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self._append = node.logs.append
        node.logs.append = self._held  # type: ignore[method-assign]

    def _held(
        self, requests: list[AppendRequest], *, skip_locked: bool = False
    ) -> list[Appended | OchreError]:
        self.begun.set()
        assert self.go_on.wait(60)
        return self._append(requests)


def test_closing_does_not_wait_for_ever_and_tells_those_who_waited(node: Node) -> None:
    collection, outcomes = make_collection(node), dict[str, Outcome]()
    held = _HeldFlush(node)
    _submitted(node, collection, "first", outcomes)
    assert held.begun.wait(60)
    _submitted(node, collection, "second", outcomes)
    waiter = threading.Thread(target=_append_refused, args=(node, collection, outcomes))
    waiter.start()
    while len(node.log._commits.line.requests) < 2:
        threading.Event().wait(0.005)
    node.log.close(timeout_s=0.1)
    waiter.join(60)
    assert isinstance(outcomes["second"], Unavailable)
    assert isinstance(outcomes["third"], Unavailable)
    with pytest.raises(Unavailable, match="closed"):
        _submitted(node, collection, "late", outcomes)
    held.go_on.set()
    while "first" not in outcomes:
        threading.Event().wait(0.005)
    assert isinstance(outcomes["first"], Appended), "what had begun is told as it ended"
    assert ids_of(node, collection) == ["first"]


def _append_refused(node: Node, collection: str, outcomes: dict[str, Outcome]) -> None:
    try:
        append(node, collection, _add("third"))
    except Unavailable as error:
        outcomes["third"] = error


def test_closing_finishes_what_was_taken(node: Node) -> None:
    collection, outcomes = make_collection(node), dict[str, Outcome]()
    held = _HeldFlush(node)
    for name in ("a", "b", "c"):
        _submitted(node, collection, name, outcomes)
    closing = threading.Thread(target=node.log.close)
    closing.start()
    held.go_on.set()
    closing.join(60)
    assert all(isinstance(outcome, Appended) for outcome in outcomes.values())
    assert ids_of(node, collection) == ["a", "b", "c"]


def test_a_doubtful_write_is_repeated_before_those_that_came_later(node: Node) -> None:
    collection, outcomes = make_collection(node), dict[str, Outcome]()
    held = _HeldFlush(node)
    table_append = held._append
    doubts = ["a"]

    def lossy(
        requests: list[AppendRequest], *, skip_locked: bool = False
    ) -> list[Appended | OchreError]:
        if doubts:
            doubts.clear()
            raise OutcomeUnknown("the commit's answer was lost")
        return table_append(requests)

    held._append = lossy
    _submitted(node, collection, "a", outcomes)
    assert held.begun.wait(60)
    for name in ("x", "y"):
        _submitted(node, collection, name, outcomes)
    held.go_on.set()
    while len(outcomes) < 3:
        threading.Event().wait(0.005)
    assert all(isinstance(outcome, Appended) for outcome in outcomes.values()), outcomes
    assert ids_of(node, collection) == ["a", "x", "y"]


@pytest.mark.parametrize("write", [append, submit])
class TestNoMemory:
    def test_in_the_transaction_means_that_nothing_was_written(
        self, node: Node, write: Callable[..., Appended], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        collection = make_collection(node)
        with monkeypatch.context() as patched:

            def no_memory(*_: object) -> Appended:
                raise MemoryError

            patched.setattr("ochredb.catalog.appends.Appends._write", no_memory)
            with pytest.raises(OutOfMemory):
                write(node, collection, _add("a"))
        assert ids_of(node, collection) == []
        assert write(node, collection, _add("b")).first_offset == 1

    def test_after_the_commit_does_not_make_a_write_fail(
        self, node: Node, write: Callable[..., Appended], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        collection = make_collection(node)

        def no_memory(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(node.logs.recent, "put", no_memory)
        assert write(node, collection, _add("a")).first_offset == 1
        assert ids_of(node, collection) == ["a"]

    def test_while_the_outcome_is_put_together_is_resolved_by_a_repeat(
        self, node: Node, write: Callable[..., Appended], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        collection = make_collection(node)
        table_append, failures = node.logs.append, [1]

        def committed_then_out_of_memory(
            requests: list[AppendRequest],
        ) -> list[Appended | OchreError]:
            done = table_append(requests)
            if failures:
                failures.pop()
                raise MemoryError
            return done

        monkeypatch.setattr(node.logs, "append", committed_then_out_of_memory)
        answer = write(node, collection, _add("a"))
        assert (answer.first_offset, answer.repeated) == (1, True)
        assert ids_of(node, collection) == ["a"]
