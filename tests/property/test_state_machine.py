"""Every answer of the engine equals the model's, whatever is folded, merged, collected, restarted.

    OCHREDB_STATE_STEPS   steps of all runs together (default 4,800)
    OCHREDB_STATE_SEED    seed of the runs with a fresh seed, to repeat a failure
    OCHREDB_STATE_SHRINK  1: look for a smaller failing example, which may take minutes

Half of the steps are the same each time, half have a fresh seed, which is printed. (I4, I5, I10)
"""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Callable

import pytest

from .drivers import Driver, EmbeddedDriver, HttpDriver, make_small
from .machine import RECALL_MIN, Run, run_steps

_STEPS = int(os.environ.get("OCHREDB_STATE_STEPS", "4800"))
_DRIVERS: dict[str, Callable[[str], Driver]] = {
    "embedded": EmbeddedDriver,
    "memory": lambda _directory: EmbeddedDriver(None),
    "http": HttpDriver,
}
_RUNS = len(_DRIVERS) * 2 * 2


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fresh", [False, True], ids=["fixed", "fresh"])
@pytest.mark.parametrize("graphs", [False, True], ids=["scans", "graphs"])
@pytest.mark.parametrize("driver", _DRIVERS)
def test_every_answer_equals_the_models(
    driver: str, graphs: bool, fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(_DRIVERS[driver], make_small(monkeypatch, graphs=graphs, steps=fresh != graphs))
    number = int(os.environ.get("OCHREDB_STATE_SEED", "0")) or secrets.randbits(48)
    if not fresh:
        number = zlib.crc32(f"{driver} {graphs}".encode())
    run_steps(run, _STEPS / _RUNS, number, until=lambda: not graphs or run.recall.answers > 0)
    assert graphs == (run.recall.answers > 0)
    assert run.recall.share >= RECALL_MIN
