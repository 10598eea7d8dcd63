"""Format version 3: what cannot be folded is kept with its bytes, by ranges of offsets."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from ochredb.catalog.migrations.types import TEXT

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Replace the table, which no release before ever wrote to."""
    op.drop_table("quarantine", if_exists=True)
    op.create_table(
        "quarantine",
        sa.Column("collection", TEXT, primary_key=True),
        sa.Column("start", sa.BigInteger, primary_key=True),
        sa.Column("stop", sa.BigInteger, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("payload", sa.LargeBinary),
        sa.Column("object_key", TEXT),
        sa.Column("checksum", sa.BigInteger, nullable=False),
        sa.Column("time_us", sa.BigInteger, nullable=False),
    )
    op.execute("UPDATE store SET format_version = 3")


def downgrade() -> None:
    """A store is not taken back to an older format: quarantined bytes would be forgotten."""
    raise NotImplementedError("an older format does not keep what is in quarantine")
