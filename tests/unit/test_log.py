"""The log: dense offsets, group commit, idempotency, conditions, limits (I1, I2, I3, I8, I9)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ochredb import replay
from ochredb.cancel import Cancel
from ochredb.catalog.appends import AppendRequest, BacklogLimits
from ochredb.errors import (
    Conflict,
    Corrupt,
    Exhausted,
    Gone,
    InvalidArgument,
    NotFound,
    OchreError,
    Unprocessable,
)
from ochredb.fragment import encode
from ochredb.replay import read_operations
from ochredb.types import Appended, Op, Operations
from ochredb_node.node import Node

from .kernel import (
    ManualClock,
    append,
    forget_recent,
    ids_of,
    make_collection,
    object_keys,
    operations,
    running_node,
    sql,
    submit,
    unexpected,
)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(str(tmp_path / "store")) as node:
        yield node


def _add(*ids: str, value: float = 1.0) -> Operations:
    return operations(Op.ADD, ids, [[value, value]] * len(ids))


def _log(node: Node, collection: str) -> list[tuple[int, list[str]]]:
    snapshot = node.logs.snapshot(collection)
    return [
        (first, request.ids)
        for first, request in read_operations(
            node.logs,
            node.store,
            collection,
            snapshot.floor_offset + 1,
            snapshot.last_offset,
            snapshot.dimension,
            unexpected,
        )
    ]


@pytest.mark.parametrize("inline_bytes_max", [256 << 10, 0], ids=["inline", "objects"])
def test_offsets_are_dense_and_requests_contiguous_with_eight_threads(
    tmp_path: Path, inline_bytes_max: int
) -> None:
    with running_node(str(tmp_path), inline_bytes_max=inline_bytes_max) as node:
        collections = [make_collection(node, name) for name in ("one", "two")]

        def write(writer: int) -> list[tuple[str, Appended, list[str]]]:
            done = []
            write_one = submit if writer % 2 else append
            for number in range(12):
                collection = collections[(writer + number) % 2]
                ids = [f"{writer}-{number}-{i}" for i in range(1 + number % 3)]
                done.append((collection, write_one(node, collection, _add(*ids)), ids))
            return done

        with ThreadPoolExecutor(8) as pool:
            acknowledged = [item for batch in pool.map(write, range(8)) for item in batch]
        for collection in collections:
            log = _log(node, collection)
            expected = 1
            for first, ids in log:
                assert first == expected
                expected += len(ids)
            assert node.logs.snapshot(collection).next_offset == expected
            mine = {
                (answer.first_offset, answer.last_offset): ids
                for where, answer, ids in acknowledged
                if where == collection
            }
            assert mine == {(first, first + len(ids) - 1): ids for first, ids in log}


class SlowFirstFlush:
    """Holds the first flush until as many requests as wanted are in the queue."""

    def __init__(self, node: Node, waiting: int) -> None:
        self.flushes: list[int] = []
        self._node, self._waiting = node, waiting
        self._append = node.logs.append
        self._monkey = pytest.MonkeyPatch()
        self._begun = threading.Event()

    def __enter__(self) -> SlowFirstFlush:
        self._monkey.setattr(self._node.logs, "append", self._slow)
        return self

    def __exit__(self, *_: object) -> None:
        self._monkey.undo()

    def wait_until_begun(self) -> None:
        """The first flush has taken what it writes: what comes now is for the next."""
        assert self._begun.wait(60)

    def _slow(
        self, requests: list[AppendRequest], *, skip_locked: bool = False
    ) -> list[Appended | OchreError]:
        self._begun.set()
        if not self.flushes:
            pause = threading.Event()
            for _ in range(2_000):
                if len(self._node.log._commits.line.requests) >= self._waiting:
                    break
                pause.wait(0.005)
        self.flushes.append(len(requests))
        return self._append(requests, skip_locked=skip_locked)


def _together(calls: Sequence[Callable[[], Appended]]) -> list[Appended | BaseException]:
    """Run calls at once, each in its own thread; what each returned or raised."""
    outcomes: list[Appended | BaseException] = [NotFound("not run")] * len(calls)

    def run(number: int) -> None:
        try:
            outcomes[number] = calls[number]()
        except OchreError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return outcomes


def test_what_queues_up_during_a_flush_shares_the_next_one(node: Node) -> None:
    collection = make_collection(node)
    requests = [_add(f"r{number}") for number in range(9)]
    calls = [partial(append, node, collection, request) for request in requests]
    with SlowFirstFlush(node, 8) as slow:
        outcomes = _together(calls)
    assert slow.flushes == [1, 8]
    offsets = sorted(item.first_offset for item in outcomes if isinstance(item, Appended))
    assert offsets == list(range(1, 10))


def test_submitted_requests_share_flushes_and_fail_alone(node: Node) -> None:
    collection = make_collection(node)
    append(node, collection, _add("first"))
    wanted = [_add("a"), _add("b"), operations(Op.ADD, ["bad"], [[1.0, 2.0, 3.0]]), _add("c")]
    outcomes: dict[int, Appended | BaseException] = {}
    told, threads = threading.Event(), set()

    def deliver(number: int, outcome: Appended | BaseException) -> None:
        outcomes[number] = outcome
        threads.add(threading.current_thread().name)
        if len(outcomes) == len(wanted):
            told.set()
        if number == 1:
            raise ValueError("whoever is told may fail")

    with SlowFirstFlush(node, 3) as slow:
        for number, request in enumerate(wanted):
            node.log.submit(collection, request, cancel=Cancel(), deliver=partial(deliver, number))
            slow.wait_until_begun()
        assert told.wait(60)
    assert slow.flushes == [1, 3]
    assert threads == {"ochredb-log"}
    assert isinstance(outcomes[2], InvalidArgument)
    assert [type(outcomes[n]) for n in (0, 1, 3)] == [Appended] * 3
    assert submit(node, collection, _add("later")).first_offset == 5
    assert ids_of(node, collection) == ["first", "a", "b", "c", "later"]


def test_a_listener_that_fails_does_not_fail_the_write(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = make_collection(node)

    def fail(*_: object) -> None:
        raise Corrupt("a damaged part, perhaps")

    monkeypatch.setattr(node.query, "follow", fail)
    for write in (append, submit):
        assert isinstance(write(node, collection, _add(write.__name__)), Appended)
    assert ids_of(node, collection) == ["append", "submit"]


def test_what_waited_too_long_is_not_written(node: Node) -> None:
    collection = make_collection(node)
    given_up = Cancel()
    outcomes: queue.SimpleQueue[Appended | BaseException] = queue.SimpleQueue()
    with SlowFirstFlush(node, 3) as slow:
        for name, cancel in (("a", Cancel()), ("b", given_up), ("c", Cancel())):
            node.log.submit(collection, _add(name), cancel=cancel, deliver=outcomes.put)
            slow.wait_until_begun()
        given_up.cancel()
        node.log.submit(collection, _add("d"), cancel=Cancel(), deliver=outcomes.put)
        kinds = sorted(type(outcomes.get(timeout=60)).__name__ for _ in range(4))
    assert kinds == ["Appended"] * 3 + ["Cancelled"]
    assert slow.flushes == [1, 2]
    assert ids_of(node, collection) == ["a", "c", "d"]


def test_one_bad_request_in_a_flush_fails_alone(node: Node) -> None:
    collection = make_collection(node)
    append(node, collection, _add("first"))
    calls: list[Callable[[], Appended]] = [
        lambda: append(node, collection, _add("holder")),
        lambda: append(node, collection, _add("good")),
        lambda: append(node, collection, operations(Op.ADD, ["bad"], [[1.0, 2.0, 3.0]])),
        lambda: append(node, "00000000-0000-7000-8000-000000000000", _add("lost")),
        lambda: append(node, collection, _add("late"), expect_last_offset=1),
    ]
    with SlowFirstFlush(node, 4):
        outcomes = _together(calls)
    kinds = [type(item) for item in outcomes]
    # Whoever came first led alone; the expectation of offset 1 holds for no later request.
    assert kinds.count(Appended) in (2, 3)
    assert kinds[2] is InvalidArgument
    assert kinds[3] is NotFound
    assert "dimension of 2, got 3" in str(outcomes[2])
    two = zip(("holder", "good"), kinds[:2], strict=True)
    wanted = {"first", *(name for name, kind in two if kind is Appended)}
    assert wanted <= set(ids_of(node, collection))
    assert "bad" not in ids_of(node, collection)


def test_large_payloads_of_a_flush_go_to_one_object(tmp_path: Path) -> None:
    with running_node(str(tmp_path), inline_bytes_max=2_000) as node:
        one, two = make_collection(node, "one"), make_collection(node, "two")
        large = [_add(*(f"{n}-{i:030}" for i in range(100))) for n in range(4)]
        calls: list[Callable[[], Appended]] = [
            lambda: append(node, one, _add("small")),
            lambda: append(node, one, large[0]),
            lambda: append(node, two, large[1]),
            lambda: append(node, two, large[2]),
            lambda: append(node, two, _add("tiny")),
        ]
        with SlowFirstFlush(node, 4) as slow:
            outcomes = _together(calls)
        assert all(isinstance(item, Appended) for item in outcomes)
        assert slow.flushes == [1, 4]
        keys = object_keys(node)
        # A large request that led the first flush has an object of its own.
        assert 1 <= len(keys) <= 2
        assert all(key.startswith("fragments/") for key in keys)
        assert len(ids_of(node, one)) == 101
        assert len(ids_of(node, two)) == 201
        node.compactor.compact_now(one)
        assert len(ids_of(node, two)) == 201, "the object is shared: the other's fragments stay"


class TestIdempotency:
    """A client's key: the same content is applied once, another one is refused (I8)."""

    def test_a_repeat_gets_the_first_answer(self, node: Node) -> None:
        collection = make_collection(node)
        first = append(node, collection, _add("a", "b"), idempotency_key="k")
        append(node, collection, _add("c"))
        again = append(node, collection, _add("a", "b"), idempotency_key="k")
        assert (again.first_offset, again.last_offset) == (first.first_offset, first.last_offset)
        assert (first.repeated, again.repeated) == (False, True)
        assert node.logs.snapshot(collection).last_offset == 3

    def test_another_content_is_unprocessable_and_changes_nothing(self, node: Node) -> None:
        collection = make_collection(node)
        append(node, collection, _add("a"), idempotency_key="k")
        with pytest.raises(Unprocessable, match="k"):
            append(node, collection, _add("b"), idempotency_key="k")
        assert ids_of(node, collection) == ["a"]

    def test_a_key_outlives_the_log_and_ends_with_its_retention(self, tmp_path: Path) -> None:
        clock = ManualClock()
        with running_node(str(tmp_path), clock=clock) as node:
            collection = make_collection(node)
            append(node, collection, _add("a"), idempotency_key="k")
            node.compactor.compact_now(collection)
            clock.advance(3_600)
            node.logs.expire_idempotency(86_400)
            assert append(node, collection, _add("a"), idempotency_key="k").repeated
            clock.advance(86_400)
            node.logs.expire_idempotency(86_400)
            assert not append(node, collection, _add("a"), idempotency_key="k").repeated

    def test_an_expired_key_whose_fragment_is_still_there_can_be_used_again(
        self, tmp_path: Path
    ) -> None:
        clock = ManualClock()
        with running_node(str(tmp_path), clock=clock) as node:
            collection = make_collection(node)
            append(node, collection, _add("a"), idempotency_key="k")
            clock.advance(100_000)
            node.logs.expire_idempotency(86_400)
            assert append(node, collection, _add("b"), idempotency_key="k").first_offset == 2

    def test_refusals_are_not_recorded(self, node: Node) -> None:
        collection = make_collection(node)
        append(node, collection, _add("a"))
        with pytest.raises(Conflict):
            append(node, collection, _add("b"), idempotency_key="k", expect_last_offset=7)
        assert not append(node, collection, _add("b"), idempotency_key="k").repeated

    def test_keys_belong_to_one_collection(self, node: Node) -> None:
        one, two = make_collection(node, "one"), make_collection(node, "two")
        append(node, one, _add("a"), idempotency_key="k")
        assert not append(node, two, _add("b"), idempotency_key="k").repeated

    def test_eight_threads_with_one_key_apply_it_once(self, node: Node) -> None:
        collection = make_collection(node)
        calls = [lambda: append(node, collection, _add("a"), idempotency_key="k")] * 8
        outcomes = _together(calls)
        assert sum(not item.repeated for item in outcomes if isinstance(item, Appended)) == 1
        assert node.logs.snapshot(collection).last_offset == 1


