"""Leases of one process's jobs: taken, renewed while work runs, given back."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from ochredb.catalog.jobs import Lease
from ochredb.errors import OchreError
from ochredb.processes import is_gone
from ochredb_compactor.world import World

log = logging.getLogger("ochredb.compactor")


class Leases:
    """Thread-safe. owner: unique to this process. on_end: told the kind of each job that ended."""

    def __init__(self, world: World, owner: str, on_end: Callable[[str], None]) -> None:
        self._world, self._owner, self._on_end = world, owner, on_end

    @contextlib.contextmanager
    def __call__(self, collection_id: str, kind: str) -> Iterator[Lease | None]:
        """The lease or None; renewed while held, given back at the end."""
        jobs, config = self._world.jobs, self._world.config
        owner = f"{self._owner}/{threading.get_ident()}"
        lease = jobs.acquire(collection_id, kind, owner, config.lease_ttl_s, is_gone)
        if lease is None:
            yield None
            return
        keeper: _Keeper | None = None
        try:
            keeper = _Keeper(self._world, lease)
            yield lease
        except BaseException as error:
            if keeper is not None:
                keeper.stop()
            with contextlib.suppress(OchreError):  # The first error is the one to report.
                jobs.end(lease, f"{type(error).__name__}: {error}"[:500])
            raise
        keeper.stop()
        jobs.end(lease)
        self._on_end(kind)


class _Keeper:
    """Renews a lease from a thread of its own while long work runs."""

    def __init__(self, world: World, lease: Lease) -> None:
        self._world, self._lease = world, lease
        self._done = threading.Event()
        self._timer = threading.Timer(world.config.lease_ttl_s / 3, self._renew)
        self._timer.daemon = True
        self._timer.start()

    def _renew(self) -> None:
        while not self._done.is_set():
            try:
                if not self._world.jobs.renew(self._lease, self._world.config.lease_ttl_s):
                    return  # Taken over: the commit will find out by its fence.
            except OchreError as error:
                log.warning("cannot renew the lease of %s: %s", self._lease.collection, error)
            self._done.wait(self._world.config.lease_ttl_s / 3)

    def stop(self) -> None:
        """No renewal comes after this: it would give life to a lease that has ended."""
        self._done.set()
        self._timer.cancel()
        self._timer.join()
