"""SQLAlchemy Core, recorded until it is needed.

Importing SQLAlchemy takes a third of a server's start, and a running server needs of it only the
text of statements that never change. So `from ochredb.catalog.core import select, bindparam` gives
stand-ins: applying them records the expression, and `real` replays it with SQLAlchemy itself. The
texts of all statements are part of the package (`compiled.json`), by the digest of what was
recorded: a changed statement or table is simply not found there, and is compiled when it is used.
"""

from __future__ import annotations

import importlib
import operator
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from sqlalchemy import (
        BigInteger,
        BindParameter,
        Column,
        Index,
        Integer,
        LargeBinary,
        MetaData,
        Table,
        Text,
        UniqueConstraint,
        and_,
        bindparam,
        delete,
        exists,
        func,
        insert,
        literal,
        or_,
        select,
        update,
    )
    from sqlalchemy.dialects.postgresql import insert as upsert

    __all__ = [
        "BigInteger",
        "BindParameter",
        "Column",
        "Index",
        "Integer",
        "LargeBinary",
        "MetaData",
        "Table",
        "Text",
        "UniqueConstraint",
        "and_",
        "bindparam",
        "delete",
        "exists",
        "func",
        "insert",
        "literal",
        "or_",
        "select",
        "update",
        "upsert",
    ]
else:

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Recorded("name", name)


# Both dialects compile this one's ON CONFLICT; that of the other is for SQLite alone.
_ELSEWHERE = {"upsert": ("sqlalchemy.dialects.postgresql", "insert")}
_lock = threading.RLock()  # A table may be made once only.


def _forget() -> None:
    """In the child of a fork: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _operator(name: str) -> Any:
    def apply(self: Recorded, *others: object) -> Recorded:
        return Recorded("operator", name, self, *others)

    return apply


class Recorded:
    """One step of an expression: a name, an attribute, a call or an operator."""

    __slots__ = ("_digest", "_real", "_step")
    is_clause_element = False  # SQLAlchemy asks, and then calls __clause_element__.

    def __init__(self, *step: Any) -> None:
        self._step = step
        self._digest: str | None = None
        self._real: Any = None

    def __getattr__(self, name: str) -> Recorded:
        if name.startswith("_"):
            raise AttributeError(name)
        return Recorded("attribute", self, name)

    def __call__(self, *arguments: Any, **named: Any) -> Recorded:
        return Recorded("call", self, arguments, named)

    def __clause_element__(self) -> Any:
        """What SQLAlchemy takes it for, where recorded and real expressions meet."""
        return real(self)

    __hash__ = object.__hash__
    __eq__ = _operator("eq")
    __ne__ = _operator("ne")
    __lt__ = _operator("lt")
    __le__ = _operator("le")
    __gt__ = _operator("gt")
    __ge__ = _operator("ge")
    __and__ = _operator("and_")
    __or__ = _operator("or_")
    __invert__ = _operator("invert")
    __add__ = _operator("add")
    __sub__ = _operator("sub")
    __mul__ = _operator("mul")

    def __bool__(self) -> bool:
        raise TypeError("a recorded expression has no truth value")


def digest(value: Any) -> str:
    """A text that is equal for equal expressions, literals included."""
    if isinstance(value, Recorded):
        if value._digest is None:
            parts = ",".join(map(digest, value._step))
            value._digest = xxhash.xxh3_64_hexdigest(parts.encode())
        return value._digest
    if isinstance(value, tuple | list):
        return f"({','.join(map(digest, value))})"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{digest(item)}' for name, item in value.items())}}}"
    return repr(value)


def real(value: Any) -> Any:
    """The SQLAlchemy object that a recorded expression stands for; made once."""
    if isinstance(value, tuple | list):
        return type(value)(map(real, value))
    if isinstance(value, dict):
        return {name: real(item) for name, item in value.items()}
    if not isinstance(value, Recorded):
        return value
    with _lock:
        if value._real is None:
            value._real = _replay(*value._step)
        return value._real


def _replay(kind: str, *step: Any) -> Any:
    if kind == "name":
        module, name = _ELSEWHERE.get(step[0], ("sqlalchemy", step[0]))
        return getattr(importlib.import_module(module), name)
    if kind == "attribute":
        return getattr(real(step[0]), step[1])
    if kind == "call":
        target, arguments, named = step
        return real(target)(*real(arguments), **real(named))
    apply: Callable[..., Any] = getattr(operator, step[0])
    return apply(*map(real, step[1:]))
