"""A compactor's worker process: it folds, merges and collects under leases, and listens to nobody.

Several share one catalog, with one another and with other machines; see `supervisor`.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
from dataclasses import replace
from types import FrameType

from ochredb.clock import SystemClock
from ochredb.errors import OchreError
from ochredb_node.cli_common import FAILURE, failed
from ochredb_node.config import NodeConfig
from ochredb_node.memory import ShortCollections
from ochredb_node.node import Node
from ochredb_node.patience import started
from ochredb_node.roles import Role

log = logging.getLogger("ochredb.node")


def worker_config(config: NodeConfig, count: int, number: str) -> NodeConfig:
    """What a node's configuration means for one of its `count` workers."""
    cache_path = config.cache_path
    threads = max(1, config.compactor.graph_threads // count)
    return replace(
        config,
        roles=frozenset({Role.COMPACTOR}),
        compactor_workers=0,
        cache_path=cache_path and os.path.join(os.path.dirname(cache_path), f"worker-{number}"),
        compactor=replace(config.compactor, graph_threads=threads),
    )


def work(config: NodeConfig) -> int:
    """Compact until told to end, or until the parent is gone. Returns the exit status."""
    stopping = threading.Event()

    def signalled(number: int, _frame: FrameType | None) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signalled)
    threading.Thread(target=_watch_parent, args=(stopping,), daemon=True).start()
    collections = ShortCollections(SystemClock())

    def make() -> Node:
        return Node(config, tidy=lambda idle: collections.tidy(idle=idle))

    try:
        node = started(make, stopping, random.Random())
    except (OchreError, OSError) as error:
        return failed(error, FAILURE)
    if node is not None:
        collections.start()
        stopping.wait()
        node.close()
    return 0


def _watch_parent(stopping: threading.Event) -> None:
    """The parent holds the other end of the standard input, and never writes."""
    while sys.stdin.buffer.read(1):
        pass
    stopping.set()
