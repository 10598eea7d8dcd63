"""Threads of a server, by kind of call: writes that wait for a disk never keep reads waiting."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

log = logging.getLogger("ochredb.rpc")


class BoundedPool(ThreadPoolExecutor):
    """Runs `threads` calls at once; as long as `is_full` nobody must submit more."""

    def __init__(self, kind: str, threads: int, waiting_max: int) -> None:
        super().__init__(threads, thread_name_prefix=f"rpc-{kind}")
        self.kind = kind
        self._taken_max = threads + waiting_max
        self._taken = 0
        self._change = threading.Condition()

    @property
    def is_full(self) -> bool:
        return self._taken >= self._taken_max

    def submit(self, call: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Never raises: grpc's one thread that hands out calls would end with it.

        Where no thread can be started the call stays in the queue, for one that there is, or will
        be; its caller's deadline bounds the wait.
        """
        with self._change:
            self._taken += 1
        try:
            future = super().submit(call, *args, **kwargs)
        except RuntimeError as error:
            log.warning("no new thread for %s calls: %s", self.kind, error)
            future = Future()
            future.set_result(None)
        future.add_done_callback(self._release)
        return future

    def _release(self, _future: Future[Any] | None = None) -> None:
        with self._change:
            self._taken -= 1
            self._change.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether nothing runs or waits any more."""
        with self._change:
            return self._change.wait_for(lambda: self._taken == 0, timeout_s)
