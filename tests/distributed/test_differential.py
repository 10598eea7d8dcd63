"""I5: a cluster and an embedded engine answer the same to the same requests, and as the model does.

OCHREDB_DIFFERENTIAL_STEPS (default 300) is the number of random operations; OCHREDB_STATE_SEED
repeats a failure. Nothing is approximate here: the planner takes no graphs, so answers are equal to
the last bit. In between, tails are folded, parts merged, garbage collected, processes restarted.
"""

from __future__ import annotations

import os
import secrets

import pytest

from tests.property.drivers import GraphProbe, make_small
from tests.property.machine import Run, run_steps

from .cluster import Cluster, Shape
from .drivers import TwinDriver

SHAPE = Shape(mode="small")
_STEPS = int(os.environ.get("OCHREDB_DIFFERENTIAL_STEPS", "300"))


@pytest.mark.timeout(300 + 12 * _STEPS)
def test_a_cluster_answers_as_the_embedded_engine(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch, graphs=False, steps=False)  # In this process; SHAPE for the others.
    made: list[TwinDriver] = []

    def driver(directory: str) -> TwinDriver:
        made.append(TwinDriver(cluster, directory))
        return made[-1]

    run = Run(driver, GraphProbe(str(cluster.probe_path)))
    seed = int(os.environ.get("OCHREDB_STATE_SEED", "0")) or secrets.randbits(48)
    run_steps(run, _STEPS, seed, examples=2, until=lambda: run.steps["restart"] > 0)
    assert sum(driver.compared for driver in made) >= _STEPS
    assert run.recall.answers == 0, "a planner took a graph"
    assert run.steps["restart"] > 0
