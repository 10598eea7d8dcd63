"""Hints: something has changed, look sooner.

    hints.subscribe(HintKind.APPENDED, compactor.hint)
    hints.publish(Hint(HintKind.APPENDED, collection_id, last_offset))

Nobody may rely on one: whoever acts on a hint asks the catalog, and looks from time to time without
any. So a hint may be late, lost, repeated or untrue.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

log = logging.getLogger("ochredb.hints")


class HintKind(enum.Enum):
    """What happened; the values are what is sent."""

    APPENDED = "appended"  # number: the last offset.
    VERSION = "version"  # number: the new version.
    DROPPED = "dropped"  # number: 0.


@dataclass(frozen=True, slots=True)
class Hint:
    """One change of one collection."""

    kind: HintKind
    collection_id: str
    number: int = 0


Listener = Callable[[str, int], None]
"""Told the collection and the number; in any thread, so it must be quick."""


class Hints(Protocol):
    """Carries hints between processes, or within one."""

    def start(self) -> None:
        """Begin to listen; after this nobody subscribes any more."""
        ...

    def subscribe(self, kind: HintKind, listener: Listener) -> None: ...

    def publish(self, hint: Hint) -> None:
        """Tell every subscriber, sooner or later, perhaps. Never waits, never raises."""
        ...

    def close(self) -> None: ...


class NoHints:
    """Everybody looks for himself."""

    def start(self) -> None:
        """Nothing to begin."""

    def subscribe(self, kind: HintKind, listener: Listener) -> None:
        """It will never be told anything."""

    def publish(self, hint: Hint) -> None:
        """Nobody listens."""

    def close(self) -> None:
        """Nothing to end."""


class InProcessHints:
    """Listeners of this process, called by whoever publishes, at once."""

    def __init__(self) -> None:
        self._listeners: dict[HintKind, tuple[Listener, ...]] = dict.fromkeys(HintKind, ())

    def start(self) -> None:
        """Nothing to begin."""

    def subscribe(self, kind: HintKind, listener: Listener) -> None:
        self._listeners[kind] = (*self._listeners[kind], listener)

    def publish(self, hint: Hint) -> None:
        for listener in self._listeners[hint.kind]:
            try:
                listener(hint.collection_id, hint.number)
            except Exception:  # It is no matter of what happened, which has taken effect.
                log.exception("a listener to %s hints failed", hint.kind.value)

    def close(self) -> None:
        """Nothing to end."""
