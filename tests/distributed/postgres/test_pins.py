"""tests/unit/test_pins.py, on PostgreSQL."""

import pytest

from tests.unit.test_pins import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("nodes_on_postgres")
