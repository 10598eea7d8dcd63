"""SVG pictures of a comparison: the ratio per operation, a bar per size, on a logarithmic scale.

No drawing library: an SVG is text, and a result that is committed should differ only where the
figures do. It brings its own background, so that it reads the same on light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

Key = tuple[str, str]
Series = Sequence[tuple[str, Sequence[dict[str, Any]]]]  # Name of a size, its metrics.

# The operations worth a bar: (group, metric) -> what to call it. Wall-clock figures only; the rest
# is in the tables.
BARS: dict[Key, str] = {
    ("ingest", "1 writer (auto): acked"): "write: 1 client, in slices",
    ("ingest", "4 writers (auto): acked"): "write: 4 clients, in slices",
    ("indexed", "1 writer: first request -> last ack"): "write: 1 client",
    ("indexed", "4 writers: first request -> last ack"): "write: 4 clients",
    ("indexed", "1 writer: first request -> indexed"): "write, until all is indexed",
    ("ryw", "single add ack p50"): "add one record, p50",
    ("query", "knn c=1 p50"): "query: 1 client, p50",
    ("query", "knn c=8 QPS"): "query: 8 clients",
    ("target", "knn c=8 QPS"): "query at recall 0.95: 8 clients",
    ("spaces", "cosine knn c=8 QPS"): "query by cosine: 8 clients",
    ("spaces", "ip knn c=8 QPS"): "query by inner product: 8 clients",
    ("filter", "50% num<500 c=8 QPS"): "query, filter keeps 50 %",
    ("filter", "10% num<100 c=8 QPS"): "query, filter keeps 10 %",
    ("filter", "10% cat=c3 (clustered) c=8 QPS"): "query, 10 %, clustered",
    ("filter", "1% num<10 c=8 QPS"): "query, filter keeps 1 %",
    ("filter", "0.1% num=7 c=8 QPS"): "query, filter keeps 0.1 %",
    ("doc", "$contains 1% c=1 QPS"): "query, text in 1 %",
    ("get", "10 ids c=8 QPS"): "get 10 ids: 8 clients",
    ("get", "where limit 100 c=1 QPS"): "get by filter, 100 records",
    ("get", "count c=1 QPS"): "count",
    ("mix", "60% upsert10 / 20% delete10 / 20% query, c=4"): "upsert, delete, query: 4 clients",
    ("many", "create + add 100"): "create a small collection",
    ("many", "first query p50"): "first query to one of many",
    ("cold", "start -> first query"): "start to first answer",
    ("settle", "RSS settled"): "memory after indexing",
    ("settle", "disk settled"): "disk after indexing",
}
WIDTH, LEFT, RIGHT, TOP = 860, 236, 76, 88
GAP = 8  # Between operations.
BETTER, WORSE, INK, PALE, PAPER = "#b5651d", "#6f7f8f", "#2b2622", "#d9d3cb", "#fffdf9"
SIZES = ("#e0a458", "#b5651d", "#6b3410", "#6f7f8f")  # One per size, light to dark.


def draw(series: Series, title: str, labels: Sequence[str]) -> str:
    """Return the picture of the metrics of `peer_bench`, of as many sizes as there are colours.

    With one size the colour says which server is better; with several it says which size.
    """
    found = [by_key(measured) for _, measured in series[: len(SIZES)]]
    rows = [(name, [one.get(key) for one in found]) for key, name in BARS.items()]
    rows = [(name, ratios) for name, ratios in rows if any(ratios)]
    low, high = bounds([ratio for _, ratios in rows for ratio in ratios if ratio])
    thick = 15 if len(found) == 1 else 11
    height = TOP + sum(row_height(ratios, thick) for _, ratios in rows) + 34

    def x(ratio: float) -> float:
        share = (math.log10(ratio) - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="Helvetica, Arial, sans-serif" '
        f'font-size="13" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="{PAPER}"/>',
        text(20, 28, title, size=16, weight="bold"),
        text(20, 48, f"times better than {labels[1]}, logarithmic", size=12),
        *grid(low, high, x, height),
    ]
    if len(found) > 1:
        out += legend([name for name, _ in series])
    y = TOP
    for name, ratios in rows:
        colors = SIZES if len(found) > 1 else (None,)
        present = [(r, color) for r, color in zip(ratios, colors, strict=False) if r]
        middle = y + thick * len(present) / 2 + 4.5
        out.append(text(LEFT - 12, middle, name, anchor="end"))
        for number, (ratio, color) in enumerate(present):
            out += bar(y + number * thick, thick, ratio, color, x)
        y += row_height(ratios, thick)
    out += [line(x(1.0), TOP - 8, height - 28, INK, 1.5), "</svg>", ""]
    return "\n".join(out)


def by_key(measured: Sequence[dict[str, Any]]) -> dict[Key, float]:
    """Return the ratios of the first dimension measured, where there are any."""
    dim = measured[0]["dim"] if measured else None
    return {
        (one["group"], one["metric"]): one["ratio"]
        for one in measured
        if one["dim"] == dim and one["ratio"] is not None
    }


def row_height(ratios: Sequence[float | None], thick: int) -> int:
    return thick * sum(1 for ratio in ratios if ratio) + GAP + (3 if len(ratios) == 1 else 0)


def bounds(ratios: Sequence[float]) -> tuple[float, float]:
    """Return logarithms around all ratios and 1, with room for a figure at either end."""
    logs = [math.log10(ratio) for ratio in ratios] or [0.0]
    return min(-0.35, min(logs) - 0.1), max(1.0, max(logs) + 0.05)


def text(x: float, y: float, words: str, *, size: int = 13, **attributes: str) -> str:
    names = {"anchor": "text-anchor", "weight": "font-weight", "fill": "fill"}
    more = "".join(f' {names[key]}="{value}"' for key, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}"{more}>{escape(words)}</text>'


def line(x: float, top: float, bottom: float, color: str, width: float) -> str:
    return (
        f'<line x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" '
        f'stroke="{color}" stroke-width="{width}"/>'
    )


def grid(low: float, high: float, x: Callable[[float], float], height: float) -> list[str]:
    """Return lines at 1, 3, 10, 30, ... as far as the scale goes, with their names below."""
    out = []
    for power in range(math.floor(low), math.ceil(high) + 1):
        for first in (1, 3):
            value = first * 10.0**power
            if low <= math.log10(value) <= high:
                out.append(line(x(value), TOP - 8, height - 28, PALE, 1 if first == 1 else 0.5))
                out.append(text(x(value), height - 11, f"{value:g}×", size=12, anchor="middle"))
    return out


def legend(names: Sequence[str]) -> list[str]:
    out, x = [], 20.0
    for name, color in zip(names, SIZES, strict=False):
        out.append(f'<rect x="{x:.1f}" y="58" width="14" height="11" fill="{color}"/>')
        out.append(text(x + 20, 68, name, size=12))
        x += 44 + 7 * len(name)
    return out


def bar(
    y: float, thick: int, ratio: float, color: str | None, x: Callable[[float], float]
) -> list[str]:
    """Return a bar from 1 to the ratio, and the ratio behind it."""
    start, end = sorted((x(1.0), x(ratio)))
    color = color or (BETTER if ratio >= 1 else WORSE)
    said = f"{ratio:.0f}×" if ratio >= 100 else f"{ratio:.2g}×"
    return [
        f'<rect x="{start:.1f}" y="{y:.1f}" width="{max(end - start, 1):.1f}" '
        f'height="{thick - 1}" fill="{color}"/>',
        text(end + 5, y + thick / 2 + 3.5, said, size=min(12, thick), weight="bold"),
    ]
