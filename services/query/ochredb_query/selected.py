"""What filters selected of one view: asked again, they need not be evaluated again.

Applications repeat filters: of a tenant, of a kind, of the pages of one list. A view never changes,
so what is kept is never wrong; it goes with the view, which the next write replaces.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from ochredb.plan.operators import Selection
from ochredb.segment import View
from ochredb.where import Where

_KEPT_MAX = 16
_KEPT_BYTES_MAX = 4 << 20  # Of masks: a byte for each row of a segment in which something matches.
_NAME_CHARS_MAX = 4_096  # A longer filter is not kept: its name would be longer than its masks.


def name_of(where: Where) -> str:
    """Equal for equal filters only: it tells 1, 1.0 and True apart, which are equal in Python.

    Cost: some microseconds, and 0.1 for each value of a list.
    """
    return repr(where)


class Selected:
    """The filters of one view that were used last, bounded in number and bytes. Thread-safe."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, list[Selection]] = OrderedDict()
        self.size_bytes = 0

    def find(self, name: str) -> list[Selection] | None:
        """What the filter of this name selects, if that is known."""
        with self._lock:
            found = self._kept.get(name)
            if found is not None:
                self._kept.move_to_end(name)
            return found

    def keep(self, name: str, selections: list[Selection]) -> None:
        """Remember what a filter selects, and forget what was not used for longest."""
        size_bytes = _size_bytes(selections)
        if len(name) > _NAME_CHARS_MAX or size_bytes > _KEPT_BYTES_MAX:
            return
        with self._lock:
            if name in self._kept:
                return
            self._kept[name] = selections
            self.size_bytes += size_bytes
            while len(self._kept) > _KEPT_MAX or self.size_bytes > _KEPT_BYTES_MAX:
                _, oldest = self._kept.popitem(last=False)
                self.size_bytes -= _size_bytes(oldest)


def _size_bytes(selections: list[Selection]) -> int:
    return sum(item.mask.nbytes for item in selections if item.mask is not None)
