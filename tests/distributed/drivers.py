"""The state machine's driver for a cluster, and one that asks a cluster and an embedded engine.

`ClusterDriver` sends requests to the cluster's one address. Folding, merging and collecting are
done by one more engine, in this process; `restart` ends one of the cluster's processes, in turn,
by kill -9 or by SIGTERM, and starts it again.
"""

from __future__ import annotations

import http.client
import json
import re
from contextlib import ExitStack
from typing import Any

import orjson

from ochredb.testing.model import canonical
from tests.property.drivers import EmbeddedDriver, Maintenance

from .cluster import Cluster
from .storage import Storage

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class ClusterDriver:
    """Of a started cluster, which it empties first."""

    persistent = True
    _turn = 0  # Whose turn to be restarted it is; goes on from one example to the next.

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        host, _, port = cluster.url.removeprefix("http://").partition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=60)
        status, answer = self.call("POST", "/api/v2/reset")
        assert status == 200, answer
        self._stack = ExitStack()
        storage = Storage(cluster)
        self._stack.callback(storage.close)
        self._node = self._stack.enter_context(storage.node())

    @property
    def compactor(self) -> Maintenance:
        return self._node.compactor

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, data, {"content-type": "application/json"})
        response = self._connection.getresponse()
        answer = response.read()
        return response.status, orjson.loads(answer) if answer else None

    def restart(self) -> None:
        names = list(self.cluster.members)
        name = names[ClusterDriver._turn % len(names)]
        orderly = ClusterDriver._turn // len(names) % 2
        ClusterDriver._turn += 1
        if orderly:
            self.cluster.restart(name)
        else:
            self.cluster.kill(name)
            self.cluster.wait_ready([name])
        self._connection.close()  # It may have led to a frontend that is gone.

    def close(self) -> None:
        self._connection.close()
        self._stack.close()


class TwinDriver:
    """Each request goes to a cluster and to an embedded engine, whose answers must be equal.

    They are, but for the ids of collections, which are drawn: the caller sees the cluster's.
    """

    persistent = True

    def __init__(self, cluster: Cluster, directory: str) -> None:
        self._cluster, self._embedded = ClusterDriver(cluster), EmbeddedDriver(directory)
        self._embedded_ids: dict[str, str] = {}  # By the cluster's.
        self.compared = 0

    @property
    def compactor(self) -> Maintenance:
        return _Both(self)

    def embedded_id(self, collection_id: str) -> str:
        return self._embedded_ids[collection_id]

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        status, answer = self._cluster.call(method, path, body)
        embedded_path = _UUID.sub(lambda found: self.embedded_id(found[0]), path)
        embedded_status, embedded_answer = self._embedded.call(method, embedded_path, body)
        if method == "POST" and path.endswith("/collections") and status == embedded_status == 200:
            self._embedded_ids.setdefault(answer["id"], embedded_answer["id"])
        self.compared += 1
        shown, embedded_shown = self._shown(path, answer), self._shown(path, embedded_answer)
        for cluster_id, embedded_id in self._embedded_ids.items():
            shown = shown.replace(cluster_id, embedded_id)
        assert (status, shown) == (embedded_status, embedded_shown), (
            f"{method} {path} {canonical(body)}\n  cluster:  {status} {shown}\n"
            f"  embedded: {embedded_status} {embedded_shown}"
        )
        return status, answer

    @staticmethod
    def _shown(path: str, answer: Any) -> str:
        if path.endswith("/indexing_status") and "total_ops" in answer:
            return canonical(answer["total_ops"])  # The rest depends on who folds when.
        return canonical(answer)

    def restart(self) -> None:
        self._cluster.restart()
        self._embedded.restart()

    def close(self) -> None:
        self._cluster.close()
        self._embedded.close()


class _Both:
    def __init__(self, twin: TwinDriver) -> None:
        self._twin = twin

    def fold_now(self, collection_id: str) -> None:
        self._twin._cluster.compactor.fold_now(collection_id)
        self._twin._embedded.compactor.fold_now(self._twin.embedded_id(collection_id))

    def compact_now(self, collection_id: str) -> None:
        self._twin._cluster.compactor.compact_now(collection_id)
        self._twin._embedded.compactor.compact_now(self._twin.embedded_id(collection_id))

    def collect_now(self, *, sweep_orphans: bool) -> None:
        self._twin._cluster.compactor.collect_now(sweep_orphans=sweep_orphans)
        self._twin._embedded.compactor.collect_now(sweep_orphans=sweep_orphans)
