"""Two or more workers share these tests out: what takes longest begins first."""

from __future__ import annotations

import pytest

_LONGEST = ("test_kill.py", "test_storm.py", "test_full_disk.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONGEST)
