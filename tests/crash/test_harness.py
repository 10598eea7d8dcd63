"""The harness itself: an honest server has no problems, and each planted bug is found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .harness import Campaign, Plan, Report
from .powerloss import PowerLoss, build_library

pytestmark = [
    pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="NOT TESTED: the recorder is written for Linux"
    ),
    pytest.mark.timeout(300),
]

STANDIN = str(Path(__file__).with_name("standin.py"))


def run(tmp_path: Path, bug: str, rounds: int, *, power_loss: bool) -> Report:
    directory = tmp_path / "data"
    directory.mkdir()
    loss = None
    if power_loss:
        loss = PowerLoss(build_library(tmp_path), str(directory), str(tmp_path / "powerloss.log"))
    plan = Plan(
        command=[sys.executable, STANDIN, "{directory}", "{port}", *([bug] if bug else [])],
        directory=str(directory),
        rounds=rounds,
        seed=7,
        write_s_max=0.3,
        big_probability=0.2,
        full_every=3,
        loss=loss,
        stop_exit_code=-15,  # The stand-in does not handle SIGTERM.
    )
    report = Campaign(plan).run()
    print(report.summary(), *report.problems[:5], sep="\n")
    return report


@pytest.mark.parametrize("power_loss", [False, True])
def test_an_honest_server_passes(tmp_path: Path, power_loss: bool) -> None:
    report = run(tmp_path, "", 6, power_loss=power_loss)
    assert report.problems == []
    assert report.rounds == 6
    assert report.acknowledged > 20
    assert report.unanswered > 0
    assert report.records_compared > 50


@pytest.mark.parametrize(
    ("bug", "power_loss", "words"),
    [
        ("acknowledge-first", False, "lost"),
        ("half-requests", False, "half a request"),
        ("forget-deletes", False, "lost"),
        ("duplicate", False, "half a request"),
        ("no-wal-sync", True, "lost"),
        ("no-object-sync", True, "exited with"),
    ],
)
def test_a_planted_bug_is_found(tmp_path: Path, bug: str, power_loss: bool, words: str) -> None:
    report = run(tmp_path, bug, 12, power_loss=power_loss)
    assert any(words in problem for problem in report.problems), report.problems


@pytest.mark.parametrize("bug", ["no-wal-sync", "no-object-sync"])
def test_kill_alone_does_not_find_a_missing_sync(tmp_path: Path, bug: str) -> None:
    """Why there is a power-loss recorder at all."""
    assert run(tmp_path, bug, 4, power_loss=False).problems == []
