"""tests/unit/test_quarantine.py, on PostgreSQL."""

import pytest

from tests.unit.test_quarantine import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("nodes_on_postgres")

# These begin with the path of a directory that has a catalog.
del test_the_command_lists_shows_and_drops  # noqa: F821
del test_a_backup_has_what_is_in_quarantine_and_checks_it  # noqa: F821
