"""Quick reads that arrived in one turn of the event loop, run as one batch.

Most of what a short search costs beside the search itself are calls that cost the same for eight
queries as for one; and a batch can use every processor, which the event loop's thread alone cannot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable

from ochredb.cancel import Cancel
from ochredb_frontend.service import Frontend, QuickAnswer

_READS_MAX = 16  # Of a batch: bounds how long the loop is held.
_CROWDED_TURNS = 8

Item = tuple[QuickAnswer, Cancel, "asyncio.Future[bytes]"]


class Together:
    """Used by the event loop's thread only.

    Whether a read has company is known only after it: so reads run at once until a turn of the loop
    had several, and from then on wait for the end of their turn, until turns have one again.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._pending: list[Item] = []
        self._reads_of_turn = 0
        self._crowded_turns = 0

    def run(self, read: QuickAnswer, cancel: Cancel) -> bytes | asyncio.Future[bytes]:
        """The answer, or what becomes the answer when this turn of the loop is over."""
        if read.quick.group is None:
            return read.run(cancel)
        loop = asyncio.get_running_loop()
        if not self._reads_of_turn:
            loop.call_soon(self._turn_is_over)
        self._reads_of_turn += 1
        if not self._crowded_turns:
            return read.run(cancel)
        future: asyncio.Future[bytes] = loop.create_future()
        self._pending.append((read, cancel, future))
        if len(self._pending) == _READS_MAX:
            self._answer()
        return future

    def _turn_is_over(self) -> None:
        crowded = self._reads_of_turn > 1
        self._crowded_turns = _CROWDED_TURNS if crowded else max(0, self._crowded_turns - 1)
        self._reads_of_turn = 0
        self._answer()

    def _answer(self) -> None:
        pending, self._pending = self._pending, []
        groups: dict[Hashable, list[Item]] = {}
        for item in pending:
            if not item[2].done():  # Its request was given up.
                groups.setdefault(item[0].quick.group, []).append(item)
        for items in groups.values():
            if len(items) > 1 and self._answer_together(items):
                continue
            for read, cancel, future in items:
                try:
                    future.set_result(read.run(cancel))
                except Exception as error:
                    future.set_exception(error)

    def _answer_together(self, items: list[Item]) -> bool:
        """Whether it went well; if not, each is tried alone, so that one fails alone (I9)."""
        try:
            answers = self._frontend.run_together([read for read, _, _ in items], Cancel())
        except Exception:
            return False
        for (_, _, future), answer in zip(items, answers, strict=True):
            future.set_result(answer)
        return True
