"""What a simulated database must know of a statement: which rows it locks and which it changes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from sqlalchemy import CompoundSelect, Delete, Insert, Select, Table, UniqueConstraint, Update

from ochredb.catalog.core import real
from ochredb.catalog.statement import Compiled, Statement, compiled

Kind = Literal["read", "lock", "insert", "update", "delete"]
Key = tuple[Any, ...]
"""(table, number of the unique key, its values): what a row lock is held on."""


@dataclass(frozen=True, slots=True)
class TableInfo:
    """uniques: the columns of each unique key, by position; the first is the primary key."""

    name: str
    columns: tuple[str, ...]
    uniques: tuple[tuple[int, ...], ...]

    def keys_of(self, row: Key) -> list[Key]:
        return [
            (self.name, number, *(row[place] for place in places))
            for number, places in enumerate(self.uniques)
        ]

    def keys_given(self, params: Mapping[str, Any]) -> list[Key]:
        """The keys of a row that is to be inserted, as far as its values are known beforehand."""
        named = [[self.columns[place] for place in places] for places in self.uniques]
        return [
            (self.name, number, *(params[name] for name in names))
            for number, names in enumerate(named)
            if all(name in params for name in names)
        ]

    def insert(self) -> str:
        names = ", ".join(f'"{name}"' for name in self.columns)
        return f"INSERT INTO {self.name} ({names}) VALUES ({', '.join('?' for _ in self.columns)})"

    def delete(self) -> str:
        names = [self.columns[place] for place in self.uniques[0]]
        return f"DELETE FROM {self.name} WHERE " + " AND ".join(f'"{name}" = ?' for name in names)

    def select(self) -> str:
        names = [self.columns[place] for place in self.uniques[0]]
        found = " AND ".join(f'"{name}" = ?' for name in names)
        return f"SELECT * FROM {self.name} WHERE {found}"


@dataclass(frozen=True, slots=True)
class StatementPlan:
    """text: as it is run to read. changed: the same with RETURNING, of a write.

    locked: for each table that a SELECT ... FOR UPDATE locks, the table and the query for its keys.
    """

    kind: Kind
    text: Compiled
    table: TableInfo | None = None
    changed: Compiled = ("", {})
    locked: tuple[tuple[TableInfo, Compiled], ...] = ()
    skips_locked: bool = False


@cache
def plan_of(statement: Statement) -> StatementPlan:
    """Made once for each statement. Cost: a millisecond."""
    element = real(statement.element)
    text = compiled(element, "sqlite")
    if isinstance(element, Insert | Update | Delete):
        assert isinstance(element.table, Table)
        kinds: dict[type, Kind] = {Insert: "insert", Update: "update", Delete: "delete"}
        kind = next(name for base, name in kinds.items() if isinstance(element, base))
        returning = element.returning(*element.table.c)
        return StatementPlan(kind, text, _info(element.table), compiled(returning, "sqlite"))
    if isinstance(element, CompoundSelect):
        return StatementPlan("read", text)
    assert isinstance(element, Select)
    lock = element._for_update_arg
    if lock is None:
        return StatementPlan("read", text)
    locked = []
    for table in lock.of or element.get_final_froms():
        if not isinstance(table, Table):
            continue
        keys = element.with_only_columns(*table.primary_key.columns)
        if lock.skip_locked:  # Which ones they are is not known before it is known who is locked.
            keys = keys.limit(None)
        locked.append((_info(table), compiled(keys, "sqlite")))
    return StatementPlan("lock", text, locked=tuple(locked), skips_locked=bool(lock.skip_locked))


@cache
def _info(table: Table) -> TableInfo:
    columns = tuple(column.name for column in table.columns)
    uniques = [[column.name for column in table.primary_key.columns]]
    unique_constraints = [item for item in table.constraints if isinstance(item, UniqueConstraint)]
    named = itertools.chain(
        uniques, ([column.name for column in item.columns] for item in unique_constraints)
    )
    places = tuple(tuple(columns.index(name) for name in names) for names in named)
    return TableInfo(str(table.name), columns, places)