def test_an_expectation_is_checked_under_the_lock(node: Node) -> None:
    collection = make_collection(node)
    append(node, collection, _add("a"), expect_last_offset=0)
    append(node, collection, _add("b"), expect_last_offset=1)
    with pytest.raises(Conflict, match="expected last offset 1, found 2"):
        append(node, collection, _add("c"), expect_last_offset=1)
    assert node.logs.snapshot(collection).last_offset == 2


class TestBacklog:
    """The limits are exact, and end with compaction."""

    def test_rows(self, tmp_path: Path) -> None:
        with running_node(str(tmp_path), backlog=BacklogLimits(tail_rows_max=5)) as node:
            collection = make_collection(node)
            append(node, collection, _add("a", "b", "c"))
            with pytest.raises(Exhausted, match="3 operations"):
                append(node, collection, _add("d", "e", "f"))
            append(node, collection, _add("d", "e"))
            with pytest.raises(Exhausted, match="limit 5"):
                append(node, collection, _add("g"))
            node.compactor.compact_now(collection)
            append(node, collection, _add("g"))
            assert ids_of(node, collection) == list("abcdeg")

    def test_bytes(self, tmp_path: Path) -> None:
        size = encode(_add("a")).size
        limits = BacklogLimits(tail_bytes_max=2 * size)
        with running_node(str(tmp_path), backlog=limits) as node:
            collection = make_collection(node)
            append(node, collection, _add("a"))
            append(node, collection, _add("b"))
            with pytest.raises(Exhausted, match=f"{2 * size} bytes"):
                append(node, collection, _add("c"))
            node.compactor.compact_now(collection)
            append(node, collection, _add("c"))

    def test_an_embedded_writer_makes_room_itself(self, tmp_path: Path) -> None:
        limits = BacklogLimits(tail_rows_max=4)
        with running_node(str(tmp_path), backlog=limits, foreground=True) as node:
            collection = make_collection(node)
            for number in range(10):
                append(node, collection, _add(f"a{number}", f"b{number}"))
            assert len(ids_of(node, collection)) == 20
            while node.logs.snapshot(collection).last_offset % 4:
                append(node, collection, _add("filler", "filler2"))
            deleted = node.log.append_evaluated(
                collection, lambda: operations(Op.DELETE, ["a0", "b0"]), cancel=Cancel()
            )
            assert deleted.last_offset - deleted.first_offset == 1


