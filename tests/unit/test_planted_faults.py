"""Planted faults change texts of the product's source: who edits such a text learns it here."""

from __future__ import annotations

import pytest

from tests.simulation.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_can_be_planted(mutant: Mutant) -> None:
    with mutant.plant():
        pass
