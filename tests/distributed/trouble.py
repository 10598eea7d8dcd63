"""Trouble under load: what must hold meanwhile, and when full service must be back.

The history that the clients recorded must be possible (load.py), no process may end by itself, and
within `BACK_S` after the cause is gone every request is settled at once again, without hands.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from .cluster import Cluster
from .load import Judged, Load
from .members import Forks
from .storage import Storage

BACK_S = 10.0
_BEFORE_S = 2.0
_SURE_S = 3.0  # How long everything must go smoothly.

Trouble = Callable[[], object]


def under_load(
    cluster: Cluster, launcher: Forks, name: str, trouble: Trouble, *, timeout_s: float = 60.0
) -> Judged:
    """`trouble` begins, lasts, and is over when it returns."""
    load = Load(cluster, launcher, seed=1, name=name, timeout_s=timeout_s).start()
    time.sleep(_BEFORE_S)
    begun_s = time.monotonic()
    trouble()
    healed_s = time.monotonic()
    _await_smoothness(load, healed_s)
    load.stop()
    storage = Storage(cluster)
    try:
        load.read_everything()
        judged = load.judge(storage)
    finally:
        storage.close()
    back_s = judged.back_after_s(healed_s)
    print(
        f"\n{name}: {healed_s - begun_s:.1f} s of trouble, full service {back_s:.1f} s later\n"
        f"{judged.summary()}",
        file=sys.stderr,
    )
    assert judged.problems == [], "\n".join([judged.summary(), *judged.problems[:10]])
    assert cluster.ended() == []
    assert back_s <= BACK_S, judged.summary()
    assert judged.reads > 50, judged.summary()
    assert judged.writes > 20, judged.summary()
    return judged


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
