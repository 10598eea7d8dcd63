"""Parts of which readers found something derived damaged: built anew, as by a merge."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from ochredb.catalog.jobs import Lease
from ochredb.errors import Corrupt
from ochredb_compactor.merge import merge
from ochredb_compactor.scheduler import rebuild_plan
from ochredb_compactor.work import plan_bytes
from ochredb_compactor.world import World

log = logging.getLogger("ochredb.compactor")

Leases = Callable[[str, str], AbstractContextManager[Lease | None]]


class Rebuilds:
    """What is waiting; of one thread."""

    def __init__(self, world: World, leases: Leases) -> None:
        self._world, self._leases = world, leases
        self.waiting: dict[str, str] = {}  # Parts, and what is wrong with them.

    def due(self) -> list[tuple[str, str]]:
        """Parts and their collections. What is of no collection any more is forgotten."""
        self.waiting.update(self._world.parts.take_damaged())
        found = []
        for part_id in list(self.waiting):
            collection_id = self._world.versions.collection_of(part_id)
            if collection_id is None:
                del self.waiting[part_id]
            else:
                found.append((part_id, collection_id))
        return found

    def rebuild(self, collection_id: str, step: Callable[[], None], part_id: str) -> bool | None:
        """Write the part anew, indexes and all. None: somebody else has the lease."""
        version = self._world.logs.snapshot(collection_id).version
        parts = self._world.versions.parts(collection_id, version)
        plan = rebuild_plan(parts, part_id)
        if plan is not None:
            with self._leases(collection_id, "merge") as lease:
                if lease is None:
                    return None
                try:
                    with self._world.memory.held(plan_bytes(plan, parts), step):
                        merge(self._world, lease, plan, step, settles=True)
                except Corrupt:  # Its records are damaged too: what is lost, somebody has to say.
                    self.waiting.pop(part_id, None)
                    raise
            log.warning("part %s was damaged and has been built anew", part_id)
        self.waiting.pop(part_id, None)
        return plan is not None
