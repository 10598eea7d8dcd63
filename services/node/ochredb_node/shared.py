"""One node for each directory of this process, shared by its embedded clients, and counted.

It is opened again after a fork: threads and locks do not survive one.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Mapping

from ochredb.errors import Unavailable
from ochredb_frontend.config import FrontendConfig
from ochredb_node.node import Node, NodeConfig


def open_shared(path: str | None, allow_reset: bool) -> SharedNode:
    """This process's node for a directory (None: in memory), started, counted."""
    return _embedded.open(path, allow_reset)


class SharedNode:
    """One user's handle on an embedded node; the last `close` stops it.

    After a fork the child's first call opens a node of its own on the same directory; what was in
    memory only is a private copy in the child.
    """

    def __init__(self, registry: _Embedded, key: str | None, allow_reset: bool) -> None:
        self._registry, self._key, self._allow_reset = registry, key, allow_reset
        self._open = True

    def handle(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """See `Node.handle`."""
        if not self._open:
            raise Unavailable("this client was closed")
        node = self._registry.node(self._key, self._allow_reset)
        return node.handle(method, path, query, headers, body)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._registry.release(self._key)


class _Embedded:
    """The embedded nodes of this process, by absolute path."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._nodes: dict[str | None, Node] = {}
        self._users: dict[str | None, int] = {}

    def open(self, path: str | None, allow_reset: bool) -> SharedNode:
        key = None if path is None else os.path.realpath(path)
        if self._pid != os.getpid():
            self._after_fork()
        with self._lock:
            self.node(key, allow_reset)
            self._users[key] = self._users.get(key, 0) + 1
        return SharedNode(self, key, allow_reset)

    def node(self, key: str | None, allow_reset: bool) -> Node:
        """The running node; opened again if this process is a fork of the one that opened it."""
        if self._pid != os.getpid():
            self._after_fork()
        node = self._nodes.get(key)
        if node is not None:
            return node
        with self._lock:
            node = self._nodes.get(key)
            if node is None:
                frontend = FrontendConfig(allow_reset=allow_reset)
                node = Node(NodeConfig(path=key, foreground=True, frontend=frontend))
                node.start()
                self._nodes[key] = node
            return node

    def _after_fork(self) -> None:
        """Threads and locks did not survive the fork; the parent's connections must stay open.

        The parent's nodes are kept referenced, so that nothing of theirs is closed here. The node
        in memory goes on as a private copy.
        """
        nodes, users = self._nodes, self._users
        _PARENTS.append(nodes)
        self._forget()
        self._users = users
        if None in nodes:
            self._nodes[None] = nodes[None].copy_after_fork()

    def release(self, key: str | None) -> None:
        """One user less. The node in memory stays: later clients share its state."""
        if self._pid != os.getpid():
            self._after_fork()
        with self._lock:
            self._users[key] = self._users.get(key, 0) - 1
            if self._users[key] <= 0 and key is not None:
                del self._users[key]
                node = self._nodes.pop(key, None)
                if node is not None:
                    node.close()

    def close_all(self) -> None:
        """At the end of the process; optional, acknowledged writes are durable anyway."""
        if self._pid != os.getpid():
            return
        with self._lock:
            for node in self._nodes.values():
                node.close()
            self._nodes.clear()


_PARENTS: list[object] = []
_embedded = _Embedded()
atexit.register(_embedded.close_all)
