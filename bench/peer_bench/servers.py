"""A server under measurement: its collections over HTTP, its CPU, memory and disk by process id."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import psutil

from .http_client import Connection

ROOT = "/api/v2/tenants/default_tenant/databases/default_database/collections"
DRAIN_POLL_S = 0.05


class Server:
    """One side of the comparison.

    `pid` and `directory` may be None: then its CPU, memory or disk are not measured.
    """

    def __init__(
        self,
        label: str,
        url: str,
        *,
        pid: int | None = None,
        directory: str | None = None,
        encoding: str = "auto",
        hnsw: dict[str, Any] | None = None,
        query_extra: dict[str, Any] | None = None,
    ) -> None:
        self.label, self.url, self.pid, self.directory = label, url.rstrip("/"), pid, directory
        self.encoding, self.hnsw = encoding, hnsw
        self.query_extra = query_extra or {}  # Fields it gets in `query` and `spaces`.
        self.tells_progress = True  # Until indexing_status answers with an error.
        self.connection = Connection(self.url)
        self.base64 = False
        self.version = ""

    def probe(self) -> None:
        """Ask what the server takes; raises when it is not there."""
        checks = self.connection.call("GET", "/api/v2/pre-flight-checks")
        supported = bool(checks.get("supports_base64_encoding"))
        self.base64 = supported if self.encoding == "auto" else self.encoding == "b64"
        self.version = self.connection.call("GET", "/api/v2/version")

    def fresh(self, name: str, extra: dict[str, Any] | None = None) -> str:
        """Return the id of a new, empty collection; `extra` is merged into its configuration."""
        self.drop(name)
        body: dict[str, Any] = {"name": name, "metadata": None, "get_or_create": False}
        configuration = merge({"hnsw": self.hnsw} if self.hnsw else {}, extra or {})
        if configuration:
            body["configuration"] = configuration
        return str(self.connection.call("POST", ROOT, body)["id"])

    def drop(self, name: str) -> None:
        """Drop a collection; one that is not there is no error."""
        self.connection.send(self.connection.build("DELETE", f"{ROOT}/{name}"))

    def find(self, name: str) -> str:
        return str(self.connection.call("GET", f"{ROOT}/{name}")["id"])

    def unindexed(self, collection: str, connection: Connection | None = None) -> int:
        """Return how many operations are still to be indexed.

        0 for a server without indexing_status: it is taken to be indexed at the acknowledgement.
        connection: for a caller in a thread of its own.
        """
        connection = connection or self.connection
        path = f"{ROOT}/{collection}/indexing_status"
        status, body = connection.send(connection.build("GET", path))
        if status >= 400:
            self.tells_progress = False
            return 0
        told = orjson.loads(body)
        return int(told["num_unindexed_ops"]) or int(told["op_indexing_progress"] != 1.0)

    def drain(self, collection: str, limit_s: float = 120.0) -> tuple[float, float]:
        """Wait until all is indexed; return the seconds and server CPU seconds it took."""
        start_s, cpu_s = time.perf_counter(), self.cpu()
        while self.tells_progress and self.unindexed(collection):
            if time.perf_counter() - start_s > limit_s:
                print(f"warning: {self.label} not indexed in {limit_s:g} s", file=sys.stderr)
                break
            time.sleep(DRAIN_POLL_S)
        return time.perf_counter() - start_s, self.cpu() - cpu_s

    def counter(self, name: str) -> float | None:
        """Return a sum out of its /metrics; None when it has no such thing."""
        status, body = self.connection.send(self.connection.build("GET", "/metrics"))
        found = None
        for line in body.decode(errors="replace").splitlines() if status == 200 else ():
            if re.match(rf"{re.escape(name)}[ {{]", line):
                found = (found or 0.0) + float(line.rpartition(" ")[2])
        return found

    def processes(self) -> list[psutil.Process]:
        """Return the server's process and its children; empty when no pid is known."""
        if not self.pid:
            return []
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]

    def cpu(self) -> float:
        """Return CPU seconds used so far."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # A child that has just ended.
                t = process.cpu_times()
                total += t.user + t.system + t.children_user + t.children_system
        return total

    def rss(self) -> float:
        """Return resident bytes, mapped files included."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def rss_anonymous(self) -> float:
        """Return resident bytes that no file stands behind; nan where the system does not say."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                total += sum(
                    int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")
                )
        return total or float("nan")

    def disk(self) -> float:
        """Return bytes allocated under the data directory."""
        total = 0
        for folder, _, files in os.walk(self.directory or os.devnull):
            for file in files:
                with contextlib.suppress(OSError):  # A file that has just been removed.
                    total += os.lstat(os.path.join(folder, file)).st_blocks * 512
        return total


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return a deep merge of two JSON objects; `over` wins."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        out[key] = merge(base[key], value) if both else value
    return out
