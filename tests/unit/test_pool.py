"""The pool: jobs run in threads; what waits for a thread and belongs together runs as one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from ochredb.cancel import Cancel, Cancelled
from ochredb.errors import Exhausted, InvalidArgument, OchreError, Unavailable
from ochredb.peers import GetRequest, QueryRequest
from ochredb.where import Compare
from ochredb_frontend.pool import WorkerPool
from ochredb_frontend.pooled import PooledRead, answer_together
from ochredb_frontend.wire import Answer, Read


def test_what_waits_for_a_thread_runs_with_its_group() -> None:
    batches: list[list[int]] = []

    def run(items: Sequence[int]) -> list[int]:
        batches.append(list(items))
        return [10 * item for item in items]

    async def submit() -> list[int]:
        pool = WorkerPool("test", threads=1, queue_max=100)
        busy = threading.Event()
        first = pool.submit(busy.wait)
        groups = ["a", "b", "a", *["c"] * 20, "a"]
        futures = [pool.submit_together(group, number, run) for number, group in enumerate(groups)]
        assert pool.pending == 1 + len(groups)
        busy.set()
        results = await asyncio.gather(*futures)
        assert await first is True
        again = await pool.submit_together("a", 99, run)
        assert pool.pending == 0
        pool.close()
        return [*results, again]

    assert asyncio.run(submit()) == [*range(0, 240, 10), 990]
    assert batches == [[0, 2, 23], [1], [*range(3, 19)], [19, 20, 21, 22], [99]]


def test_members_of_a_batch_count_as_waiting() -> None:
    async def submit() -> None:
        pool = WorkerPool("test", threads=1, queue_max=2)
        busy = threading.Event()
        waiting = [pool.submit(busy.wait)]
        waiting += [pool.submit_together("a", True, list) for _ in range(2)]
        with pytest.raises(Exhausted):
            pool.submit_together("a", True, list)
        busy.set()
        await asyncio.gather(*waiting)
        pool.close()

    asyncio.run(submit())


class _Frontend:
    """Answers with a read's collection; a batch with a bad read fails as a whole."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def read(self, read: Read, cancel: Cancel) -> bytes:
        cancel.check()
        if read.collection_id == "bad":
            raise InvalidArgument("bad")
        return read.collection_id.encode()

    def read_together(self, reads: list[Read], cancel: Cancel) -> list[bytes]:
        cancel.check()
        self.batches.append(len(reads))
        return [self.read(read, cancel) for read in reads]


def _encode(_answer: Answer) -> bytes:
    return b""


def _read(
    frontend: _Frontend, name: str, request: QueryRequest | GetRequest | None = None
) -> PooledRead:
    return PooledRead(frontend, Read(name, request, _encode), Cancel())  # type: ignore[arg-type]


def test_a_batch_leaves_out_who_is_gone_and_one_fails_alone() -> None:
    frontend = _Frontend()
    reads = [_read(frontend, name) for name in "abc"]
    reads[1].cancel.cancel()
    answers = answer_together(reads)
    assert [answers[0].body, answers[2].body] == [b"a", b"c"]
    assert answers[1].status >= 400
    assert frontend.batches == [2]
    answers = answer_together([_read(frontend, name) for name in ("a", "bad", "c")])
    assert [answer.status for answer in answers] == [200, 400, 200]


def test_a_batch_stops_when_everyone_is_gone() -> None:
    checks: list[str] = []

    class Leaving(_Frontend):
        def read_together(self, reads: list[Read], cancel: Cancel) -> list[bytes]:
            mine[0].cancel.cancel()
            cancel.check()
            checks.append("one is there")
            mine[1].cancel.cancel()
            with pytest.raises(Cancelled):
                cancel.check()
            checks.append("nobody is there")
            return super().read_together(reads, Cancel())

    frontend = Leaving()
    mine = [_read(frontend, "a"), _read(frontend, "b")]
    answer_together(mine)
    assert checks == ["one is there", "nobody is there"]


def test_a_batch_elsewhere_ends_when_the_last_would() -> None:
    """Its deadline is the latest, and who waits for another process is told when all are gone."""
    told: list[str] = []

    class Remote(_Frontend):
        def read_together(self, reads: list[Read], cancel: Cancel) -> list[bytes]:
            assert 15.0 < (cancel.remaining_s() or 0.0) <= 20.0
            assert cancel.request_id == "first"
            cancel.when_cancelled(lambda: told.append("gone"))
            for read in mine:
                assert told == []
                read.cancel.cancel()
            return super().read_together(reads, Cancel())

    frontend = Remote()
    mine = [_read(frontend, "a"), _read(frontend, "b")]
    mine = [
        replace(read, cancel=Cancel(timeout_s, request_id=name))
        for read, timeout_s, name in zip(mine, (10.0, 20.0), ("first", "second"), strict=True)
    ]
    answer_together(mine)
    assert told == ["gone"]


@pytest.mark.parametrize("error", [Exhausted, Unavailable])
def test_a_batch_that_is_refused_for_load_is_not_made_singly(error: type[OchreError]) -> None:
    class Full(_Frontend):
        def read_together(self, reads: list[Read], cancel: Cancel) -> list[bytes]:
            raise error("too much to do")

        def read(self, read: Read, cancel: Cancel) -> bytes:
            raise AssertionError("it is asked for again")

    frontend = Full()
    answers = answer_together([_read(frontend, "a"), _read(frontend, "b")])
    assert [answer.status for answer in answers] == [error.kind.http] * 2


def test_only_searches_that_differ_in_their_vectors_are_a_group() -> None:
    frontend = _Frontend()
    vector = np.zeros((1, 3), np.float32)

    def group(name: str = "c", **more: object) -> object:
        request = QueryRequest(**{"embeddings": vector, **more})  # type: ignore[arg-type]
        return _read(frontend, name, request).group

    where = Compare("a", "$eq", 1)
    assert group(where=where) == group(where=where, embeddings=vector + 1)
    others = [
        group(), group(where=where), group(where=Compare("a", "$eq", True)), group("d"),
        group(n_results=3), group(exact=True), group(target_recall=0.5),
        group(embeddings=np.zeros((1, 4), np.float32)),
    ]  # fmt: skip
    assert len(set(others)) == len(others)
    assert group(ids=["a"]) is None
    assert group(explain=True) is None
    assert group(n_results=1_000) is None
    assert group(embeddings=np.zeros((5, 3), np.float32)) is None
    assert _read(frontend, "c", GetRequest()).group is None
