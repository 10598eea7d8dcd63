"""The server under kill -9, and under power loss, during concurrent writes: I1 and I3.

OCHREDB_CRASH_ROUNDS (default 100) is the number of kill rounds; of power-loss rounds there are half
as many. OCHREDB_CRASH_SEED (default 1) draws the moments and the requests, as far as the operating
system's scheduling lets it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from .harness import Campaign, Plan, Report
from .powerloss import PowerLoss, build_library

ROUNDS = int(os.environ.get("OCHREDB_CRASH_ROUNDS", "100"))
SEED = int(os.environ.get("OCHREDB_CRASH_SEED", "1"))
SERVER = [
    sys.executable, "-c", "from ochredb_node.cli import main; raise SystemExit(main())",
    "run", "--path", "{directory}", "--port", "{port}",
]  # fmt: skip

pytestmark = pytest.mark.timeout(60 + 6 * ROUNDS)


def judge(report: Report) -> None:
    print(report.summary())  # Seen with pytest -s.
    assert report.problems == [], "\n".join(["", report.summary(), *report.problems[:20]])
    # A campaign that tests nothing must not pass.
    assert report.acknowledged >= report.rounds
    assert report.unanswered >= report.rounds
    assert report.records_compared >= 5 * report.rounds


def test_kill(tmp_path: Path) -> None:
    plan = Plan(command=SERVER, directory=str(tmp_path / "data"), rounds=ROUNDS, seed=SEED)
    judge(Campaign(plan).run())


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="NOT TESTED: the recorder is written for Linux"
)
def test_power_loss(tmp_path: Path) -> None:
    # The recorder needs a tree to look at; that the server made it is tested by the kill rounds.
    directory = tmp_path / "data"
    directory.mkdir()
    loss = PowerLoss(build_library(tmp_path), str(directory), str(tmp_path / "powerloss.log"))
    plan = Plan(
        command=SERVER, directory=str(directory), rounds=max(1, ROUNDS // 2), seed=SEED, loss=loss
    )
    judge(Campaign(plan).run())
