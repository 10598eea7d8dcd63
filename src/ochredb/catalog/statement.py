"""A SQLAlchemy Core statement that is compiled once for each dialect and run by the driver itself.

Why: building and executing a Core select costs 60 to 120 microseconds a call; the compiled text on
a raw sqlite3 connection costs 5. The statement stays portable, the hot path stays short. The texts
come with the package, so that a server that starts does not import SQLAlchemy (`core.py`); after a
change to a statement or a table, `python -m ochredb.catalog.statement` writes them again.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from ochredb.catalog.core import digest, real

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect
    from sqlalchemy.sql.expression import ClauseElement

Compiled = tuple[str, dict[str, Any]]
"""SQL text, and the values of its literal parameters."""

TEXTS_PATH = Path(__file__).parent / "compiled.json"
# Those whose texts come with the package, and how their drivers spell parameters.
_DIALECTS = {
    "sqlite": ("sqlalchemy.dialects.sqlite", "named"),
    "postgresql": ("sqlalchemy.dialects.postgresql.psycopg", "pyformat"),
}
_statements: list[Statement] = []


class Statement:
    """`Statement(select(...))`: parameters are the names of its bind parameters."""

    __slots__ = ("_texts", "element")

    def __init__(self, element: ClauseElement) -> None:
        self.element = element
        self._texts: dict[str, Compiled] = {}
        _statements.append(self)

    def compiled(self, dialect: str) -> Compiled:
        """Text and literals for a dialect, by its name."""
        known = self._texts.get(dialect)
        if known is None:
            shipped = _shipped().get(dialect, {}).get(digest(self.element))
            known = self.compile(dialect) if shipped is None else (shipped[0], shipped[1])
            self._texts[dialect] = known
        return known

    def compile(self, dialect: str) -> Compiled:
        """The same by SQLAlchemy."""
        return compiled(real(self.element), dialect)


def compiled(element: ClauseElement, dialect: str) -> Compiled:
    """Text and literals of SQLAlchemy's own expression."""
    from sqlalchemy.sql.compiler import SQLCompiler

    result = element.compile(dialect=sqlalchemy_dialect(dialect))
    assert isinstance(result, SQLCompiler)
    names = result.bind_names  # Anonymous ones too, as they are spelled in the text.
    literals = {f"{name}": bind.value for bind, name in names.items() if not bind.required}
    return str(result), literals


@cache
def _shipped() -> dict[str, dict[str, Compiled]]:
    texts: dict[str, dict[str, Compiled]] = orjson.loads(TEXTS_PATH.read_bytes())
    return texts


@cache
def sqlalchemy_dialect(name: str) -> Dialect:
    """SQLAlchemy's own object for a dialect; parameters are named."""
    module, paramstyle = _DIALECTS[name]
    dialect: Dialect = importlib.import_module(module).dialect(paramstyle=paramstyle)
    return dialect


def all_texts() -> bytes:
    """The content of `compiled.json`: each statement of the catalog, compiled by SQLAlchemy."""
    package = importlib.import_module("ochredb.catalog")
    for module in pkgutil.iter_modules(package.__path__, "ochredb.catalog."):
        if not module.ispkg:
            importlib.import_module(module.name)
    texts = {
        dialect: {
            digest(statement.element): statement.compile(dialect) for statement in _statements
        }
        for dialect in _DIALECTS
    }
    option = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(texts, option=option)


if __name__ == "__main__":
    # Run as a program this is another module than the one that the statements registered with.
    from ochredb.catalog import statement

    TEXTS_PATH.write_bytes(statement.all_texts())
