"""What this node reads, kept on the disk of a second one too, which reads it when this one is gone.

Whoever reads a collection asks the first other node of its order to keep copies of its parts: of a
collection that is read by its owner, that is the node which is asked next. Of a large collection
each part has a second owner. What is kept are objects on the disk, no more: they are opened, and
graphs loaded, by the first read. It is a matter of speed only (I11): nothing waits for it, what
cannot be asked or kept is not, and it is asked for again while the collection is read.

    copies = SecondCopies(store, clock, scatter, spread_bytes, loaded.get)
    copies.look(collection)  # Now and then.
    copies.keep(objects)     # Another node asks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ochredb.cancel import Cancel, Cancelled
from ochredb.clock import Clock
from ochredb.storage.base import KeepsCopies, LocalStore
from ochredb_query.loaded import LoadedCollection
from ochredb_query.prefetch import Prefetcher

if TYPE_CHECKING:
    from ochredb.cluster.nodes import Node
    from ochredb.peers import DistantQueryNode
    from ochredb_query.scatter import Scatter

log = logging.getLogger("ochredb.query")

_AGAIN_S = 300.0  # The other node may have begun anew, or have lost its copies to others.
_NOBODY_S = 10.0  # The same if nobody could be asked.


class SecondCopies:
    """Thread-safe. Does nothing where objects are near anyway, or where there are no others."""

    def __init__(
        self,
        store: LocalStore,
        clock: Clock,
        scatter: Scatter | None,
        spread_bytes: int,
        find: Callable[[str], LoadedCollection | None],
    ) -> None:
        """spread_bytes: see `QueryConfig`. find: a collection that is read here."""
        self._store = store if isinstance(store, KeepsCopies) else None
        self._clock, self._scatter, self._find = clock, scatter, find
        self._spread_bytes = spread_bytes
        self._closing = Cancel()
        self._asking = Prefetcher(self._ask, "the second copy of version {number} of {name}")
        self._keeping = Prefetcher(self._keep, "a copy of {name}")

    def look(self, loaded: LoadedCollection) -> None:
        """Ask for copies of a version that is new here, and again while it is read.

        Cost: a microsecond.
        """
        view, now_s = loaded.view, self._clock.monotonic_s()
        if view is None or self._store is None or self._scatter is None:
            return
        if loaded.copied_version == view.version and (
            now_s < loaded.copied_until_s or not loaded.is_read
        ):
            return
        loaded.copied_version, loaded.copied_until_s = view.version, now_s + _AGAIN_S
        self._asking.add(loaded.collection_id, view.version)

    def keep(self, objects: Sequence[tuple[str, int]]) -> None:
        """See `ochredb.peers.QueryNode.keep_copies`."""
        if self._store is not None:
            for key, size in objects:
                self._keeping.add(key, size)

    def settle(self, timeout_s: float) -> bool:
        """Wait until nothing is left to do; whether that was in time."""
        return self._asking.settle(timeout_s) and self._keeping.settle(timeout_s)

    def close(self) -> None:
        """Forget what waits, and break off what is being done."""
        self._closing.cancel()
        self._asking.close()
        self._keeping.close()

    # -- in threads of their own

    def _ask(self, collection_id: str, _version: int) -> None:
        loaded, scatter = self._find(collection_id), self._scatter
        if loaded is None or scatter is None:
            return
        objects, sizes = loaded.stored_objects(), loaded.part_bytes
        if loaded.stored_bytes <= self._spread_bytes:
            every = [each for part in objects.values() for each in part]
            found = not every or self._asked(scatter, scatter.others(collection_id), every)
        else:
            found = True
            for name, part_ids in scatter.heirs(sizes).items():
                theirs = [each for part_id in part_ids for each in objects.get(part_id, ())]
                if name == scatter.name:
                    self.keep(theirs)
                else:
                    found = self._asked(scatter, [scatter.named(name)], theirs) and found
        if not found:
            loaded.copied_until_s = self._clock.monotonic_s() + _NOBODY_S

    def _asked(
        self,
        scatter: Scatter,
        nodes: Sequence[Node[DistantQueryNode] | None],
        objects: Sequence[tuple[str, int]],
    ) -> bool:
        try:
            return scatter.ask_to_keep(nodes, objects, self._closing)
        except Cancelled:
            return False

    def _keep(self, key: str, size: int) -> None:
        assert self._store is not None
        try:
            is_kept = self._store.keep(key, size, self._closing)
        except Cancelled:
            return
        if not is_kept:
            log.debug("there is no room for a copy of %s (%d bytes)", key, size)
