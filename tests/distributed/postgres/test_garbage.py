"""tests/unit/test_garbage.py, on PostgreSQL."""

import pytest

from tests.unit.test_garbage import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("nodes_on_postgres")
