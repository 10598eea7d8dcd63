"""tests/unit/test_log_nothing.py, on PostgreSQL."""

import pytest

from tests.unit.test_log_nothing import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("nodes_on_postgres")
