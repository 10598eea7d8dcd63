"""Opening a store whose catalog or bucket may be away for the moment, and being told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from ochredb.errors import NewerFormat, Unavailable
from ochredb_node.node import Node

log = logging.getLogger("ochredb.node")

_PAUSE_S, _PAUSE_S_MAX = 0.2, 5.0


class Interrupted(BaseException):
    """Told to stop while there is nothing yet that must end in good order."""


class Signals:
    """SIGTERM and SIGINT of this process: the first sets `stopping`, the second ends it at once."""

    def __init__(self) -> None:
        """In the main thread, whose handlers they are from now on."""
        self.stopping = threading.Event()
        self._interrupts = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._come)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """In this block, of the main thread, the first one raises Interrupted too."""
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    def _come(self, number: int, _frame: FrameType | None) -> None:
        if self.stopping.is_set():
            os._exit(128 + number)
        self.stopping.set()
        if self._interrupts:
            raise Interrupted


def started(make: Callable[[], Node], signals: Signals, rng: random.Random) -> Node | None:
    """A node that has started, however long that takes; None if told to stop before.

    make: a new one for each attempt. One without a catalog or bucket on another machine is tried
    once: its directory does not mend itself. Raises OchreError for what waiting does not help.
    """
    pause_s = _PAUSE_S
    node: Node | None = None
    try:
        with signals.interrupting():
            while not signals.stopping.is_set():
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
                signals.stopping.wait(pause_s * rng.uniform(0.5, 1.0))
                pause_s = min(_PAUSE_S_MAX, 2 * pause_s)
    except Interrupted:
        if node is not None:
            node.close()
    return None
