"""Planted faults of the protocol: a function whose source is changed, for a while.

with mutated(compact, ("if version != snapshot.version:", "if False:")):
    ...  # A simulation that does not find this proves nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def mutated(
    function: Callable[..., Any], *changes: tuple[str, str], **names: Any
) -> Iterator[None]:
    """Replace texts in a function's source; each must occur exactly once. names: new globals of it.

    Whoever has imported the function has the changed one too: only its code is another.
    """
    plain: Any = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(plain))
    for old, new in changes:
        if source.count(old) != 1:
            raise ValueError(f"{plain.__qualname__} has {source.count(old)} times {old!r}")
        source = source.replace(old, new)
    lines = source.splitlines(keepends=True)
    while lines[0].startswith("@"):
        lines.pop(0)
    scope = dict(plain.__globals__) | names
    exec(compile("".join(lines), f"mutant of {plain.__qualname__}", "exec"), scope)  # noqa: S102
    changed = scope[plain.__name__]
    before, known = plain.__code__, {name: plain.__globals__.get(name) for name in names}
    plain.__code__ = changed.__code__
    plain.__globals__.update(names)
    try:
        yield
    finally:
        plain.__code__ = before
        for name, value in known.items():
            if value is None:
                del plain.__globals__[name]
            else:
                plain.__globals__[name] = value
