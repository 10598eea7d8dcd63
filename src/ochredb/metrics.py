"""Counters and latency histograms in Prometheus' text format.

Updated from one thread only, a server's event loop, so there are no locks; any thread may read.
Cost of `observe`: about 1 µs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

# Upper bounds in seconds; the last bucket is open.
BOUNDS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class Metrics:
    """Requests by operation and status, their durations by operation, and values read on demand."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, int], int] = {}
        self._buckets: dict[str, list[int]] = {}
        self._sums_s: dict[str, float] = {}
        self._read: dict[str, tuple[str, str, Callable[[], float]]] = {}

    def observe(self, operation: str, status: int, duration_s: float) -> None:
        key = (operation, status)
        self._requests[key] = self._requests.get(key, 0) + 1
        buckets = self._buckets.get(operation)
        if buckets is None:
            buckets = self._buckets[operation] = [0] * (len(BOUNDS_S) + 1)
            self._sums_s[operation] = 0.0
        buckets[bisect_left(BOUNDS_S, duration_s)] += 1
        self._sums_s[operation] += duration_s

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Publish a value that is read whenever the metrics are."""
        self._read[name] = ("gauge", help_text, read)

    def counter(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """The same for a value that only grows while the process lives."""
        self._read[name] = ("counter", help_text, read)

    def take(self) -> dict[str, Any]:
        """What was observed since the last call, for `add` of another process's; JSON."""
        taken = {
            "requests": [[*key, count] for key, count in self._requests.items()],
            "buckets": self._buckets,
            "sums_s": self._sums_s,
        }
        self._requests, self._buckets, self._sums_s = {}, {}, {}
        return taken

    def add(self, taken: dict[str, Any]) -> None:
        """Count what another process has observed."""
        for operation, status, count in taken["requests"]:
            self._requests[operation, status] = self.requests(operation, status) + count
        for operation, buckets in taken["buckets"].items():
            mine = self._buckets.get(operation, [0] * len(buckets))
            self._buckets[operation] = [a + b for a, b in zip(mine, buckets, strict=True)]
            sum_s = self._sums_s.get(operation, 0.0) + taken["sums_s"][operation]
            self._sums_s[operation] = sum_s

    def requests(self, operation: str, status: int) -> int:
        return self._requests.get((operation, status), 0)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        lines = [
            "# HELP ochredb_requests_total Requests answered.",
            "# TYPE ochredb_requests_total counter",
        ]
        for (operation, status), count in sorted(self._requests.items()):
            labels = f'operation="{operation}",status="{status}"'
            lines.append(f"ochredb_requests_total{{{labels}}} {count}")
        name = "ochredb_request_duration_seconds"
        lines.append(f"# HELP {name} Time from the head of the request to the answer.")
        lines.append(f"# TYPE {name} histogram")
        for operation, buckets in sorted(self._buckets.items()):
            total = 0
            for bound, count in zip((*BOUNDS_S, "+Inf"), buckets, strict=True):
                total += count
                lines.append(f'{name}_bucket{{operation="{operation}",le="{bound}"}} {total}')
            lines.append(f'{name}_sum{{operation="{operation}"}} {self._sums_s[operation]:.6f}')
            lines.append(f'{name}_count{{operation="{operation}"}} {total}')
        for name, (kind, help_text, read) in sorted(self._read.items()):
            value = f"{name} {read():.15g}"
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", value]
        return ("\n".join(lines) + "\n").encode()
