"""The parts that are open in this process, shared by everybody who needs the same one.

What a part has verified and loaded (its blocks, its indexes, its graph) is worth sharing: a
compaction that looks up ids in a large part need not check it again. Nothing is kept alive here: a
part goes when its last user does.
"""

from __future__ import annotations

import threading
import weakref

from ochredb.configuration import IndexSettings
from ochredb.parts.graph_memory import GraphMemory
from ochredb.parts.manifest import Manifest
from ochredb.parts.reader import Part
from ochredb.storage.base import LocalStore


class OpenParts:
    """Thread-safe."""

    def __init__(self, store: LocalStore, graph_bytes_max: int | None = None) -> None:
        """graph_bytes_max: of loaded graphs; None = no limit."""
        self._store = store
        self.graphs = GraphMemory(graph_bytes_max)
        self._lock = threading.Lock()
        self._parts: weakref.WeakValueDictionary[str, Part] = weakref.WeakValueDictionary()
        self._damaged: dict[str, str] = {}

    def open(self, manifest: Manifest, settings: IndexSettings) -> Part:
        """The part, opened now if nobody has it. Cost: nothing is read before it is used."""
        with self._lock:
            part = self._parts.get(manifest.id)
            if part is None:
                part = self._parts[manifest.id] = Part(
                    self._store, manifest, settings, self.found_damaged, self.graphs
                )
            return part

    def found_damaged(self, part_id: str, problem: str) -> None:
        """Something derived of a part is damaged: `take_damaged` is to return it."""
        self._damaged[part_id] = problem

    def take_damaged(self) -> dict[str, str]:
        """Parts of which something derived was found damaged since the last call, and the problem.

        What cannot be built anew is found again when the part is opened again.
        """
        taken, self._damaged = self._damaged, {}
        return taken
