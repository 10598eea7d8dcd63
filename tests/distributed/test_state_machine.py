"""The suites of one engine, unchanged, on a cluster: the state machine and the same answer (I5).

OCHREDB_CLUSTER_STEPS (default 300) is the number of steps; OCHREDB_STATE_SEED repeats a failure.
Planners of all processes take graphs wherever there is one.
"""

from __future__ import annotations

import os
import secrets

import pytest

from tests.property.drivers import make_small
from tests.property.machine import RECALL_MIN, Run, run_steps

from .cluster import Cluster, Shape
from .drivers import ClusterDriver

SHAPE = Shape(mode="graphs")
_STEPS = int(os.environ.get("OCHREDB_CLUSTER_STEPS", "300"))


@pytest.mark.timeout(300 + 12 * _STEPS)
def test_every_answer_equals_the_models(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    probe_path = str(cluster.probe_path)
    probe = make_small(monkeypatch, graphs=True, steps=False, probe_path=probe_path)
    run = Run(lambda _directory: ClusterDriver(cluster), probe)
    seed = int(os.environ.get("OCHREDB_STATE_SEED", "0")) or secrets.randbits(48)
    run_steps(run, _STEPS, seed, examples=2, until=lambda: run.recall.answers > 0)
    assert run.recall.answers > 0
    assert run.recall.share >= RECALL_MIN
