"""Trouble under load: what must hold meanwhile, and when full service must be back.

The history that the clients recorded must be possible (load.py); of a client without idempotency
keys each write is applied once if it was answered, and at most once if not (`Counting`); no process
may end by itself; and within `BACK_S` after the cause is gone every request is settled at once
again, without hands.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable

from tests.crash.actor import DATABASE, Connection, Gone

from .cluster import Cluster
from .load import Judged, Load
from .members import Forks
from .storage import Storage

BACK_S = 20.0 if "CI" not in os.environ else 60.0  # Machines of CI may be slow, and shared.
_BEFORE_S = 2.0
_SURE_S = 3.0  # How long everything must go smoothly.

Trouble = Callable[[], object]


def under_load(
    cluster: Cluster, launcher: Forks, name: str, trouble: Trouble, *, timeout_s: float = 60.0
) -> Judged:
    """`trouble` begins, lasts, and is over when it returns."""
    load = Load(cluster, launcher, seed=1, name=name, timeout_s=timeout_s).start()
    counting = Counting(cluster, f"{name}-counted", timeout_s=timeout_s)
    counting.start()
    time.sleep(_BEFORE_S)
    begun_s = time.monotonic()
    trouble()
    healed_s = time.monotonic()
    _await_smoothness(load, healed_s)
    load.stop()
    problem = counting.finish()
    storage = Storage(cluster)
    try:
        load.read_everything()
        judged = load.judge(storage)
    finally:
        storage.close()
    back_s = judged.back_after_s(healed_s)
    print(
        f"\n{name}: {healed_s - begun_s:.1f} s of trouble, full service {back_s:.1f} s later\n"
        f"{judged.summary()}\n{counting.summary()}",
        file=sys.stderr,
    )
    assert judged.problems == [], "\n".join([judged.summary(), *judged.problems[:10]])
    assert problem == ""
    assert cluster.ended() == []
    assert back_s <= BACK_S, judged.summary()
    # Trouble that nobody was in must not pass.
    assert judged.reads >= 15, judged.summary()
    assert judged.writes >= 5, judged.summary()
    return judged


class Counting(threading.Thread):
    """Writes without a key, never repeated by their client: the log counts how often they landed.

    What frontends repeat under a name of their own must be applied once.
    """

    def __init__(self, cluster: Cluster, name: str, *, timeout_s: float) -> None:
        super().__init__(name=name)
        addresses = [f"{member.host}:{member.port}" for member in cluster.of("frontend")]
        self._connection = Connection(addresses, random.Random(name), timeout_s=timeout_s)
        self._stopping = threading.Event()
        self._answered = self._open = 0  # Operations of writes with and without an answer.
        self._refused = 0
        self._failure: BaseException | None = None
        self._path = ""

    def run(self) -> None:
        try:
            body = {"name": self.name, "get_or_create": True}
            status, created = self._connection.call("POST", f"{DATABASE}/collections", body, None)
            assert status == 200, created
            self._path = f"{DATABASE}/collections/{created['id']}"
            while not self._stopping.is_set():
                self._write()
        except BaseException as failure:
            self._failure = failure
        finally:
            self._connection.close()

    def _write(self) -> None:
        body = {"ids": ["a", "b"], "embeddings": [[1.0], [2.0]]}
        try:
            status, answer = self._connection.call("POST", f"{self._path}/upsert", body, None)
        except Gone:
            status, answer = 503, None
        if status == 200:
            self._answered += 2
        elif status in (503, 504):
            self._open += 2
        else:
            assert status == 429, (status, answer)
            self._refused += 2
        time.sleep(0.02)

    def summary(self) -> str:
        return (
            f"without keys: {self._answered} operations answered, {self._open} not,"
            f" {self._refused} refused"
        )

    def finish(self) -> str:
        """What is wrong, if anything is."""
        self._stopping.set()
        self.join()
        if self._failure is not None:
            return f"the client without keys failed: {self._failure!r}"
        status, answer = self._connection.call("GET", f"{self._path}/indexing_status", None, None)
        self._connection.close()
        if status != 200:
            return f"the log cannot be asked: {status} {answer}"
        landed = answer["total_ops"]
        if not self._answered <= landed <= self._answered + self._open:
            return f"{landed} operations in the log; {self.summary()}"
        return "" if self._answered >= 10 else f"too little was tested; {self.summary()}"


def _await_smoothness(load: Load, healed_s: float) -> None:
    """Not longer than that takes; the judgement says whether it was enough."""
    smooth_s = 0.0
    while smooth_s < _SURE_S and time.monotonic() < healed_s + BACK_S + _SURE_S:
        time.sleep(0.25)
        rough = [request.end_s for request in load.requests() if not request.smooth]
        smooth_s = time.monotonic() - max(healed_s, *rough, 0.0)


def all_settled(judged: Judged, attempts: int) -> bool:
    """Whether that many attempts were enough for every request."""
    return all(1 <= request.settled <= attempts for request in judged.requests)
