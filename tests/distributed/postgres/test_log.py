"""tests/unit/test_log.py, on PostgreSQL."""

import pytest

from tests.unit.test_log import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("nodes_on_postgres")
