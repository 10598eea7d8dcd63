"""What many modules begin with: a node with a clock of its own, and no background work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ochredb_node.node import Node

from .kernel import ManualClock, running_node


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def node(clock: ManualClock) -> Iterator[Node]:
    with running_node(clock=clock) as node:
        yield node
