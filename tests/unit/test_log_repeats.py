"""Writes under a name that their caller made: repeated anywhere, applied once (I8)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ochredb.cancel import Cancel, Cancelled
from ochredb.catalog.appends import AppendRequest
from ochredb.catalog.core import select
from ochredb.catalog.repeats import KEYS_KEPT_S, NAMES_KEPT_S
from ochredb.catalog.schema import idempotency
from ochredb.catalog.sqlite import SqliteDatabase
from ochredb.catalog.statement import Statement
from ochredb.errors import Conflict, DeadlineExceeded, OchreError, OutcomeUnknown
from ochredb.types import Appended, Op, Operations
from ochredb_node.node import Node

from .kernel import ManualClock, ids_of, make_collection, operations, running_node

_NAMES = Statement(select(idempotency.c.key))
NAME = "0190a0b0-0000-7000-8000-000000000001"


@pytest.fixture
def node(tmp_path: Path, clock: ManualClock) -> Iterator[Node]:
    with running_node(str(tmp_path / "store"), clock=clock) as node:
        yield node


def _add(*ids: str) -> Operations:
    return operations(Op.ADD, ids, [[1.0, 1.0]] * len(ids))


def _append(node: Node, collection: str, name: str | None = NAME, *ids: str) -> Appended:
    return node.log.append(collection, _add(*(ids or ("a", "b"))), request_id=name, cancel=Cancel())


def _names_kept(node: Node) -> int:
    with node.database.read() as session:
        return len(session.all(_NAMES))


def test_a_repeat_gets_the_first_answer(node: Node) -> None:
    collection = make_collection(node)
    first = _append(node, collection)
    again = _append(node, collection)
    assert (first.first_offset, first.last_offset, first.repeated) == (1, 2, False)
    assert (again.first_offset, again.last_offset, again.repeated) == (1, 2, True)
    assert node.logs.snapshot(collection).last_offset == 2


def test_also_after_the_fragment_was_folded(node: Node) -> None:
    collection = make_collection(node)
    _append(node, collection)
    node.compactor.fold_now(collection)
    assert node.logs.snapshot(collection).indexed_offset == 2
    again = _append(node, collection)
    assert again == Appended(1, 2, repeated=True)
    assert node.logs.snapshot(collection).last_offset == 2


def test_names_are_forgotten_after_minutes_and_client_keys_are_not(
    node: Node, clock: ManualClock
) -> None:
    collection = make_collection(node)
    _append(node, collection)
    node.log.append(collection, _add("c"), idempotency_key="client", cancel=Cancel())
    node.compactor.fold_now(collection)
    assert _names_kept(node) == 2
    clock.advance(NAMES_KEPT_S - 1.0)
    node.logs.expire_idempotency(KEYS_KEPT_S)
    assert _names_kept(node) == 2
    clock.advance(2.0)
    node.logs.expire_idempotency(KEYS_KEPT_S)
    assert _names_kept(node) == 1
    clock.advance(KEYS_KEPT_S)
    node.logs.expire_idempotency(KEYS_KEPT_S)
    assert _names_kept(node) == 0


def test_old_names_and_those_of_the_process_itself_leave_nothing(
    node: Node, clock: ManualClock
) -> None:
    collection = make_collection(node)
    _append(node, collection)
    _append(node, collection, None, "c")
    clock.advance(NAMES_KEPT_S + 1.0)
    _append(node, collection, None, "d")
    node.compactor.fold_now(collection)
    assert _names_kept(node) == 0


def test_who_slept_until_the_name_had_expired_writes_nothing(
    node: Node, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just before its transaction, while another node took the write."""
    collection = make_collection(node)
    append = node.logs.append

    def sleepy(requests: list[AppendRequest], **terms: bool) -> list[Appended | OchreError]:
        append(requests)
        node.compactor.fold_now(collection)
        clock.advance(NAMES_KEPT_S + 1.0)
        node.logs.expire_idempotency(KEYS_KEPT_S)
        return append(requests, **terms)

    monkeypatch.setattr(node.logs, "append", sleepy)
    with pytest.raises(DeadlineExceeded):
        node.log.append(collection, _add("a", "b"), request_id=NAME, cancel=Cancel(30.0, clock))
    assert node.logs.snapshot(collection).last_offset == 2


def test_a_name_belongs_to_one_collection(node: Node) -> None:
    one, other = make_collection(node, "one"), make_collection(node, "other")
    assert not _append(node, one).repeated
    assert not _append(node, other).repeated


def test_a_condition_is_not_asked_of_a_repeat(node: Node) -> None:
    """The first attempt itself changed what the condition is about."""
    collection = make_collection(node)
    for expected in (False, True):
        answer = node.log.append(
            collection, _add("a"), request_id=NAME, expect_last_offset=0, cancel=Cancel()
        )
        assert answer.repeated is expected
    with pytest.raises(Conflict):
        node.log.append(
            collection, _add("a"), request_id="other", expect_last_offset=0, cancel=Cancel()
        )


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("key", [None, "client"])
def test_what_was_evaluated_is_not_evaluated_again(
    node: Node, folded: bool, key: str | None
) -> None:
    collection = make_collection(node)
    _append(node, collection, None, "a", "b", "c")
    evaluations = []

    def evaluate() -> Operations:
        evaluations.append(1)
        return Operations(op=Op.DELETE, ids=["a", "b"] if len(evaluations) == 1 else [])

    for expected in (False, True):
        answer = node.log.append_evaluated(
            collection, evaluate, idempotency_key=key,
            request_hash=None if key is None else b"hash", request_id=NAME, cancel=Cancel(),
        )  # fmt: skip
        assert answer == Appended(4, 5, repeated=expected)
        if folded:
            node.compactor.fold_now(collection)
    assert len(evaluations) == 1
    assert ids_of(node, collection) == ["c"]


def test_an_answer_lost_for_as_long_as_a_fold_takes(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a catalog elsewhere; the log asks again by itself."""
    monkeypatch.setattr(SqliteDatabase, "is_local", False)
    collection = make_collection(node)
    table_append, failures = node.logs.append, [1]

    def lossy(
        requests: list[AppendRequest], *, skip_locked: bool = False
    ) -> list[Appended | OchreError]:
        answers = table_append(requests, skip_locked=skip_locked)
        if failures:
            failures.clear()
            node.compactor.fold_now(collection)
            raise OutcomeUnknown("the commit's answer was lost")
        return answers

    monkeypatch.setattr(node.logs, "append", lossy)
    assert _append(node, collection, None) == Appended(1, 2, repeated=True)
    assert node.logs.snapshot(collection).last_offset == 2


class TestCancel:
    def test_whoever_waits_is_told_once_at_most_by_a_cancel_taken_back(self) -> None:
        cancel, told = Cancel(), []
        take_back = cancel.when_cancelled(lambda: told.append("gone"))
        cancel.when_cancelled(lambda: told.append("still there"))
        take_back()
        take_back()  # Harmless.
        cancel.cancel()
        assert told == ["still there"]
        cancel.when_cancelled(lambda: told.append("late"))
        assert told == ["still there", "late"]

    def test_a_child_is_cancelled_with_its_parent_or_alone(self) -> None:
        clock = ManualClock()
        parent = Cancel(10.0, clock)
        alone, other = parent.child(), parent.child()
        alone.cancel()
        parent.check()
        other.check()
        with pytest.raises(Cancelled):
            alone.check()
        assert other.remaining_s() == 10.0
        parent.cancel()
        with pytest.raises(Cancelled):
            other.check()
        with pytest.raises(Cancelled):
            parent.child().check()
