"""Who leads a flush and who goes along, decided by data alone (I2, I9)."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from ochredb.cancel import Cancel
from ochredb.catalog.appends import AppendRequest
from ochredb.errors import Exhausted
from ochredb.types import Op, Operations
from ochredb_log.line import Flush, Line, Waiting

OPERATIONS = Operations(op=Op.DELETE, ids=["a"])


def _waiting(collection: str, size: int = 10, *, large: bool = False) -> Waiting:
    request = AppendRequest(
        collection=collection, request_id="", request_hash=None, count=1, dimension=None,
        key_types=frozenset(), expect_last_offset=None, payload=None, object_key=None,
        byte_start=None, byte_stop=None, object_bytes=0, byte_count=size, checksum=0,
    )  # fmt: skip
    return Waiting(request, OPERATIONS, pa.py_buffer(bytes(size)), Cancel(), large)


def _line(flushes_max: int, *, flush_bytes_max: int = 100) -> Line:
    return Line(flushes_max=flushes_max, flush_bytes_max=flush_bytes_max, requests_max=50)


def _joined(line: Line, *waiting: Waiting) -> None:
    for one in waiting:
        line.join(one)


def _flush(line: Line) -> Flush:
    """The next flush, filled."""
    leader = line.next()
    assert leader is not None
    assert leader.flush is not None
    flush = leader.flush
    line.take(flush)
    return flush


class TestOneFlush:
    def test_takes_everything_of_every_kind_in_order(self) -> None:
        line = _line(1)
        waiting = [_waiting("a"), _waiting("b", large=True), _waiting("a"), _waiting("c")]
        _joined(line, *waiting)
        flush = _flush(line)
        assert flush.batch == waiting
        assert line.next() is None
        line.end(flush)
        assert (line.flushing, list(line.requests)) == (0, [])

    def test_stops_at_its_size_and_takes_at_least_its_leader(self) -> None:
        line = _line(1)
        waiting = [_waiting("a", 500), _waiting("a", 60), _waiting("a", 50), _waiting("a", 1)]
        _joined(line, *waiting)
        batches = []
        while line.requests:
            flush = _flush(line)
            batches.append(flush.batch)
            line.end(flush)
        # The last one does not go past the one before it.
        assert batches == [waiting[:1], waiting[1:2], waiting[2:]]


def test_the_line_is_bounded() -> None:
    line = Line(flushes_max=1, flush_bytes_max=1, requests_max=1)
    line.join(_waiting("a"))
    with pytest.raises(Exhausted, match="1 writes are waiting"):
        line.join(_waiting("a"))


class TestSeveralFlushes:
    def test_small_requests_of_a_collection_are_in_one_at_a_time(self) -> None:
        line = _line(4)
        first, second, other = _waiting("a"), _waiting("a"), _waiting("b")
        line.join(first)
        one = _flush(line)
        _joined(line, second, other)
        two = _flush(line)
        assert two.batch == [other], "which went past"
        assert line.next() is None
        line.end(one)
        assert _flush(line).batch == [second]

    def test_small_and_large_ones_do_not_wait_for_each_other(self) -> None:
        line = _line(4)
        large, small = _waiting("a", large=True), _waiting("a")
        _joined(line, large, small)
        assert [_flush(line).batch, _flush(line).batch] == [[large], [small]]

    def test_large_ones_of_a_collection_are_uploaded_side_by_side(self) -> None:
        line = _line(4)
        for _ in range(2):
            line.join(_waiting("a", large=True))
            assert len(_flush(line).batch) == 1

    def test_slow_ones_leave_one_to_the_others(self) -> None:
        line = _line(3)
        for name in "ab":
            line.join(_waiting(name, large=True))
            _flush(line)
        line.join(_waiting("c", large=True))
        assert line.next() is None
        small = _waiting("d")
        line.join(small)
        assert _flush(line).batch == [small]

    def test_one_whose_collection_is_locked_goes_alone(self) -> None:
        line = _line(4)
        busy, other = _waiting("a"), _waiting("b")
        _joined(line, busy, other)
        first = _flush(line)
        assert first.batch == [busy, other]
        busy.alone = True
        line.end(first)
        line.put_back([busy])
        later, more = _waiting("a"), _waiting("b")
        _joined(line, later, more)
        alone, fast = _flush(line), _flush(line)
        assert (alone.batch, alone.is_slow) == ([busy, later], True)
        assert (fast.batch, fast.is_slow) == ([more], False)

    def test_a_leader_is_not_taken_along(self) -> None:
        line = _line(4)
        one, two = _waiting("a"), _waiting("b")
        _joined(line, one, two)
        first, second = line.next(), line.next()
        assert (first, second) == (one, two)
        assert one.flush is not None
        assert two.flush is not None
        assert line.take(one.flush) == [one]
        assert line.take(two.flush) == [two]

    def test_a_leader_that_left_leads_nobody(self) -> None:
        line = _line(4)
        one, two = _waiting("a"), _waiting("a")
        line.join(one)
        leader = line.next()
        assert leader is one
        assert one.flush is not None
        line.join(two)
        line.requests.remove(one)
        assert line.take(one.flush) == []
        line.end(one.flush)
        assert _flush(line).batch == [two]


@pytest.mark.parametrize("flushes_max", [1, 2, 4])
@pytest.mark.parametrize("seed", range(20))
def test_everybody_is_taken_once_and_in_order(flushes_max: int, seed: int) -> None:
    rng = random.Random(seed)
    line = _line(flushes_max)
    flushes: list[Flush] = []
    joined: list[Waiting] = []
    taken: list[Waiting] = []
    again: set[Waiting] = set()
    while len(joined) < 200 or flushes or line.requests:
        if len(joined) < 200 and len(line.requests) < 40 and rng.random() < 0.6:
            one = _waiting(rng.choice("abc"), rng.randrange(1, 60), large=rng.random() < 0.3)
            joined.append(one)
            line.join(one)
        while line.requests and (leader := line.next()) is not None:
            assert leader.flush is not None
            flushes.append(leader.flush)
        if flushes and rng.random() < 0.5:
            flush = rng.choice(flushes)
            if not flush.batch:
                line.take(flush)
                assert flush.leader in flush.batch
                continue
            flushes.remove(flush)
            line.end(flush)
            locked = [
                one for one in flush.batch
                if flushes_max > 1 and one not in again and rng.random() < 0.1
            ]  # fmt: skip
            for one in locked:
                one.alone = True
            again.update(locked)
            line.put_back(locked)
            taken += [one for one in flush.batch if one not in locked]
        small = [one for flush in flushes for one in flush.batch if not one.is_large]
        owners = {(one.request.collection, id(flush)) for flush in flushes for one in flush.batch
                  if one in small}  # fmt: skip
        assert len(owners) == len({name for name, _ in owners}), "one flush for each collection"
        assert len(flushes) == line.flushing <= flushes_max
    assert len(taken) == len(joined) == len(set(taken))
    for name in "abc":
        small = [
            one for one in taken
            if one.request.collection == name and not one.is_large and one not in again
        ]  # fmt: skip
        if flushes_max == 1:
            assert small == [one for one in joined if one in small], "first come, first served"
