"""tests/unit/test_compaction.py, on PostgreSQL."""

import pytest

from tests.unit.test_compaction import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("nodes_on_postgres")

del test_a_merge_reads_large_bitmaps_outside_of_the_transaction  # noqa: F821  # Asks SQLite.
del TestLeases  # noqa: F821  # A clock set by hand polls for minutes, a transaction each.
