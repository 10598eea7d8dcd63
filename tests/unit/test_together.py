"""Quick reads that arrive in one turn of the loop are run as one batch, with the same answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from ochredb.cancel import Cancel
from ochredb.errors import InvalidArgument
from ochredb.peers import QuickRead
from ochredb.types import QueryAnswer, Records
from ochredb_frontend.service import QuickAnswer, QuickAnswers
from ochredb_frontend.together import Together
from ochredb_frontend.wire import Answer, Read


class _Batch:
    def __init__(self, reads: list[QuickAnswer]) -> None:
        self._reads = [read.quick for read in reads]
        self.searched_by: str | None = None

    def search(self) -> None:
        self.searched_by = threading.current_thread().name

    def answers(self, cancel: Cancel) -> list[QueryAnswer]:
        assert self.searched_by is not None
        answers = [read.run(cancel) for read in self._reads]
        return [answer for answer in answers if isinstance(answer, QueryAnswer)]


class _Frontend:
    """Remembers the batches; a batch with a bad read fails as a whole."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.made: list[_Batch] = []

    def together(self, reads: list[QuickAnswer]) -> QuickAnswers:
        self.batches.append(len(reads))
        self.made.append(_Batch(reads))
        return QuickAnswers([read.read for read in reads], self.made[-1])


def _read(name: str, group: str | None = "g", search_us: float = 100.0) -> QuickAnswer:
    def run(_cancel: Cancel) -> QueryAnswer:
        if name == "bad":
            raise InvalidArgument("bad")
        return QueryAnswer([Records(ids=[name])], [])

    def encode(answer: Answer) -> bytes:
        assert isinstance(answer, QueryAnswer)
        return answer.records[0].ids[0].encode()

    return QuickAnswer(Read("c", None, encode), QuickRead(run, group, search_us=search_us))


def _run(
    *turns: list[QuickAnswer],
    searched_by: str = "ochredb-search",
) -> tuple[list[int], list[list[bool]], list[list[bytes | Exception]]]:
    """The sizes of the batches; by turn of the loop, which reads were answered at once, and how."""
    frontend = _Frontend()
    together = Together(frontend)  # type: ignore[arg-type]

    async def run() -> tuple[list[list[bool]], list[list[bytes | Exception]]]:
        at_once, answers = [], []
        for reads in turns:
            given: list[list[bytes | Exception]] = [[] for _ in reads]
            for read, answer in zip(reads, given, strict=True):
                together.run(read, Cancel(), answer.append)
            at_once.append([len(answer) == 1 for answer in given])
            await asyncio.sleep(0)
            while not all(given):
                await asyncio.sleep(0.001)
            answers.append([answer for (answer,) in given])
        return at_once, answers

    at_once, answers = asyncio.run(run())
    together.close()
    for batch in frontend.made[:1]:  # The first of a crowd; others may have waited too long.
        assert batch.searched_by == searched_by
    return frontend.batches, at_once, answers


_PAIR = [_read("x"), _read("y")]


def test_reads_that_come_alone_run_at_once() -> None:
    assert _run([_read("a")], [_read("b")]) == ([], [[True], [True]], [[b"a"], [b"b"]])


def test_after_company_the_reads_of_a_turn_are_one_batch() -> None:
    names = ["a", "b", "c", "d"]
    batches, at_once, answers = _run(_PAIR, [_read(name) for name in names], [_read("e")])
    assert (batches, at_once) == ([4, 1], [[True] * 2, [False] * 4, [False]])
    assert answers == [[b"x", b"y"], [name.encode() for name in names], [b"e"]]


def test_without_company_for_a_while_reads_run_at_once_again() -> None:
    _, at_once, _ = _run(_PAIR, *([_read("a")] for _ in range(10)))
    assert at_once == [[True, True], *[[False]] * 8, [True], [True]]


def test_groups_are_kept_apart_and_some_reads_are_never_grouped() -> None:
    reads = [_read("a", "g"), _read("b", "h"), _read("c", "g"), _read("d", None)]
    batches, at_once, answers = _run(_PAIR, reads)
    assert (batches, at_once[1]) == ([2, 1], [False, False, False, True])
    assert answers[1] == [b"a", b"b", b"c", b"d"]


