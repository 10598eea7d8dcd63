"""The pool: tenants take turns; what waits for a thread and belongs together runs as one."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

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


# -- tenants


class _Held(WorkerPool):
    """Its threads are busy for nobody until `release`."""

    def __init__(self, *, threads: int, queue_max: int) -> None:
        super().__init__("test", threads=threads, queue_max=queue_max)
        self._go_on, begun = threading.Event(), threading.Barrier(threads + 1)
        self.order: list[str] = []  # Whose turns there were.

        def hold() -> None:
            begun.wait(10)
            self._go_on.wait()

        self._holding = [self.submit(hold) for _ in range(threads)]
        begun.wait(10)

    def ask(self, tenant: str, work: Callable[[], object] = bool) -> asyncio.Future[object]:
        def noted() -> object:
            self.order.append(tenant)
            return work()

        return self.submit(noted, tenant=tenant)

    def release(self) -> None:
        self._go_on.set()

    async def end(self) -> None:
        """Nothing is left of whoever was there."""
        await asyncio.gather(*self._holding)
        self.close()
        assert (self.pending, self._lines, self._open) == (0, {}, {})
        assert (self._turns.qsize(), self._spare) == (0, 0)


def test_a_flood_of_one_tenant_keeps_no_other_waiting() -> None:
    async def run() -> None:
        pool = _Held(threads=1, queue_max=100)
        asked = [pool.ask("loud") for _ in range(20)]
        asked += [pool.ask(tenant) for tenant in ("quiet", "other", "quiet")]
        pool.release()
        await asyncio.gather(*asked)
        assert pool.order[:6] == ["loud", "quiet", "other", "loud", "quiet", "loud"]
        await pool.end()

    asyncio.run(run())


def test_threads_are_shared_and_not_turns() -> None:
    """Whoever keeps a thread for long has one of them, and not every second turn."""

    async def run() -> None:
        pool = _Held(threads=2, queue_max=100)
        done = threading.Event()
        long = [pool.ask("long", partial(done.wait, 10)) for _ in range(5)]
        short = [pool.ask("short") for _ in range(5)]
        pool.release()
        await asyncio.gather(*short)
        done.set()
        await asyncio.gather(*long)
        numbers = [number for number, tenant in enumerate(pool.order) if tenant == "long"]
        assert numbers[1:] == [6, 7, 8, 9]
        await pool.end()

    asyncio.run(run())


def test_a_full_queue_refuses_whoever_has_most_waiting() -> None:
    async def run() -> None:
        pool = _Held(threads=2, queue_max=6)
        loud = [pool.ask("loud") for _ in range(6)]
        with pytest.raises(Exhausted, match="too many test requests") as caught:
            pool.ask("loud")
        assert caught.value.retry_after_s > 0
        quiet = [pool.ask(tenant) for tenant in ("quiet", "quiet", "other")]
        assert [one.done() for one in loud] == [False] * 3 + [True] * 3
        for tenant in ("loud", "quiet"):  # Who would have most again, or as much as who has most.
            with pytest.raises(Exhausted):
                pool.ask(tenant)
        pool.release()
        outcomes = await asyncio.gather(*loud, *quiet, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [bool] * 3 + [Exhausted] * 3 + [bool] * 3
        await pool.end()

    asyncio.run(run())


def test_the_smallest_queue_is_not_for_whoever_runs() -> None:
    async def run() -> None:
        pool = WorkerPool("test", threads=1, queue_max=1)
        begun, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            begun.set()
            go_on.wait()

        runs = pool.submit(hold, tenant="loud")
        assert begun.wait(10)
        waits = pool.submit(bool, tenant="loud")
        quiet = pool.submit(bool, tenant="quiet")
        with pytest.raises(Exhausted):  # Of two that have nothing else, the first stays.
            pool.submit(bool, tenant="third")
        go_on.set()
        assert await quiet is False
        with pytest.raises(Exhausted):
            await waits
        await runs
        pool.close()

    asyncio.run(run())


def test_one_of_a_batch_is_pushed_out_alone() -> None:
    batches: list[list[int]] = []

    def run_batch(items: Sequence[int]) -> list[int]:
        batches.append(list(items))
        return [10 * item for item in items]

    async def run() -> None:
        pool = _Held(threads=1, queue_max=3)
        loud = [pool.submit_together("g", number, run_batch, tenant="loud") for number in range(3)]
        quiet = pool.submit_together("g", 7, run_batch, tenant="quiet")
        pool.release()
        outcomes = await asyncio.gather(*loud, quiet, return_exceptions=True)
        assert [*outcomes[:2], outcomes[3]] == [0, 10, 70]
        assert isinstance(outcomes[2], Exhausted)
        assert sorted(batches) == [[0, 1], [7]], "tenants are not batched together"
        await pool.end()

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_is_answered_or_refused(seed: int) -> None:
    """Alone and in groups, of several tenants, more than the queue holds."""
    rng = random.Random(seed)

    def run_batch(items: Sequence[int]) -> list[int]:
        assert 1 <= len(items) <= 16
        return [-item for item in items]

    async def run() -> None:
        pool = _Held(threads=3, queue_max=20)
        asked: dict[int, asyncio.Future[int]] = {}
        refused = 0
        for number in range(3_000):
            tenant = rng.choice("aaaaaabbcd")
            try:
                if rng.random() < 0.5:
                    asked[number] = pool.submit(partial(int, -number), tenant=tenant)
                else:
                    group = rng.randrange(2)
                    asked[number] = pool.submit_together(group, number, run_batch, tenant=tenant)
            except Exhausted:
                refused += 1
            if number == 300:
                pool.release()
            if rng.random() < 0.1:
                await asyncio.sleep(0)
        outcomes = await asyncio.gather(*asked.values(), return_exceptions=True)
        for number, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, Exhausted):
                refused += 1
            else:
                assert outcome == -number
        assert 200 < refused < 3_000  # Of the first 301, all that find no place.
        await pool.end()

    asyncio.run(run())
