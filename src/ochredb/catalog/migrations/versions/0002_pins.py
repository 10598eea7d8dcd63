"""Format version 2: pins, which keep objects while somebody reads for long."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from ochredb.catalog.migrations.types import TEXT

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the table; a crash may have left it behind, so it may be there."""
    op.create_table(
        "pins",
        sa.Column("id", TEXT, primary_key=True),
        sa.Column("owner", TEXT, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("until_us", sa.BigInteger, nullable=False),
        if_not_exists=True,
    )
    op.execute("UPDATE store SET format_version = 2")


def downgrade() -> None:
    """A store is not taken back to an older format: its pins would be forgotten."""
    raise NotImplementedError("an older format does not know pins")
