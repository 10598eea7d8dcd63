"""A storm over the cluster, judged by the history checker: I1 to I8 and I11.

OCHREDB_STORM_S (default 60) is how long the killing lasts, one process a second; OCHREDB_STORM_SEED
draws victims and requests, as far as the operating system's scheduling lets it.
"""

from __future__ import annotations

import os
import sys

import pytest

from .cluster import Cluster, Shape
from .members import Forks
from .storm import Plan, Storm

DURATION_S = float(os.environ.get("OCHREDB_STORM_S", "60"))
SEED = int(os.environ.get("OCHREDB_STORM_SEED", "1"))
# Of the long form, on a machine with nothing else to do. The short one is about what is lost.
AVAILABLE_MIN = 0.99 if DURATION_S >= 300 else 0.95
SHAPE = Shape(mode="eager", faults=True)


@pytest.mark.timeout(600 + 6 * DURATION_S)
def test_a_storm_over_the_cluster_loses_nothing(cluster: Cluster, launcher: Forks) -> None:
    report = Storm(cluster, launcher, Plan(duration_s=DURATION_S, seed=SEED)).run()
    judged = report.judged
    print(f"\n{report.summary()}", file=sys.stderr)  # Seen with pytest -s.
    text = "\n".join(["", report.summary(), *judged.problems[:10]])
    assert judged.problems == [], text
    assert judged.available("read") >= AVAILABLE_MIN, text
    # A storm that tests nothing must not pass.
    assert report.kills.total() >= 0.7 * DURATION_S, text
    assert len(report.kills) == 4, text
    assert len(report.events) == 4, text
    assert report.s3.total() > 0, text
    assert judged.writes >= 2 * DURATION_S, text
    assert judged.reads >= 4 * DURATION_S, text
    assert judged.unknown > 0, text
    assert judged.repeated > 0, text
