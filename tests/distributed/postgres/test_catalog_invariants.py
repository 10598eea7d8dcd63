"""tests/unit/test_catalog_invariants.py, on PostgreSQL."""

import pytest

from tests.unit.test_catalog_invariants import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("nodes_on_postgres")
