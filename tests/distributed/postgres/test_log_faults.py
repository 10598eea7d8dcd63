"""tests/unit/test_log_faults.py, on PostgreSQL."""

import pytest

from tests.unit.test_log_faults import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("nodes_on_postgres")
