"""Format version 1: the tables as first released."""

from __future__ import annotations

from alembic import op

from ochredb.catalog.schema import metadata

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table. Later steps must not import `schema`: it will have moved on by then."""
    metadata.create_all(op.get_bind())


def downgrade() -> None:
    """There is nothing before the first version."""
    raise NotImplementedError("the first format has no predecessor")
