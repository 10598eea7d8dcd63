"""One job on one collection, under a lease: fold, merge, write anew; once, or until it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ochredb.catalog.jobs import Lease
from ochredb.catalog.versions import VersionPart
from ochredb.errors import Conflict, Corrupt, DeadlineExceeded, Gone, NotFound
from ochredb_compactor.compaction import compact
from ochredb_compactor.leases import Leases
from ochredb_compactor.memory import fold_bytes, merge_bytes
from ochredb_compactor.merge import merge
from ochredb_compactor.scheduler import MergePlan, graph_rows_max, merge_plan, rewrite_plan
from ochredb_compactor.world import World

_ATTEMPTS_MAX = 10


class Work:
    """Thread-safe. step: called between pieces of work; it may raise to give up."""

    def __init__(self, world: World, lease: Leases) -> None:
        self._world, self._lease = world, lease

    def compact(self, collection_id: str, step: Callable[[], None]) -> bool | None:
        """Fold what is in the log now; whether anything was. None: somebody else has the lease."""
        logs = self._world.logs
        with self._lease(collection_id, "compact") as lease:
            if lease is None:
                return None
            before = logs.snapshot(collection_id)
            indexed = before.indexed_offset
            while indexed < before.last_offset and self._fold(lease, step) is not None:
                indexed = logs.snapshot(collection_id).indexed_offset
            return before.indexed_offset < before.last_offset

    def compact_some(self, collection_id: str, step: Callable[[], None]) -> bool | None:
        """Fold one piece of the log: then others have their turn. Whether there is more."""
        with self._lease(collection_id, "compact") as lease:
            if lease is None or self._fold(lease, step) is None:
                return None
            after = self._world.logs.snapshot(collection_id)
            return after.last_offset - after.indexed_offset >= self._world.config.tail_rows_due

    def _fold(self, lease: Lease, step: Callable[[], None]) -> int | None:
        _, tail_bytes = self._world.logs.tail_size(lease.collection)
        with self._world.memory.held(fold_bytes(tail_bytes, self._world.config), step):
            return compact(self._world, lease, step)

    def merge(self, collection_id: str, step: Callable[[], None], *, idle: bool) -> bool | None:
        world = self._world
        version = world.logs.snapshot(collection_id).version
        parts = world.versions.parts(collection_id, version)
        plan = merge_plan(parts, idle=idle, graph_rows_max=graph_rows_max(parts, world.config))
        if plan is None:
            return False
        with self._lease(collection_id, "merge") as lease:
            if lease is None:
                return None
            with world.memory.held(plan_bytes(plan, parts), step):
                merge(world, lease, plan, step, settles=idle)
        return True

    def rewrite(
        self,
        collection_id: str,
        dead_share_max: float,
        clean: set[str],
        step: Callable[[], None],
    ) -> bool | None:
        version = self._world.logs.snapshot(collection_id).version
        parts = self._world.versions.parts(collection_id, version)
        plan = rewrite_plan(parts, dead_share_max, clean)
        if plan is None:
            return False
        with self._lease(collection_id, "merge") as lease:
            if lease is None:
                return None
            with self._world.memory.held(plan_bytes(plan, parts), step):
                merged = merge(self._world, lease, plan, step, settles=True)
            clean.add(merged or plan.inputs[0])
        return True

    def until_done(self, collection_id: str, attempt: Callable[[], bool | None]) -> bool:
        """Repeat an attempt that lost a race (Conflict) or found the lease taken (None).

        Raises DeadlineExceeded if whoever has the lease gets nowhere for two of its terms. Where
        others compact again and again, each new version begins the wait anew.
        """
        clock, patience_s = self._world.clock, 2 * self._world.config.lease_ttl_s
        version = self._world.logs.snapshot(collection_id).version
        deadline = clock.monotonic_s() + patience_s
        gone = 0
        while clock.monotonic_s() < deadline:
            try:
                done = attempt()
                if done is not None:
                    return done
            except Conflict:
                pass
            except (Gone, NotFound) as error:
                # Of a dropped collection this raises NotFound. Else an object was collected or
                # swept under a slow attempt: a new one starts from a new snapshot.
                self._world.logs.snapshot(collection_id)
                gone += 1
                if gone == _ATTEMPTS_MAX:  # Each attempt takes a new snapshot: this is damage.
                    raise Corrupt(str(error)) from error
            clock.sleep(0.02)
            now_at = self._world.logs.snapshot(collection_id).version
            if now_at != version:
                deadline, version = clock.monotonic_s() + patience_s, now_at
        raise DeadlineExceeded("another process holds the collection's lease")


def plan_bytes(plan: MergePlan, parts: Sequence[VersionPart]) -> int:
    """What a merge of some of these parts will need."""
    inputs = [part for part in parts if part.manifest.id in plan.inputs]
    rows = sum(part.live_rows for part in inputs)
    dimension = max(part.manifest.dimension for part in inputs)
    return merge_bytes(rows, dimension, with_graph=plan.with_graph)
