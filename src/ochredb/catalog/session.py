"""Statements on one connection of SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from ochredb.catalog.statement import Statement

Row = tuple[Any, ...]
DIALECT = "sqlite"


class SqliteSession:
    """A Session on one sqlite3 connection. mark: of a write, put down once it is committed."""

    __slots__ = ("connection", "mark")

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.mark: bytes | None = None

    def all(self, statement: Statement, **params: Any) -> list[Row]:
        text, literals = statement.compiled(DIALECT)
        return self.connection.execute(text, literals | params if literals else params).fetchall()

    def one(self, statement: Statement, **params: Any) -> Row | None:
        text, literals = statement.compiled(DIALECT)
        row: Row | None = self.connection.execute(
            text, literals | params if literals else params
        ).fetchone()
        return row

    def run(self, statement: Statement, **params: Any) -> int:
        text, literals = statement.compiled(DIALECT)
        return self.connection.execute(text, literals | params if literals else params).rowcount

    def each(self, statement: Statement, params: Sequence[dict[str, Any]]) -> list[list[Row]]:
        return [self.all(statement, **some) for some in params]

    def later(self, statement: Statement, **params: Any) -> None:
        self.run(statement, **params)

    def run_many(self, statement: Statement, params: Sequence[dict[str, Any]]) -> None:
        text, literals = statement.compiled(DIALECT)
        self.connection.executemany(text, [literals | p for p in params] if literals else params)
