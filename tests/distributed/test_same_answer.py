"""I5 on a cluster: the same reads give the same answers wherever the rows lie (tests/property)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.property import test_same_answer as suite
from tests.property.drivers import make_small

from .cluster import Cluster, Shape
from .drivers import ClusterDriver

SHAPE = Shape(mode="small")


@pytest.fixture
def driver(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterDriver]:
    make_small(monkeypatch, graphs=False, steps=False)
    opened = ClusterDriver(cluster)
    yield opened
    opened.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("space", "count", "dim"), [("l2", 400, 8), ("cosine", 150, 1), ("ip", 700, 64)]
)
def test_layouts_do_not_change_answers(
    driver: ClusterDriver, space: str, count: int, dim: int
) -> None:
    suite.test_layouts_do_not_change_answers(driver, space, count, dim)
