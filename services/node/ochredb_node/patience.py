"""Opening a store whose catalog or bucket may be away for the moment."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from ochredb.errors import NewerFormat, Unavailable
from ochredb_node.node import Node

log = logging.getLogger("ochredb.node")

_PAUSE_S, _PAUSE_S_MAX = 0.2, 5.0


def started(make: Callable[[], Node], stopping: threading.Event, rng: random.Random) -> Node | None:
    """A node that has started, however long that takes; None if `stopping` came first.

    make: a new one for each attempt. One without a catalog or bucket on another machine is tried
    once: its directory does not mend itself. Raises OchreError for what waiting does not help.
    """
    pause_s = _PAUSE_S
    while True:
        node = make()
        try:
            node.start()
            return node
        except NewerFormat:
            raise
        except Unavailable as error:
            if node.config.catalog_url is None and node.config.s3 is None:
                raise
            log.warning("not ready, tried again in %.1f s: %s", pause_s, error)
        if stopping.wait(pause_s * rng.uniform(0.5, 1.0)):
            return None
        pause_s = min(_PAUSE_S_MAX, 2 * pause_s)
