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
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from .drivers import Driver, EmbeddedDriver, HttpDriver, make_small
from .machine import Machine, Run, machine_class

_STEPS = int(os.environ.get("OCHREDB_STATE_STEPS", "4800"))
_STEPS_PER_EXAMPLE, _EXAMPLES = 30, 6  # Of one seed.
_DRIVERS: dict[str, Callable[[str], Driver]] = {
    "embedded": EmbeddedDriver,
    "memory": lambda _directory: EmbeddedDriver(None),
    "http": HttpDriver,
}
_RUNS = len(_DRIVERS) * 2 * 2
_RECALL_MIN = 0.9
_SHRINK = os.environ.get("OCHREDB_STATE_SHRINK", "") == "1"
_PHASES = (Phase.generate, Phase.shrink) if _SHRINK else (Phase.generate,)


def _run(machine: type[Machine], number: int) -> None:
    seed(number)(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=_EXAMPLES,
            stateful_step_count=_STEPS_PER_EXAMPLE + 1,  # The first creates a collection.
            database=None,
            deadline=None,
            phases=_PHASES,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


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
    while run.step_count < _STEPS / _RUNS:  # Hypothesis cuts examples short now and then.
        print(f"OCHREDB_STATE_SEED={number}")
        _run(machine_class(run), number)
        number += 1
    print(f"{run.step_count} steps: {dict(sorted(run.steps.items()))}")
    print(f"by graph: {run.recall.answers} answers, recall {run.recall.share:.4f}")
    assert graphs == (run.recall.answers > 0)
    assert run.recall.share >= _RECALL_MIN
