"""Quick reads that arrived in one turn of the event loop, run as one batch.

Most of what a short search costs beside the search itself are calls that cost the same for eight
queries as for one; and a batch can use every processor, which the event loop's thread alone cannot.
A read that comes alone runs at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable

from ochredb.cancel import Cancel
from ochredb_frontend.service import Frontend, QuickAnswer

_READS_MAX = 16  # Of a batch: bounds how long the loop is held.


class Together:
    """Used by the event loop's thread only."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._coming = 0
        self._pending: list[tuple[QuickAnswer, Cancel, asyncio.Future[bytes]]] = []

    def announce(self) -> None:
        """The server has read the head of a request, which it will start in this turn."""
        self._coming += 1

    def started(self) -> None:
        """A request was started; it was announced, unless another server runs the application."""
        if self._coming:
            self._coming -= 1

    def run(self, read: QuickAnswer, cancel: Cancel) -> bytes | asyncio.Future[bytes]:
        """The answer, or what becomes the answer in the next turn of the loop at the latest."""
        if read.quick.group is None or not (self._coming or self._pending):
            return read.run(cancel)
        loop = asyncio.get_running_loop()
        if not self._pending:
            # What was announced in this turn and is not a quick read never comes here.
            loop.call_soon(self._flush)
        future: asyncio.Future[bytes] = loop.create_future()
        self._pending.append((read, cancel, future))
        if not self._coming or len(self._pending) == _READS_MAX:
            self._answer()
        return future

    def _flush(self) -> None:
        # Everything announced before was started by now, or never will be.
        self._coming = 0
        self._answer()

    def _answer(self) -> None:
        pending, self._pending = self._pending, []
        groups: dict[Hashable, list[tuple[QuickAnswer, Cancel, asyncio.Future[bytes]]]] = {}
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

    def _answer_together(
        self, items: list[tuple[QuickAnswer, Cancel, asyncio.Future[bytes]]]
    ) -> bool:
        """Whether it went well; if not, each is tried alone, so that one fails alone (I9)."""
        try:
            answers = self._frontend.run_together([read for read, _, _ in items], Cancel())
        except Exception:
            return False
        for (_, _, future), answer in zip(items, answers, strict=True):
            future.set_result(answer)
        return True
