"""tests/unit/test_namespace.py, on PostgreSQL."""

import pytest

from tests.unit.test_namespace import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("nodes_on_postgres")
