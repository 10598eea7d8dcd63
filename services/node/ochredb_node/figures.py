"""What a process of a cluster publishes about itself, beside its requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ochredb.metrics import Metrics
from ochredb_node.node import Node
from ochredb_node.supervisor import Supervisor

if TYPE_CHECKING:
    from ochredb.storage.cached import CachedStore


def publish(
    metrics: Metrics, node: Node, supervisor: Supervisor | None, is_ready: Callable[[], bool]
) -> None:
    """Add the figures of what this process has."""
    metrics.gauge(
        "ochredb_ready", "Whether requests should be sent here.", lambda: float(is_ready())
    )
    if node.compacts:
        metrics.counter(
            "ochredb_graph_insertions_total",
            "Vectors inserted into graphs.",
            lambda: node.compactor.graph_insertions,
        )
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
