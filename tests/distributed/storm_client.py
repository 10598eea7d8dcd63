"""A client of the storm, which is never killed: what it speaks to is.

A write without a clear answer is sent again with its key until there is one, mostly; a read is
tried once more. Each leaves a line saying by which attempt it was settled.
"""

from __future__ import annotations

import os
import random
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.crash.actor import Actor, Connection, Gone, Recorder

THREADS = 2
RETRY_AFTER_S = 0.25
_REPEAT_PROBABILITY = 0.9  # Else its fate stays open, which the checker must bear too.
_WRITE_PROBABILITY = 0.4
_ATTEMPTS_MAX = 40
_BETWEEN_S = 0.01  # Leaves the machine to the servers.


def client(order: dict[str, Any]) -> None:
    """order: client (its name), collections, history, addresses, timeout_s, stop, seed, churns
    (whether one of its threads creates and drops)."""
    recorder = Recorder(order["history"])
    recorder.line(started=time.monotonic_ns())

    def guarded(number: int) -> None:
        try:
            _Client(order, recorder, number).run()
        except BaseException:
            recorder.line(failed=traceback.format_exc())

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class _Client:
    """One thread of it."""

    def __init__(self, order: dict[str, Any], recorder: Recorder, number: int) -> None:
        self._name = f"{order['client']}.{number}"
        self._stop: str = order["stop"]
        self._recorder = recorder
        self._rng = random.Random(f"{order['seed']}/{self._name}")
        self._connection = Connection(order["addresses"], self._rng, timeout_s=order["timeout_s"])
        names = tuple(order["collections"])
        self._actor = Actor(recorder, self._rng, self._name, self._connection.call, names)
        self._churned = f"churn-{order['client']}" if order["churns"] and number == 0 else None

    def run(self) -> None:
        while not self._actor.has_opened() and not self._stopped():
            if not self._attempt(self._actor.open_collections):
                time.sleep(RETRY_AFTER_S)
        while not self._stopped():
            if self._churned is not None and self._rng.random() < 0.1:
                self._attempt(self._churn)
            elif self._rng.random() < _WRITE_PROBABILITY:
                self._write()
            else:
                self._read()
            time.sleep(self._rng.uniform(0, 2 * _BETWEEN_S))

    def _stopped(self) -> bool:
        return os.path.exists(self._stop)

    def _attempt(self, call: Callable[[], object]) -> bool:
        """Whether there was an answer that settles it."""
        try:
            call()
        except Gone as gone:
            self._recorder.line(gone=str(gone), at=time.monotonic_ns())
            return False
        status = self._connection.last_status
        return status is not None and status < 500 and status != 429

    def _write(self) -> None:
        self._repeat(
            "write",
            self._actor.write,
            lambda: self._actor.send(*self._sent),
            attempts_max=_ATTEMPTS_MAX if self._rng.random() < _REPEAT_PROBABILITY else 2,
        )

    def _read(self) -> None:
        read = self._actor.pick_read()
        ask = partial(self._actor.ask, *read)
        self._repeat("read", ask, ask, attempts_max=2)

    def _repeat(
        self,
        request: str,
        first: Callable[[], object],
        again: Callable[[], object],
        attempts_max: int,
    ) -> None:
        """Until it is settled; notes by which attempt."""
        begun = time.monotonic_ns()
        settled = int(self._attempt(first))
        if request == "write":
            assert self._connection.last_write is not None
            self._sent = self._connection.last_write
        for attempt in range(2, attempts_max + 1):
            if settled:
                break
            time.sleep(RETRY_AFTER_S)
            settled = attempt if self._attempt(again) else 0
        took = time.monotonic_ns() - begun
        self._recorder.line(request=request, settled=settled, begun=begun, took=took)

    def _churn(self) -> None:
        name = self._churned
        assert name is not None
        self._actor.open_collections(name)
        if self._actor.has_opened(name):
            self._actor.churn(name)
