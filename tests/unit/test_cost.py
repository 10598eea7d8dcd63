"""The cost model: close to what was measured, and harmless where the machine was measured badly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ochredb.clock import SystemClock
from ochredb.configuration import IndexSettings
from ochredb.plan import cost
from ochredb.plan.cost import Machine

from .kernel import ManualClock


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    before = cost.machine()
    cost.use(Machine())
    yield
    cost.use(before)


@pytest.mark.parametrize(
    ("labels", "dimension", "ef", "measured_us"),
    [
        (20_000, 128, 100, 115),
        (20_000, 128, 125, 160),
        (100_000, 128, 100, 280),
        (100_000, 128, 200, 550),
        (100_000, 128, 400, 1_100),
        (20_000, 768, 100, 580),
    ],
)
def test_a_graph_search_costs_about_what_was_measured(
    labels: int, dimension: int, ef: int, measured_us: float
) -> None:
    assert cost.graph_us(labels, dimension, ef) == pytest.approx(measured_us, rel=0.08)


@pytest.mark.parametrize(("neighbors", "times"), [(16, 1.0), (24, 1.36), (32, 1.78)])
def test_more_neighbours_cost_about_what_was_measured(neighbors: int, times: float) -> None:
    plain, denser = cost.graph_us(100_000, 128, 100), cost.graph_us(100_000, 128, 100, neighbors)
    assert denser - 5.0 == pytest.approx(times * (plain - 5.0), rel=0.04)


def _prefers(labels: int, ef: int, *, matching: int | None = None, filtered: bool = False) -> bool:
    return cost.prefers_graph(
        matching=labels if matching is None else matching,
        total=labels,
        labels=labels,
        neighbors=16,
        dimension=128,
        count=10,
        ef=ef,
        filtered=filtered,
    )


@pytest.mark.parametrize("machine", [Machine(), Machine(0.85, 1.27), Machine(4.0, 6.0)])
def test_the_choices_that_matter_are_the_same_on_every_machine(machine: Machine) -> None:
    cost.use(machine)
    assert _prefers(20_000, 125)
    assert _prefers(100_000, 440)
    assert not _prefers(2_000, 400)
    assert not _prefers(0, 100)
    # Filtered answers are exact while a scan of their rows is short on the reference machine.
    assert not _prefers(100_000, 125, matching=50_000, filtered=True)
    assert _prefers(1_000_000, 125, matching=500_000, filtered=True)
    assert not _prefers(1_000_000, 125, matching=40_000, filtered=True)


@pytest.mark.parametrize(
    ("ef_search", "is_asked", "max_neighbors", "neighbors", "enough", "least"),
    [
        (100, False, 16, 16, None, 115),
        (100, False, 16, 24, None, 82),
        (100, False, 16, 32, None, 71),
        (100, False, 16, 16, (50, 0.998), 63),  # Nearly all is found by less.
        (100, False, 16, 16, (50, 0.997), 100),
        (100, False, 16, 16, (100, 1.0), 100),
        (100, False, 16, 16, (150, 1.0), 115),
        (100, False, 16, 24, (50, 1.0), 63),
        (100, True, 16, 16, (50, 1.0), 100),  # Asked for.
        (100, True, 16, 16, None, 115),
        (100, True, 16, 24, None, 100),
        (101, True, 16, 32, None, 101),
        (200, True, 16, 24, (50, 1.0), 200),
        (200, True, 24, 24, None, 230),
        (10, True, 24, 16, None, 12),
    ],
)
def test_the_shortest_list_is_what_was_asked_for(
    ef_search: int,
    is_asked: bool,
    max_neighbors: int,
    neighbors: int,
    enough: tuple[int, float] | None,
    least: int,
) -> None:
    settings = IndexSettings(
        ef_search=ef_search, max_neighbors=max_neighbors, ef_search_is_asked=is_asked
    )
    assert cost.list_min(settings, neighbors, 10, enough) == least


def test_what_ten_results_are_measured_for_says_nothing_of_more() -> None:
    settings = IndexSettings()
    assert cost.list_min(settings, 16, 10, (50, 1.0)) == 63
    assert cost.list_min(settings, 16, 11, (50, 1.0)) == 100


def test_a_filter_asks_for_more_neighbours() -> None:
    assert cost.fetch_count(10, 1.0) == 26
    assert cost.fetch_count(10, 0.5) == 63


def test_measuring_sets_multiples_within_bounds() -> None:
    measured = cost.measure(SystemClock())
    assert cost.machine() == measured
    assert 0.25 <= measured.stream <= 8.0
    assert measured.stream / 1.51 <= measured.random <= measured.stream * 1.51
    assert cost.scan_us(20_000, 20_000, 128) == pytest.approx(25 + measured.stream * 683.2)
    assert 0.25 <= measured.codes <= 8.0
    coded_us = 25 + measured.stream * 60 + measured.codes * 122.88
    assert cost.scan_us(20_000, 20_000, 128, coded=True) == pytest.approx(coded_us)


def test_codes_are_scanned_where_that_is_cheaper_than_a_graph() -> None:
    def prefers(rows: int, dimension: int, ef: int, matching: int | None = None) -> bool:
        return cost.prefers_graph(
            matching=matching or rows,
            total=rows,
            labels=rows,
            neighbors=16,
            dimension=dimension,
            count=10,
            ef=ef,
            filtered=matching is not None,
            coded=True,
        )

    assert prefers(20_000, 128, 115) and prefers(20_000, 768, 63)
    assert prefers(1_000_000, 128, 400)
    assert not prefers(5_000, 128, 115)
    assert not prefers(20_000, 128, 400)
    assert not prefers(500_000, 128, 115, matching=250_000)
    gathered = cost.scan_us(9_000, 100_000, 128, coded=True)
    assert gathered == cost.scan_us(9_000, 100_000, 128)


def test_a_clock_that_stands_still_measures_nothing() -> None:
    assert cost.measure(ManualClock()) == Machine()