def test_a_bad_read_fails_alone() -> None:
    _, _, (_, answers) = _run(_PAIR, [_read("a"), _read("bad"), _read("c")])
    assert answers[0] == b"a" and answers[2] == b"c"
    assert isinstance(answers[1], InvalidArgument)


def test_a_batch_has_a_bound() -> None:
    batches, _, (_, answers) = _run(_PAIR, [_read(str(n)) for n in range(40)])
    assert batches == [16, 16, 8]  # The second by the loop itself, the third when there is time.
    assert answers == [str(n).encode() for n in range(40)]


def test_without_a_thread_to_be_had_a_batch_is_searched_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    batches, _, (_, answers) = _run(_PAIR, [_read("a"), _read("b")], searched_by="MainThread")
    assert batches == [2]
    assert answers == [b"a", b"b"]


class _Searcher:
    """One that ends when the test says so."""

    def __init__(self) -> None:
        self.busy = False
        self.done: Callable[[], None] = lambda: None

    def search(self, batch: _Batch, done: Callable[[], None]) -> bool:
        if self.busy:
            return False
        batch.search()
        self.busy, self.done = True, done
        return True


def test_a_batch_that_was_searched_is_answered_before_the_loop_searches_another() -> None:
    """With much waiting, the loop used to search a batch itself while answers lay ready."""
    together, searcher = Together(_Frontend()), _Searcher()  # type: ignore[arg-type]
    together.close()
    together._searchers = [searcher]  # type: ignore[list-item]
    order: list[str] = []
    search = _Batch.search

    def noted(batch: _Batch) -> None:
        order.append("search")
        search(batch)

    async def run() -> None:
        for read in _PAIR:
            together.run(read, Cancel(), lambda _: None)
        await asyncio.sleep(0)
        together.run(_read("first"), Cancel(), lambda _: order.append("first"))
        await asyncio.sleep(0)
        assert searcher.busy
        for number in range(40):
            together.run(_read(str(number)), Cancel(), lambda _: None)
        searcher.busy = False
        searcher.done()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_Batch, "search", noted)
        asyncio.run(run())
    assert order[:3] == ["search", "search", "first"], "first the other thread's, then the answer"
    assert order[3] == "search", "then the loop's own"


@pytest.mark.parametrize(("search_us", "sizes"), [(100.0, [6]), (2_000.0, [3, 3])])
def test_long_searches_have_a_thread_for_each_processor(search_us: float, sizes: list[int]) -> None:
    frontend = _Frontend()
    together, searchers = Together(frontend), [_Searcher(), _Searcher()]  # type: ignore[arg-type]
    together.close()
    together._searchers = searchers  # type: ignore[assignment]
    answers: list[bytes | Exception] = []

    async def run() -> None:
        for read in _PAIR:
            together.run(read, Cancel(), lambda _: None)
        await asyncio.sleep(0)
        for name in "abcdef":
            together.run(_read(name, search_us=search_us), Cancel(), answers.append)
        await asyncio.sleep(0)
        together.run(_read("g", search_us=search_us), Cancel(), answers.append)
        await asyncio.sleep(0)
        assert frontend.batches == sizes, "what comes while all of them are busy waits"
        for searcher in searchers:
            searcher.busy = False
            searcher.done()

    asyncio.run(run())
    assert sorted(map(str, answers)) == [str(name.encode()) for name in "abcdef"]


def test_the_loop_does_no_long_search_and_takes_no_end_of_them() -> None:
    frontend = _Frontend()
    together, searcher = Together(frontend), _Searcher()  # type: ignore[arg-type]
    together.close()
    together._searchers = [searcher]  # type: ignore[list-item]
    answers: list[bytes | Exception] = []

    async def run() -> list[bool]:
        together.run(_read("first", search_us=2_000.0), Cancel(), answers.append)
        assert not frontend.batches and not answers
        await asyncio.sleep(0)
        assert frontend.batches == [1] and searcher.busy
        taken = []
        for number in range(80):
            read = _read(str(number), search_us=2_000.0)
            taken.append(together.run(read, Cancel(), answers.append))
            await asyncio.sleep(0)
        assert frontend.batches == [1] and not answers
        return taken

    assert asyncio.run(run()) == [True] * 64 + [False] * 16