class TestEvaluated:
    """The last resort of a conditional write: nothing can land between reading and appending."""

    def test_it_sees_everything_and_nothing_comes_between(self, node: Node) -> None:
        collection = make_collection(node)
        append(node, collection, _add("a", "b"))
        started, results = threading.Event(), []

        def write() -> None:
            started.set()
            results.append(append(node, collection, _add("late")))

        writer = threading.Thread(target=write)

        def evaluate() -> Operations:
            writer.start()
            started.wait(10)
            writer.join(0.2)
            assert writer.is_alive(), "the writer waits for the lock"
            return operations(Op.DELETE, ids_of(node, collection))

        answer = node.log.append_evaluated(collection, evaluate, cancel=Cancel())
        writer.join(30)
        assert (answer.first_offset, answer.last_offset) == (3, 4)
        assert results[0].first_offset == 5
        assert ids_of(node, collection) == ["late"]

    def test_nothing_to_write_writes_nothing(self, node: Node) -> None:
        collection = make_collection(node)
        append(node, collection, _add("a"))
        answer = node.log.append_evaluated(
            collection, lambda: operations(Op.DELETE, []), cancel=Cancel()
        )
        assert (answer.first_offset, answer.last_offset) == (2, 1)
        assert node.logs.snapshot(collection).last_offset == 1

    def test_an_error_inside_leaves_nothing_behind(self, node: Node) -> None:
        collection = make_collection(node)

        def evaluate() -> Operations:
            raise InvalidArgument("no")

        with pytest.raises(InvalidArgument):
            node.log.append_evaluated(collection, evaluate, cancel=Cancel())
        append(node, collection, _add("a"))
        with pytest.raises(NotFound):
            node.log.append_evaluated("nowhere", evaluate, cancel=Cancel())

    def test_in_memory_a_read_in_progress_does_not_deadlock_with_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The reader is stopped in the middle of its refresh, while the writer evaluates."""
        with running_node() as node:
            collection = make_collection(node)
            append(node, collection, _add("a"))
            forget_recent(node)
            inside, go_on = threading.Event(), threading.Event()
            fragments = node.logs.fragments

            def slow(*arguments: Any) -> Any:
                inside.set()
                go_on.wait(10)
                return fragments(*arguments)

            monkeypatch.setattr(node.logs, "fragments", slow)
            reader = threading.Thread(target=ids_of, args=(node, collection), daemon=True)

            def evaluate() -> Operations:
                return operations(Op.DELETE, ids_of(node, collection))

            writer = threading.Thread(
                target=lambda: node.log.append_evaluated(collection, evaluate, cancel=Cancel()),
                daemon=True,
            )
            reader.start()
            assert inside.wait(10)
            writer.start()
            writer.join(0.2)
            go_on.set()
            writer.join(10)
            reader.join(10)
            assert not writer.is_alive()
            assert not reader.is_alive()
            assert ids_of(node, collection) == []


def test_a_long_log_is_read_in_pages_without_holes(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "_PAGE_FRAGMENTS", 3)
    collection = make_collection(node)
    for number in range(8):
        append(node, collection, _add(*(f"{number}-{i}" for i in range(1 + number % 2))))
    forget_recent(node)
    log = _log(node, collection)
    assert [first for first, _ in log] == [1, 2, 4, 5, 7, 8, 10, 11]
    with node.database.write() as session:
        session.run(sql("DELETE FROM fragments WHERE start = 7"))
    forget_recent(node)
    with pytest.raises(Gone, match="offset 7"):
        _log(node, collection)
