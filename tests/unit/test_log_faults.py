"""The log when something fails: lost answers, sweeps, broken stores, interrupts (I1, I8, I9)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ochredb.catalog.appends import AppendRequest
from ochredb.errors import (
    InvalidArgument,
    NotFound,
    OchreError,
    OutcomeUnknown,
    Unavailable,
)
from ochredb.types import Appended, Op, Operations
from ochredb_node.node import Node

from .kernel import (
    ManualClock,
    add_rows,
    append,
    ids_of,
    make_collection,
    object_keys,
    operations,
    running_node,
    sql,
    submit,
)
from .test_log import SlowFirstFlush


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(str(tmp_path / "store")) as node:
        yield node


def _add(*ids: str, value: float = 1.0) -> Operations:
    return operations(Op.ADD, ids, [[value, value]] * len(ids))


class TestUnknownOutcome:
    """The commit's own result is lost: only a repeat with the same request id can tell (I8)."""

    @pytest.mark.parametrize("write", [append, submit])
    @pytest.mark.parametrize("landed", [False, True])
    def test_it_is_resolved_by_a_repeat(
        self, tmp_path: Path, landed: bool, write: Callable[..., Appended]
    ) -> None:
        with running_node(str(tmp_path)) as node:
            collection = make_collection(node)
            table_append, failures = node.logs.append, [1]

            def lossy(
                requests: list[AppendRequest], *, skip_locked: bool = False
            ) -> list[Appended | OchreError]:
                if failures.pop() if failures else False:
                    if landed:
                        table_append(requests)
                    raise OutcomeUnknown("the commit's answer was lost")
                return table_append(requests)

            node.logs.append = lossy  # type: ignore[method-assign]
            answer = write(node, collection, _add("a", "b"))
            assert (answer.first_offset, answer.last_offset) == (1, 2)
            assert answer.repeated is landed
            assert node.logs.snapshot(collection).last_offset == 2

    @pytest.mark.parametrize("write", [append, submit])
    def test_it_stays_unknown_while_the_repeat_fails(
        self, node: Node, write: Callable[..., Appended]
    ) -> None:
        collection = make_collection(node)
        errors = [Unavailable("still down"), OutcomeUnknown("lost")]

        def broken(
            _requests: list[AppendRequest], *, skip_locked: bool = False
        ) -> list[Appended | OchreError]:
            raise errors.pop()

        with pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(node.logs, "append", broken)
            with pytest.raises(OutcomeUnknown):
                write(node, collection, _add("a"), idempotency_key="k")
        assert write(node, collection, _add("a"), idempotency_key="k").first_offset == 1


def test_a_payload_swept_before_its_commit_is_written_again(tmp_path: Path) -> None:
    """A writer that slept past the sweep loses nothing: it uploads again under a new key."""
    clock = ManualClock()
    with running_node(str(tmp_path), clock=clock, inline_bytes_max=0) as node:
        collection = make_collection(node)
        append(node, collection, _add("before"))
        table_append = node.logs.append
        slept: list[str | None] = []

        def sleepy(
            requests: list[AppendRequest], *, skip_locked: bool = False
        ) -> list[Appended | OchreError]:
            if not slept:
                slept.append(requests[0].object_key)
                clock.advance(3_600)
                node.compactor.collect_now(sweep_orphans=True)
            return table_append(requests)

        node.logs.append = sleepy  # type: ignore[method-assign]
        append(node, collection, _add("sleeper"))
        assert slept[0] not in object_keys(node)
        assert ids_of(node, collection) == ["before", "sleeper"]


