"""How much memory graphs and codes take in this process, and whose go when there is too little.

A part's vectors and indexes are mapped, and the system lets go of their pages; what a search needs
in the heap is its graph, or the codes of its vectors. So these have a budget of their own, by part:
of a collection whose parts several nodes own, or that is seldom read, only what is used stays.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ochredb.parts.reader import Part


class GraphMemory:
    """Thread-safe. Knows parts only as long as somebody else has them open.

    turn: when a part was searched last is told in turns; they pass about once a second.
    """

    def __init__(self, bytes_max: int | None = None) -> None:
        """bytes_max: None = no limit."""
        self.bytes_max = bytes_max
        self.turn = 0
        self._lock = threading.Lock()
        self._parts: weakref.WeakSet[Part] = weakref.WeakSet()

    @property
    def size_bytes(self) -> int:
        """What all of them take."""
        with self._lock:
            return sum(part.heap_bytes for part in self._parts)

    def has_room(self, part: Part, size_bytes: int) -> bool:
        """Whether a part may make its codes: they take what is free, and nothing from others."""
        if self.bytes_max is not None and self.size_bytes + size_bytes > self.bytes_max:
            return False
        self.loaded(part)
        return True

    def loading(self, part: Part, size_bytes: int) -> None:
        """Before a part's graph is loaded: drop what was used longest ago until it fits.

        It is loaded even if it does not fit alone: there is no other way to search it.
        """
        if self.bytes_max is not None:
            self._drop(max(0, self.bytes_max - size_bytes), keep=part)
        self.loaded(part)

    def loaded(self, part: Part) -> None:
        """A part has them, beside all others: one that is to replace another, until the next
        `trim`."""
        with self._lock:
            self._parts.add(part)
            part.graph_turn = self.turn

    def trim(self, bytes_max: int) -> None:
        """Drop what was used longest ago until all take no more; called about once a second.

        The last one used stays: it would be loaded again at once.
        """
        self._drop(bytes_max, keep=None)
        self.turn += 1

    def _drop(self, bytes_max: int, keep: Part | None) -> None:
        with self._lock:
            parts = [part for part in self._parts if part is not keep]
            sizes = [part.heap_bytes for part in parts]
            total = sum(sizes)
            if total <= bytes_max:
                return
            order = sorted(range(len(parts)), key=lambda number: parts[number].graph_turn)
            for number in order if keep is not None else order[:-1]:
                if total <= bytes_max:
                    break
                total -= sizes[number]
                parts[number].drop_heap()
