"""What a process of a cluster publishes about itself, beside its requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ochredb.metrics import Metrics
from ochredb_node.node import Node
from ochredb_node.peers import Peers
from ochredb_node.roles import Role
from ochredb_node.supervisor import Supervisor

if TYPE_CHECKING:
    from ochredb.cluster.budget import Counted
    from ochredb.storage.cached import CachedStore


def publish(
    metrics: Metrics,
    node: Node,
    peers: Peers,
    supervisor: Supervisor | None,
    is_ready: Callable[[], bool],
) -> None:
    """Add the figures of what this process has."""
    metrics.gauge(
        "ochredb_ready", "Whether requests should be sent here.", lambda: float(is_ready())
    )
    if node.has(Role.COMPACTOR):
        metrics.counter(
            "ochredb_graph_insertions_total",
            "Vectors inserted into graphs, by its workers too.",
            lambda: (
                node.compactor.graph_insertions
                + (0 if supervisor is None else supervisor.graph_insertions)
            ),
        )
    if peers.counted is not None:
        _publish_peers(metrics, peers, peers.counted)
    if node.foundation.cache is not None:
        _publish_cache(metrics, node.foundation.cache)
    if supervisor is not None:
        metrics.gauge(
            "ochredb_compactor_workers", "Worker processes that run.", lambda: supervisor.running
        )
        metrics.counter(
            "ochredb_compactor_worker_restarts_total",
            "Worker processes that had to be started again.",
            lambda: supervisor.restarts,
        )


def _publish_peers(metrics: Metrics, peers: Peers, counted: Counted) -> None:
    metrics.counter(
        "ochredb_peer_repeats_total",
        "Calls to other processes that were made after an attempt had failed.",
        lambda: counted.repeats,
    )
    metrics.counter(
        "ochredb_peer_hedges_total",
        "Reads, and shares of them, that were sent to a second node too, as the first took long.",
        lambda: counted.hedges,
    )
    metrics.gauge(
        "ochredb_peer_circuits_open",
        "Other processes that failed and have not answered since: others are asked first.",
        lambda: sum(nodes.open_circuits for nodes in peers.nodes),
    )


def _publish_cache(metrics: Metrics, cache: CachedStore) -> None:
    metrics.gauge(
        "ochredb_cache_used_bytes",
        "Bytes of local copies of objects.",
        lambda: cache.used_bytes,
    )

    def counted(name: str) -> Callable[[], float]:
        return lambda: float(getattr(cache.counters, name))

    for name, help_text in (
        ("hits", "Objects that were there."),
        ("misses", "Objects that had to be fetched."),
        ("fetched_bytes", "Bytes fetched."),
        ("evictions", "Copies that made room for others."),
        ("damaged", "Copies thrown away because they were damaged."),
        ("uncached", "Objects that found no place on the disk."),
    ):
        metrics.counter(f"ochredb_cache_{name}_total", help_text, counted(name))