def test_a_payload_that_is_swept_each_time_is_no_conflict(tmp_path: Path) -> None:
    """Nobody changed what the writer looked at; a repeat may succeed."""
    clock = ManualClock()
    with running_node(str(tmp_path), clock=clock, inline_bytes_max=0) as node:
        collection = make_collection(node)
        append(node, collection, _add("before"))
        table_append = node.logs.append

        def sleepy(
            requests: list[AppendRequest], *, skip_locked: bool = False
        ) -> list[Appended | OchreError]:
            clock.advance(3_600)
            node.compactor.collect_now(sweep_orphans=True)
            return table_append(requests)

        node.logs.append = sleepy  # type: ignore[method-assign]
        with pytest.raises(Unavailable, match=r"had been swept: nothing was changed; retry later"):
            append(node, collection, _add("sleeper"), idempotency_key="k")
        node.logs.append = table_append  # type: ignore[method-assign]
        assert ids_of(node, collection) == ["before"]
        assert not append(node, collection, _add("sleeper"), idempotency_key="k").repeated
        assert ids_of(node, collection) == ["before", "sleeper"]


def test_a_failing_store_fails_the_flush_and_nothing_is_written(tmp_path: Path) -> None:
    with running_node(str(tmp_path), inline_bytes_max=0) as node:
        collection = make_collection(node)
        create = node.store.create

        def broken(key: str, data: Any) -> None:
            raise Unavailable("disk on fire")

        node.store.create = broken  # type: ignore[method-assign]
        with pytest.raises(Unavailable, match="disk on fire"):
            append(node, collection, _add("a"))
        node.store.create = create  # type: ignore[method-assign]
        assert append(node, collection, _add("b")).first_offset == 1


def test_a_waiter_that_is_interrupted_does_not_stop_the_queue(node: Node) -> None:
    """Ctrl-C while waiting: whoever comes next is still served."""
    collection = make_collection(node)
    wait = threading.Event.wait
    victim: list[threading.Thread] = []

    def interrupted(event: threading.Event, timeout: float | None = None) -> bool:
        if victim and threading.current_thread() is victim[0] and timeout is None:
            raise KeyboardInterrupt
        return wait(event, timeout)

    def append_and_be_interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            append(node, collection, _add("interrupted"))

    with SlowFirstFlush(node, 2):
        leader = threading.Thread(target=append, args=(node, collection, _add("leader")))
        leader.start()
        while not node.log._commits.line.flushing:
            wait(threading.Event(), 0.005)
        victim.append(threading.Thread(target=append_and_be_interrupted))
        monkey = pytest.MonkeyPatch()
        monkey.setattr(threading.Event, "wait", interrupted)
        try:
            victim[0].start()
            victim[0].join(10)
        finally:
            monkey.undo()
        others = [
            threading.Thread(target=append, args=(node, collection, _add(name)), daemon=True)
            for name in ("x", "y")
        ]
        for thread in others:
            thread.start()
        for thread in (leader, *others):
            thread.join(10)
            assert not thread.is_alive()
    assert set(ids_of(node, collection)) >= {"leader", "x", "y"}


def test_operations_that_could_never_be_folded_are_refused(node: Node) -> None:
    """ARCHITECTURE.md: better than skipping them in every reader."""
    collection = make_collection(node)
    for request in (
        operations(Op.ADD, ["a"]),
        operations(Op.UPSERT, ["a"], documents=["text"]),
        operations(Op.ADD, ["a", "b"], [[1.0], [2.0]], embedded=[True, False]),
    ):
        with pytest.raises(InvalidArgument, match="embedding"):
            append(node, collection, request)
    assert node.logs.snapshot(collection).last_offset == 0


def test_log_time_never_goes_back(tmp_path: Path) -> None:
    clock = ManualClock()
    with running_node(str(tmp_path), clock=clock) as node:
        collection = make_collection(node)
        append(node, collection, _add("a"))
        clock.advance(-1_000)
        append(node, collection, _add("b"))
        with node.database.read() as session:
            rows = session.all(sql("SELECT time_us FROM fragments ORDER BY start"))
        assert rows == sorted(rows)


def test_a_dropped_collection_takes_no_more(node: Node) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 3)
    node.namespace.delete_collection("default_tenant", "default_database", "records")
    with pytest.raises(NotFound):
        append(node, collection, _add("a"))
