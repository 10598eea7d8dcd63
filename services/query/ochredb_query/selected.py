"""What filters selected of one view: asked again, they need not be evaluated again.

Applications repeat filters: of a tenant, of a kind, of the pages of one list. A view never changes,
so what is kept is never wrong; it goes with the view, which the next write replaces. Of rows that a
filter selects here and there the codes are kept, too: gathering their vectors takes longer than all
else (docs/decisions/0060-scans-read-codes-of-8-bits.md).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace

from ochredb.plan.operators import Selection
from ochredb.segment import View
from ochredb.vectors.codes import CodesOnUse, memory_bytes
from ochredb.vectors.scan import reads_all
from ochredb.where import Where

_KEPT_MAX = 16
# Of masks, a byte for each row of a segment in which something matches, and of codes.
_KEPT_BYTES_MAX = 16 << 20
_CODES_ROWS_MIN, _CODES_BYTES_MAX = 1_024, 4 << 20  # Of one segment.
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
        coded = [_with_codes(item) for item in selections]
        if _size_bytes(coded) <= _KEPT_BYTES_MAX:
            selections = coded
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


def _with_codes(item: Selection) -> Selection:
    """With a place for codes, if they are worth it: not where those of all rows are read."""
    if item.mask is None or item.count < _CODES_ROWS_MIN or reads_all(item.count, len(item.mask)):
        return item
    if memory_bytes(item.count, item.view.segment.dimension) > _CODES_BYTES_MAX:
        return item
    return replace(item, codes=CodesOnUse(is_useful=True))


def _size_bytes(selections: list[Selection]) -> int:
    """Codes count before they are made."""
    masks = sum(item.mask.nbytes for item in selections if item.mask is not None)
    return masks + sum(
        memory_bytes(item.count, item.view.segment.dimension)
        for item in selections
        if item.codes is not None
    )
