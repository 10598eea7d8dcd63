"""Types of columns that differ between databases."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

Kind = sa.types.TypeEngine[Any] | type[sa.types.TypeEngine[Any]]

# In order of bytes, as SQLite's: `>` on ids and keys must not depend on a server's language.
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
