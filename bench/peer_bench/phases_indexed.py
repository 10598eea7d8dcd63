"""Whole ingests, uninterrupted: acknowledged, indexed, and what is left of it some time after.

Whole ones: in slices a background indexer would work for free in the other server's time.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from types import TracebackType

from .bench import Bench
from .data import Data
from .http_client import Connection
from .servers import ROOT, Server
from .slices import Latencies, Slice, run_threads, send_all

Collections = dict[str, str]  # Label of a server -> id of its collection.
BACKLOG_POLL_S = 0.05
INDEXED_LIMIT_S = 900.0
GRAPH_INSERTIONS = "ochredb_graph_insertions_total"  # In /metrics; other servers have none.
FOOTPRINT = (("RSS", Server.rss), ("RssAnon", Server.rss_anonymous), ("disk", Server.disk))


class Backlog:
    """Watches how many operations wait to be indexed while the block runs; `highest` of them.

    Stays 0 for a server that does not say.
    """

    def __init__(self, server: Server, collection: str) -> None:
        self.highest = 0
        self._server, self._collection = server, collection
        self._ended = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        connection = Connection(self._server.url)
        try:
            ended = False
            while self._server.tells_progress and not ended:  # Once more at the end.
                ended = self._ended.wait(BACKLOG_POLL_S)
                waiting = self._server.unindexed(self._collection, connection)
                self.highest = max(self.highest, waiting)
        except Exception as error:  # Raised again at the end of the block.
            self._error = error
        finally:
            connection.close()

    def __enter__(self) -> Backlog:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error


class Settling:
    """Memory and disk of a server when it has indexed all, and `wait_s` after that.

    The wait is a thread's, so that the other server can be written to meanwhile.
    """

    def __init__(self, server: Server, wait_s: float) -> None:
        self.right_after = measured(server)
        self.settled: dict[str, float] = {}
        self._timer = threading.Timer(wait_s, self._take, (server,))
        self._timer.start()

    def _take(self, server: Server) -> None:
        self.settled = measured(server)

    def join(self) -> None:
        self._timer.join()
        if not self.settled:
            raise RuntimeError("memory and disk could not be measured")


def measured(server: Server) -> dict[str, float]:
    """Return megabytes by name, of what is known about this server."""
    known = {"RSS": server.pid, "RssAnon": server.pid, "disk": server.directory}
    return {name: measure(server) / 1e6 for name, measure in FOOTPRINT if known[name]}


@dataclasses.dataclass
class Whole:
    """The ingests of one server."""

    part: Slice = dataclasses.field(default_factory=Slice)
    wait_s: list[float] = dataclasses.field(default_factory=list)
    refused_s: Latencies = dataclasses.field(default_factory=list)
    backlog: int = 0


def indexed(
    bench: Bench, data: Data, n: int, writers: int, name: str, settle: bool = False
) -> Collections:
    """Write the first n records, wait until indexing_status says that nothing is left; repeat.

    Return the first round's collections; further rounds go to others, dropped afterwards.
    settle: after the first round wait, and note memory and disk.
    """
    options = bench.options
    pair = (options.indexed_rounds, options.indexed_rounds_b or options.indexed_rounds)
    rounds = dict(zip(bench.labels, pair, strict=False))
    bodies = {
        encoded: data.batches(n, encoded) for encoded in {server.base64 for server in bench.servers}
    }
    wholes = {label: Whole() for label in bench.labels}
    collections: Collections = {}
    for number in range(max(rounds.values())):
        settling: dict[str, Settling] = {}
        inserted = {server.label: server.counter(GRAPH_INSERTIONS) for server in bench.servers}
        for server in bench.order(number):
            if number >= rounds[server.label]:
                continue
            own = f"{name}_again" if number else name
            collection = server.fresh(own)
            one_ingest(server, collection, bodies[server.base64], n, writers, wholes[server.label])
            if number:
                server.drop(own)
                continue
            collections[server.label] = collection
            if settle:
                settling[server.label] = Settling(server, options.settle_s)
        if settling:
            bench.log(f"settling {options.settle_s:g} s")
            report_settled(bench, settling)
            report_insertions(bench, inserted, n)
    report_whole(bench, wholes, writers, n)
    return collections


def one_ingest(
    server: Server, collection: str, bodies: list[bytes], n: int, writers: int, whole: Whole
) -> None:
    """Write everything into one empty collection, and wait until it is indexed."""
    path = f"{ROOT}/{collection}/add"
    writes = [server.connection.build("POST", path, body) for body in bodies]
    server.tells_progress = True
    with Backlog(server, collection) as backlog:
        worker = send_all(writes, whole.refused_s)
        latencies, wall_s, server_s, client_s = run_threads(server, writers, worker)
        acknowledged_s = time.perf_counter()
    # The watcher's last poll, if it was under way, is part of the wait.
    drain_cpu_s = server.drain(collection, INDEXED_LIMIT_S)[1]
    drain_s = time.perf_counter() - acknowledged_s if server.tells_progress else 0.0
    whole.backlog = max(whole.backlog, backlog.highest)
    whole.wait_s.append(drain_s)
    whole.part.add(latencies, wall_s + drain_s, server_s + drain_cpu_s, client_s, n)


def report_whole(bench: Bench, wholes: dict[str, Whole], writers: int, n: int) -> None:
    parts = {label: whole.part for label, whole in wholes.items()}
    least = min(len(whole.wait_s) for whole in wholes.values())
    until_indexed = {label: part.count / part.wall_s for label, part in parts.items()}
    acked = {
        label: whole.part.count / (whole.part.wall_s - sum(whole.wait_s))
        for label, whole in wholes.items()
    }
    waited = {label: statistics.mean(whole.wait_s) for label, whole in wholes.items()}
    head = f"{writers} writer{'s' if writers > 1 else ''}"
    bench.row("indexed", f"{head}: first request -> last ack", "rec/s", "high", acked, least)
    bench.row("indexed", f"{head}: first request -> indexed", "rec/s", "high", until_indexed, least)
    bench.row("indexed", f"{head}: last ack -> indexed", "s", "low", waited)
    for percent in (50, 95):
        batch = {label: part.percentile_ms(percent) for label, part in parts.items()}
        bench.row("indexed", f"{head}: batch p{percent}", "ms", "low", batch)
    bench.cpu_row("indexed", f"{head}: server CPU until indexed", "us/rec", parts, 1e6)
    refused = {label: float(len(whole.refused_s)) for label, whole in wholes.items()}
    bench.row("indexed", f"{head}: 429 answers", "", "low", refused)
    backlog = {
        server.label: float(wholes[server.label].backlog)
        for server in bench.servers
        if server.tells_progress
    }
    if backlog:
        bench.row("indexed", f"{head}: most records not indexed", "", "low", backlog, n)
    bench.note_cores(f"indexed {head}", parts)


def report_settled(bench: Bench, settling: dict[str, Settling]) -> None:
    for one in settling.values():
        one.join()
    for when in ("right_after", "settled"):
        for name, _ in FOOTPRINT:
            values = {
                label: getattr(one, when)[name]
                for label, one in settling.items()
                if name in getattr(one, when)
            }
            if values:
                bench.row("settle", f"{name} {when.replace('_', ' ')}", "MB", "low", values)


def report_insertions(bench: Bench, before: dict[str, float | None], n: int) -> None:
    """How often a row was put into a graph, where the server counts that."""
    values = {}
    for server in bench.servers:
        now, then = server.counter(GRAPH_INSERTIONS), before[server.label]
        if now is not None:
            values[server.label] = (now - (then or 0.0)) / n
    if values:
        bench.row("indexed", "graph insertions per stored row", "", "low", values)
