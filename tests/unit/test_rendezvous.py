"""Who owns a collection: minimal movement, fair shares, the same everywhere."""

from __future__ import annotations

from collections import Counter

import pytest

from ochredb.cluster.rendezvous import order

KEYS = [f"0190a0b0-0000-7000-8000-{number:012x}" for number in range(20_000)]


def _names(count: int) -> list[str]:
    return [f"query-{number}" for number in range(count)]


def test_the_order_does_not_depend_on_that_of_the_names() -> None:
    names = _names(7)
    assert order("k", names) == order("k", reversed(names))
    assert sorted(order("k", names)) == names
    assert order("k", []) == []


def test_it_is_the_same_in_every_release() -> None:
    """Nodes of two releases that route differently would keep twice as much warm."""
    assert order("collection", _names(4)) == ["query-2", "query-0", "query-1", "query-3"]


@pytest.mark.parametrize("nodes", [2, 3, 10, 100])
@pytest.mark.parametrize("place", [0, 1])
def test_shares_are_fair(nodes: int, place: int) -> None:
    """At each place of the order: within five standard deviations of the mean."""
    counts = Counter(order(key, _names(nodes))[place] for key in KEYS[: 2_000 * min(nodes, 10)])
    total = sum(counts.values())
    mean = total / nodes
    deviation = (total * (1 / nodes) * (1 - 1 / nodes)) ** 0.5
    assert len(counts) == nodes
    assert all(abs(count - mean) < 5 * deviation for count in counts.values())


def test_a_node_that_goes_moves_only_its_own_keys() -> None:
    names = _names(10)
    for key in KEYS[:2_000]:
        before = order(key, names)
        for gone in names:
            assert order(key, [n for n in names if n != gone]) == [n for n in before if n != gone]


def test_a_node_that_comes_takes_its_share_from_all() -> None:
    before, after = _names(10), _names(11)
    moved = Counter(
        order(key, before)[0] for key in KEYS if order(key, before)[0] != order(key, after)[0]
    )
    assert set(moved) == set(before), "from everybody"
    assert abs(sum(moved.values()) / len(KEYS) - 1 / 11) < 0.01
