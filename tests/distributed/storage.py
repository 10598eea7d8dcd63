"""What a cluster has stored, seen from outside: by SQL and by S3's own client.

storage = Storage(cluster)
assert not storage.difference()
with storage.node() as node: ...
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg

from ochredb.parts.manifest import Manifest
from ochredb.storage.base import RESERVED_PART
from ochredb.storage.s3_config import S3Config
from ochredb_compactor.config import CompactorConfig
from ochredb_frontend.config import FrontendConfig
from ochredb_log.config import LogConfig
from ochredb_node.config import NodeConfig
from ochredb_node.node import Node
from tests.crash.actor import Call
from tests.crash.recorded import Keys

from .cluster import Cluster
from .process import GRACE_S

STORE_ID_KEY = "store_id"


class Storage:
    """Connections of its own, past every proxy. Usable while the cluster runs, and after."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._s3 = cluster.components.ceph.client()
        self._nodes = 0
        self._sql = psycopg.connect(cluster.catalog_url, autocommit=True)

    def close(self) -> None:
        self._s3.close()
        self._sql.close()

    def all(self, sql: str) -> list[tuple[Any, ...]]:
        return self._sql.execute(sql.encode()).fetchall()

    def collections(self) -> set[str]:
        return {row[0] for row in self.all("SELECT id FROM collections")}

    def keys(self) -> Keys:
        """Idempotency keys, and what was appended with each."""
        rows = self.all("SELECT collection, key, first_offset, last_offset FROM idempotency")
        return {(row[0], row[1]): (row[2], row[3]) for row in rows}

    def bucket(self) -> set[str]:
        """Keys of all objects below the cluster's prefix, and of its probes that a kill left.

        A start tries the bucket out with an object in `tmp/`; what was left there by a start that
        was killed is removed by one that comes ten minutes later.
        """
        url = urlsplit(self._cluster.object_store_url)
        prefix = url.path.strip("/") + "/"
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=url.netloc, Prefix=prefix)
        found = {item["Key"] for page in pages for item in page.get("Contents", ())}
        return {key.removeprefix(prefix) for key in found}

    def referenced(self) -> set[str]:
        """Keys that versions, logs, quarantine and pins name, found without the reference table."""
        named = {
            item.key
            for row in self.all(
                "SELECT DISTINCT p.manifest FROM version_parts v JOIN parts p ON p.id = v.part"
            )
            for item in Manifest.from_json(row[0]).objects
        }
        for table, column in (
            ("version_parts", "deleted_key"),
            ("fragments", "object_key"),
            ("quarantine", "object_key"),
        ):
            named |= {
                row[0]
                for row in self.all(f"SELECT {column} FROM {table} WHERE {column} IS NOT NULL")
            }
        return named

    def difference(self) -> str:
        """What is not yet folded, not collected, missing or left over; empty if nothing is."""
        behind = self.all(
            "SELECT collection, next_offset - 1 - indexed_offset FROM logs"
            " WHERE next_offset - 1 > indexed_offset"
        )
        bucket = {key for key in self.bucket() if not key.startswith(f"{RESERVED_PART}/")}
        bucket, referenced = bucket - {STORE_ID_KEY}, self.referenced()
        table = {row[0] for row in self.all("SELECT DISTINCT key FROM object_references")}
        live = {row[0] for row in self.all("SELECT key FROM objects WHERE state = 'live'")}
        texts = [
            f"{count} operations of {collection} are not folded" for collection, count in behind
        ]
        for what, keys in {
            "referenced objects are missing": referenced - bucket,
            "objects that nothing refers to": bucket - referenced,
            "references to nothing": table - referenced,
            "objects referred to without a reference": referenced - table,
            "live rows that nothing refers to": live - referenced,
            "objects without a live row": referenced - live,
        }.items():
            if keys:
                texts.append(f"{len(keys)} {what}: {sorted(keys)[:3]}")
        return "; ".join(texts)

    @contextlib.contextmanager
    def node(self) -> Iterator[Node]:
        """An engine in this process with every role and no background work."""
        node = Node(self.node_config())
        node.start(background=False)
        try:
            yield node
        finally:
            node.close()

    def node_config(self) -> NodeConfig:
        cluster, ceph = self._cluster, self._cluster.components.ceph
        self._nodes += 1
        return NodeConfig(
            name="outside",
            catalog_url=cluster.catalog_url,
            s3=S3Config.from_url(
                cluster.object_store_url,
                endpoint_url=ceph.url,
                region="us-east-1",
                access_key_id=ceph.access_key,
                secret_access_key=ceph.secret_key,
            ),
            cache_path=str(cluster.root / f"outside-{os.getpid()}-{self._nodes}.cache"),
            frontend=FrontendConfig(allow_reset=True),
            log=LogConfig(inline_bytes_max=2 << 10),
            compactor=CompactorConfig(grace_s=GRACE_S, graph_threads=1),
        )


def node_call(node: Node) -> Call:
    """Requests to an engine in this process."""

    def call(method: str, path: str, body: Any, _key: str | None) -> tuple[int, Any]:
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        status, _, answer = node.handle(method, path, "", headers, data)
        return status, json.loads(answer)

    return call
