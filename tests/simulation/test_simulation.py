"""Whole clusters in simulated time: seeds, faults, and a checker of everything that they do.

OCHREDB_SIMULATION_SEEDS: how many fixed seeds. A seed that fails is run again by the command that
is printed with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from . import run
from .mutants import MUTANTS, POSTGRESQL, SEEDS_MAX, Mutant, seeds_needed
from .run import Outcome, simulate

ROOT = Path(__file__).resolve().parents[2]
SEEDS = int(os.environ.get("OCHREDB_SIMULATION_SEEDS", "300"))
FRESH_SEEDS = 20
GROUPS = 10

# Seeds that found something in OchreDB itself, and what; a fixed bug stays fixed.
KEPT: list[tuple[int, dict[str, Any], str]] = [
    (0, POSTGRESQL, "two created one name, and one of them failed by a SQL error"),
    (68, POSTGRESQL, "two let go of one object at once, and it stayed for ever"),
    (1754, {}, "an object of two collections was collected before the second one's commit"),
]


def check(outcome: Outcome) -> None:
    assert not outcome.violations, (
        f"seed {outcome.seed} of {outcome.weather}: {outcome.violations[0]}\nagain: {outcome.again}"
    )


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.timeout(0)
def test_seeds(group: int) -> None:
    for seed in range(group, SEEDS, GROUPS):
        check(simulate(seed))


@pytest.mark.timeout(0)
def test_routed_seeds() -> None:
    """Servers write through one another's logs, and repeat what was lost."""
    for seed in range(SEEDS // 5):
        check(simulate(seed, routed=True))


def test_fresh_seeds() -> None:
    """Of this run alone."""
    first = int.from_bytes(os.urandom(4), "little")
    for seed in range(first, first + FRESH_SEEDS):
        check(simulate(seed))


@pytest.mark.parametrize(("seed", "weather", "why"), KEPT)
def test_kept_seeds(seed: int, weather: dict[str, Any], why: str) -> None:
    assert why
    check(simulate(seed, **weather))


def test_a_seed_decides_everything() -> None:
    """Equal in another process, whose sets of strings have another order."""
    seeds = (1, 2, 3, 5, 8)
    program = (
        "from tests.simulation.run import simulate\n"
        f"print(*(simulate(seed).digest for seed in {seeds}))"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "17"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.split() == [simulate(seed).digest for seed in seeds]


@pytest.mark.parametrize(
    "given",
    [{}, {"routed": True}, {"dialect": "sqlite"}, POSTGRESQL | {"routed": True}]
    + [given for _, given, _ in KEPT],
    ids=str,
)
def test_the_command_of_a_failure_runs_the_same_simulation(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = simulate(7, **given)
    with pytest.raises(AssertionError) as failure:
        check(replace(outcome, violations=["planted"]))
    command = str(failure.value).partition("again: ")[2].splitlines()[0]
    module, *arguments = command.removeprefix("python -m ").split()
    assert module == run.__name__
    assert run.main(arguments) == 0
    assert f"digest='{outcome.digest}'" in capsys.readouterr().out


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
@pytest.mark.timeout(0)
def test_finds_planted_faults(mutant: Mutant) -> None:
    assert seeds_needed(mutant, SEEDS_MAX) is not None, f"{mutant.name}: not found"
