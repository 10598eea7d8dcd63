"""How a catalog in PostgreSQL is used. Imports nothing of PostgreSQL's."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ochredb.errors import InvalidArgument

_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresConfig:
    """schema: of the tables; a deployment each. connections_max: for reads and for writes, each.

    wait_timeout_s: for a connection, while the server is away or all are taken.
    statement_timeout_s: of each statement but COMMIT. lock_timeout_s: of one wait for a row.
    idle_in_transaction_timeout_s: after which the server lets go of the locks of a host that is
        gone; longer than a delete by filter may read while it holds one.
    commit_timeout_s: after which nobody waits for the answer to a commit; its outcome is unknown.
    allow_fsync_off: for tests, which may do without durability.
    """

    schema: str = "public"
    connections_max: int = 16
    connect_timeout_s: float = 5.0
    wait_timeout_s: float = 5.0
    statement_timeout_s: float = 30.0
    lock_timeout_s: float = 10.0
    commit_timeout_s: float = 60.0
    idle_in_transaction_timeout_s: float = 10.0
    attempts_max: int = 6
    application_name: str = "ochredb"
    allow_fsync_off: bool = False

    def __post_init__(self) -> None:
        if not _SCHEMA.fullmatch(self.schema) or self.schema.startswith("pg_"):
            raise InvalidArgument(
                f"schema {self.schema!r}: lower-case letters, digits and _, and not pg_"
            )
        if self.connections_max < 1:
            raise InvalidArgument(f"connections_max must be at least 1: {self.connections_max}")
