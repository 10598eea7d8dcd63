"""The server under kill -9, and under power loss, during concurrent writes: I1 and I3.

OCHREDB_CRASH_ROUNDS (default 100) is the number of kill rounds, two in five of them on the command
as it is and the others with eager housekeeping; of power-loss rounds there are half as many.
OCHREDB_CRASH_SEED (default 1) draws the moments and the requests, as far as the operating system's
scheduling lets it.
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
ARGUMENTS = ["run", "--path", "{directory}", "--port", "{port}"]
COMMAND = [
    sys.executable, "-c", "from ochredb_node.cli import main; raise SystemExit(main())", *ARGUMENTS
]  # fmt: skip
EAGER = [sys.executable, str(Path(__file__).with_name("eager_server.py")), *ARGUMENTS]

pytestmark = pytest.mark.timeout(120 + 8 * ROUNDS)


def share(of_five: int) -> int:
    return max(1, ROUNDS * of_five // 5)


def judge(report: Report) -> None:
    print(report.summary())  # Seen with pytest -s.
    assert report.problems == [], "\n".join(["", report.summary(), *report.problems[:20]])
    # A campaign that tests nothing must not pass.
    assert report.acknowledged >= report.rounds
    assert report.unanswered >= report.rounds
    assert report.records_compared >= 5 * report.rounds


def test_kill(tmp_path: Path) -> None:
    directory = str(tmp_path / "data")
    judge(Campaign(Plan(command=COMMAND, directory=directory, rounds=share(2), seed=SEED)).run())


def test_kill_with_eager_housekeeping(tmp_path: Path) -> None:
    directory = str(tmp_path / "data")
    judge(Campaign(Plan(command=EAGER, directory=directory, rounds=share(3), seed=SEED + 1)).run())


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="NOT TESTED: the recorder is written for Linux"
)
@pytest.mark.parametrize(("command", "of_ten"), [(COMMAND, 2), (EAGER, 3)])
def test_power_loss(tmp_path: Path, command: list[str], of_ten: int) -> None:
    # The recorder needs a tree to look at; that the server makes one is tested by the kill rounds.
    directory = tmp_path / "data"
    directory.mkdir()
    loss = PowerLoss(build_library(tmp_path), str(directory), str(tmp_path / "powerloss.log"))
    rounds = max(1, ROUNDS * of_ten // 10)
    plan = Plan(
        command=command, directory=str(directory), rounds=rounds, seed=SEED + of_ten, loss=loss
    )
    judge(Campaign(plan).run())
