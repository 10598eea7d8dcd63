"""A compactor's worker process: it folds, merges and collects under leases, and listens to nobody.

Several share one catalog, with one another and with other machines; see `supervisor`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
from dataclasses import replace

from ochredb.clock import SystemClock
from ochredb.errors import OchreError
from ochredb_compactor.service import CompactorService
from ochredb_node.cli_common import start_failed
from ochredb_node.config import NodeConfig
from ochredb_node.memory import ShortCollections
from ochredb_node.node import Node
from ochredb_node.patience import Signals, started
from ochredb_node.roles import Role
from ochredb_node.supervisor import INSERTED, PAUSE

log = logging.getLogger("ochredb.node")

_OUTPUT = 1  # The standard output.


def worker_config(config: NodeConfig, count: int, number: str) -> NodeConfig:
    """What a node's configuration means for one of its `count` workers."""
    cache_path = config.cache_path
    threads = max(1, config.compactor.graph_threads // count)
    return replace(
        config,
        roles=frozenset({Role.COMPACTOR}),
        compactor_workers=0,
        cache_path=cache_path and os.path.join(os.path.dirname(cache_path), f"worker-{number}"),
        # A long merge shall not keep the small ones of others waiting.
        compactor=replace(config.compactor, graph_threads=threads, merge_threads=2),
    )


def work(config: NodeConfig, drain_timeout_s: float) -> int:
    """Compact until told to end, or until the parent is gone. Returns the exit status.

    drain_timeout_s: so long a job that runs may take when it is told; without a parent, no time.
    """
    signals, orphaned = Signals(), threading.Event()
    collections = ShortCollections(SystemClock())
    parent = _Parent(signals.stopping, orphaned)

    # It begins to work when the parent has said so.
    waiting = replace(config, compactor=replace(config.compactor, paused=True))

    def tidy(idle: bool) -> None:
        parent.tell()
        collections.tidy(idle=idle)

    def make() -> Node:
        return Node(waiting, tidy=tidy)

    try:
        node = started(make, signals, random.Random())
    except (OchreError, OSError) as error:
        return start_failed(error)
    if node is not None:
        collections.start()
        parent.obey(node.compactor)
        signals.stopping.wait()
        node.compactor.drain(0.0 if orphaned.is_set() else drain_timeout_s)
        node.close()
        parent.tell()
    return 0


class _Parent:
    """Reads what the parent writes to the standard input, which ends with the parent: at first, and
    whenever that changes, whether to pause. Writes to the standard output what it has done."""

    def __init__(self, stopping: threading.Event, orphaned: threading.Event) -> None:
        self._stopping, self._orphaned = stopping, orphaned
        self._lock = threading.Lock()  # Guards the next two.
        self._is_paused = False
        self._compactor: CompactorService | None = None
        self._told = threading.Event()
        self._insertions = 0  # As the parent was told.
        os.set_blocking(_OUTPUT, False)
        threading.Thread(target=self._listen, name="parent", daemon=True).start()

    def obey(self, compactor: CompactorService) -> None:
        """Let it hear what is said, from the first word on, which is waited for."""
        self._told.wait()
        with self._lock:
            self._compactor = compactor
            self._act()

    def tell(self) -> None:
        """How many vectors were inserted into graphs, if that has changed."""
        inserted = 0 if self._compactor is None else self._compactor.graph_insertions
        if inserted == self._insertions:
            return
        # One that is frozen, or gone, is not waited for.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(_OUTPUT, INSERTED + b"%d\n" % inserted)
            self._insertions = inserted

    def _listen(self) -> None:
        # Unbuffered: a buffer's lock, held here at the process's end, would be fatal.
        said = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
        for line in said:
            with self._lock:
                self._is_paused = line.strip() == PAUSE
                self._told.set()
                self._act()
        self._orphaned.set()
        self._stopping.set()
        self._told.set()

    def _act(self) -> None:
        if self._compactor is not None:
            act = self._compactor.pause if self._is_paused else self._compactor.resume
            act()
