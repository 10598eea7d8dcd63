"""A property computed on first use, once, under its object's own lock.

`functools.cached_property` of Python 3.11 holds one lock for all instances of a class while it
computes: opening one part would wait for another's graph. Later versions hold none and may compute
twice. Here the lock is the instance's `_lock` (an RLock, so properties may use one another).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

_T = TypeVar("_T")
_MISSING = object()


class lazy(Generic[_T]):  # noqa: N801 - reads like the built-in `property`
    """Decorator; later reads come straight from the instance's dictionary."""

    def __init__(self, compute: Callable[[Any], _T]) -> None:
        self._compute, self.__doc__ = compute, compute.__doc__
        self._name = compute.__name__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> lazy[_T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> _T: ...

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        with instance._lock:
            value = instance.__dict__.get(self._name, _MISSING)
            if value is _MISSING:
                value = instance.__dict__[self._name] = self._compute(instance)
            return value
