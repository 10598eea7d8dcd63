"""Format version 1: the tables as first released."""

from __future__ import annotations

from alembic import op

from ochredb.catalog.schema import metadata

revision = "0001"
down_revision = None
# Tables that came later: `schema` has moved on, this step has not.
_LATER = {"pins"}


def upgrade() -> None:
    """Create the tables of then. Later steps must not import `schema`: they spell out changes."""
    tables = [table for table in metadata.sorted_tables if table.name not in _LATER]
    metadata.create_all(op.get_bind(), tables=tables)


def downgrade() -> None:
    """There is nothing before the first version."""
    raise NotImplementedError("the first format has no predecessor")
