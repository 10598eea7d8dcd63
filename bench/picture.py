"""One SVG picture of a comparison: a bar per operation, the ratio on a logarithmic scale.

No drawing library: an SVG is text, and a result that is committed should differ only where the
figures do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

# The operations worth a bar: (group, metric) -> what to call it. Wall-clock figures only; the rest
# is in the table.
BARS = {
    ("ingest", "1 writer (auto): acked"): "write: 1 client, acknowledged",
    ("ingest", "4 writers (auto): acked"): "write: 4 clients, acknowledged",
    ("indexed", "1 writer: first request -> indexed"): "write: until indexed",
    ("query", "knn c=1 QPS"): "query: 1 client",
    ("query", "knn c=8 QPS"): "query: 8 clients",
    ("filter", "50% num<500 c=8 QPS"): "query, filter keeps 50 %",
    ("filter", "10% num<100 c=8 QPS"): "query, filter keeps 10 %",
    ("filter", "10% cat=c3 (clustered) c=8 QPS"): "query, 10 %, correlated",
    ("filter", "1% num<10 c=8 QPS"): "query, filter keeps 1 %",
    ("filter", "0.1% num=7 c=8 QPS"): "query, filter keeps 0.1 %",
    ("doc", "$contains 1% c=1 QPS"): "query, text in 1 %",
    ("doc", "$contains 0.1% c=1 QPS"): "query, text in 0.1 %",
    ("get", "10 ids c=8 QPS"): "get 10 ids: 8 clients",
    ("get", "where limit 100 c=1 QPS"): "get by filter, 100 records",
    ("get", "count c=1 QPS"): "count",
    ("mix", "60% upsert10 / 20% delete10 / 20% query, c=4"): "mixed: 4 clients",
    ("ryw", "single add ack p50"): "add one record, latency",
    ("many", "create + add 100"): "many small collections",
    ("footprint", "RSS end"): "memory at the end",
    ("footprint", "disk end"): "disk at the end",
}
WIDTH, LEFT, RIGHT = 860, 250, 130
TOP, ROW, BAR = 74, 26, 15
BETTER, WORSE, INK, PALE = "#b5651d", "#6f7f8f", "#2b2622", "#d9d3cb"


def draw(measured: Sequence[dict[str, Any]], title: str, labels: Sequence[str]) -> str:
    """Return the picture of the metrics of `peer_bench`, of the first dimension measured."""
    dim = measured[0]["dim"] if measured else None
    found = {(one["group"], one["metric"]): one for one in measured if one["dim"] == dim}
    rows = [
        (name, found[key])
        for key, name in BARS.items()
        if key in found and found[key]["ratio"] is not None
    ]
    low, high = bounds([one["ratio"] for _, one in rows])
    height = TOP + ROW * len(rows) + 40

    def x(ratio: float) -> float:
        share = (math.log10(ratio) - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="Helvetica, Arial, sans-serif" '
        f'font-size="13" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fffdf9"/>',
        text(20, 28, title, size=16, weight="bold"),
        text(20, 48, f"times better than {labels[1]}, {dim} dimensions, logarithmic", size=12),
    ]
    out += grid(low, high, x, height)
    for number, (name, one) in enumerate(rows):
        out += bar(TOP + ROW * number, name, one, x)
    out += [*line(x(1.0), TOP - 8, height - 30, INK, 1.5), "</svg>", ""]
    return "\n".join(out)


def bounds(ratios: Sequence[float]) -> tuple[int, int]:
    """Return whole powers of ten around all ratios and 1."""
    logs = [math.log10(ratio) for ratio in ratios] or [0.0]
    return min(-1, math.floor(min(logs))), max(1, math.ceil(max(logs)))


def text(x: float, y: float, words: str, *, size: int = 13, **attributes: str) -> str:
    names = {"anchor": "text-anchor", "weight": "font-weight", "fill": "fill"}
    more = "".join(f' {names[key]}="{value}"' for key, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}"{more}>{escape(words)}</text>'


def line(x: float, top: float, bottom: float, color: str, width: float) -> list[str]:
    return [
        f'<line x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" '
        f'stroke="{color}" stroke-width="{width}"/>'
    ]


def grid(low: int, high: int, x: Any, height: float) -> list[str]:
    out = []
    for power in range(low, high + 1):
        out += line(x(10.0**power), TOP - 8, height - 30, PALE, 1)
        out.append(text(x(10.0**power), height - 12, f"{10.0**power:g}x", size=12, anchor="middle"))
    return out


def bar(y: float, name: str, one: dict[str, Any], x: Any) -> list[str]:
    """Return a bar from 1 to the ratio, its name before it and the ratio behind it."""
    ratio = one["ratio"]
    start, end = sorted((x(1.0), x(ratio)))
    color = BETTER if ratio >= 1 else WORSE
    middle = y + BAR - 3
    return [
        text(LEFT - 12, middle, name, anchor="end"),
        f'<rect x="{start:.1f}" y="{y:.1f}" width="{max(end - start, 1):.1f}" height="{BAR}" '
        f'rx="2" fill="{color}"/>',
        text(max(end, x(1.0)) + 8, middle, f"{ratio:.3g}x", weight="bold", fill=color),
    ]
