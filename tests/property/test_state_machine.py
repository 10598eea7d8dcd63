"""Every answer of the engine equals the model's, whatever is folded, merged, collected, restarted.

    OCHREDB_STATE_STEPS   steps of all runs together (default 2,400)
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
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from .drivers import Driver, EmbeddedDriver, HttpDriver, make_small
from .machine import Run, machine_class

_STEPS = int(os.environ.get("OCHREDB_STATE_STEPS", "2400"))
_STEPS_PER_EXAMPLE = 40
_DRIVERS: dict[str, Callable[[str], Driver]] = {
    "embedded": EmbeddedDriver,
    "memory": lambda _directory: EmbeddedDriver(None),
    "http": HttpDriver,
}
_RUNS = len(_DRIVERS) * 2 * 2
_RECALL_MIN = 0.9
_SHRINK = os.environ.get("OCHREDB_STATE_SHRINK", "") == "1"
_PHASES = (Phase.generate, Phase.shrink) if _SHRINK else (Phase.generate,)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fresh", [False, True], ids=["fixed", "fresh"])
@pytest.mark.parametrize("graphs", [False, True], ids=["scans", "graphs"])
@pytest.mark.parametrize("driver", _DRIVERS)
def test_every_answer_equals_the_models(
    driver: str, graphs: bool, fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(_DRIVERS[driver], make_small(monkeypatch, graphs=graphs))
    chosen = int(os.environ.get("OCHREDB_STATE_SEED", "0")) or secrets.randbits(48)
    examples = max(1, -(-_STEPS // (_RUNS * _STEPS_PER_EXAMPLE)))
    bound = machine_class(run)

    def machine() -> object:
        return bound()

    if not fresh:
        chosen = zlib.crc32(f"{driver} {graphs}".encode())
    print(f"OCHREDB_STATE_SEED={chosen}")
    seed(chosen)(machine)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=_STEPS_PER_EXAMPLE + 1,  # The first only creates a collection.
            database=None,
            deadline=None,
            phases=_PHASES,
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.normal,
            print_blob=True,
        ),
    )
    print(f"{run.step_count} steps: {dict(sorted(run.steps.items()))}")
    print(f"by graph: {run.recall.answers} answers, recall {run.recall.share:.4f}")
    assert run.step_count >= examples * _STEPS_PER_EXAMPLE
    assert graphs == (run.recall.answers > 0)
    assert run.recall.share >= _RECALL_MIN
