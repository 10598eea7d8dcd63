"""Quick reads that arrive in one turn of the loop are run as one batch, with the same answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from ochredb.cancel import Cancel
from ochredb.errors import InvalidArgument
from ochredb.peers import QuickRead
from ochredb.types import QueryAnswer, Records
from ochredb_frontend.service import QuickAnswer
from ochredb_frontend.together import Together
from ochredb_frontend.wire import Answer, Read


class _Frontend:
    """Records the sizes of batches; a batch with a bad read fails as a whole."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run_together(self, reads: list[QuickAnswer], cancel: Cancel) -> list[bytes]:
        self.batches.append(len(reads))
        return [read.run(cancel) for read in reads]


def _read(name: str, group: str | None = "g") -> QuickAnswer:
    def run(_cancel: Cancel) -> QueryAnswer:
        if name == "bad":
            raise InvalidArgument("bad")
        return QueryAnswer([Records(ids=[name])], [])

    def encode(answer: Answer) -> bytes:
        assert isinstance(answer, QueryAnswer)
        return answer.records[0].ids[0].encode()

    return QuickAnswer(Read("c", None, encode), QuickRead(run, group))


async def _answer(given: bytes | Awaitable[bytes]) -> bytes | Exception:
    try:
        return given if isinstance(given, bytes) else await given
    except InvalidArgument as error:
        return error


def _run(
    reads: list[QuickAnswer], announced: int
) -> tuple[list[int], list[bool], list[bytes | Exception]]:
    """The sizes of the batches, which reads were answered at once, and the answers."""
    frontend = _Frontend()
    together = Together(frontend)  # type: ignore[arg-type]

    async def run() -> tuple[list[bool], list[bytes | Exception]]:
        for _ in range(announced):
            together.announce()
        given = []
        for read in reads:
            together.started()
            given.append(together.run(read, Cancel()))
        return [isinstance(one, bytes) for one in given], [await _answer(one) for one in given]

    at_once, answers = asyncio.run(run())
    return frontend.batches, at_once, answers


def test_a_read_that_comes_alone_runs_at_once() -> None:
    assert _run([_read("a")], 1) == ([], [True], [b"a"])
    assert _run([_read("a"), _read("b")], 0) == ([], [True, True], [b"a", b"b"])


def test_reads_of_one_turn_run_as_one_batch() -> None:
    names = ["a", "b", "c", "d"]
    batches, at_once, answers = _run([_read(name) for name in names], 4)
    assert (batches, at_once) == ([4], [False] * 4)
    assert answers == [name.encode() for name in names]


def test_groups_are_kept_apart_and_some_reads_are_never_grouped() -> None:
    reads = [_read("a", "g"), _read("b", "h"), _read("c", "g"), _read("d", None)]
    batches, at_once, answers = _run(reads, 4)
    assert (batches, at_once) == ([2], [False, False, False, True])
    assert answers == [b"a", b"b", b"c", b"d"]


def test_a_bad_read_fails_alone() -> None:
    _, _, answers = _run([_read("a"), _read("bad"), _read("c")], 3)
    assert answers[0] == b"a" and answers[2] == b"c"
    assert isinstance(answers[1], InvalidArgument)


def test_an_announced_request_that_never_starts_holds_nobody_up() -> None:
    batches, at_once, answers = _run([_read("a"), _read("b")], 5)
    assert (batches, at_once) == ([2], [False, False])
    assert answers == [b"a", b"b"]


def test_a_batch_has_a_bound() -> None:
    batches, _, answers = _run([_read(str(n)) for n in range(40)], 40)
    assert batches == [16, 16, 8]
    assert answers == [str(n).encode() for n in range(40)]
