"""Rows of measurements as flat objects and as a markdown table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One metric of all servers. better: high, low or eq. n: least samples behind the value."""

    group: str
    metric: str
    unit: str
    better: str
    values: dict[str, float]
    n: int | None = None


def shown(value: float | None) -> str:
    """Return a number with about four significant digits; "-" when there is none."""
    if value is None or math.isnan(value):
        return "-"
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 10 else 3
    return f"{value:.{digits}f}"


def metrics(rows: Sequence[Row], labels: list[str], dim: int | None) -> list[dict[str, Any]]:
    """Return one flat object per row, under A and B whatever the labels are; null: not measured.

    The ratio is above 1 when A is better.
    """
    out = []
    for row in rows:
        pair = [row.values.get(label) for label in [*labels, ""][:2]]
        a, b = (None if value is None or math.isnan(value) else value for value in pair)
        ratio = None
        if a and b:
            ratio = round(b / a if row.better == "low" else a / b, 4)
        out.append(
            {
                "dim": dim,
                "group": row.group,
                "metric": row.metric,
                "unit": row.unit,
                "better": row.better,
                "n": row.n,
                "A": a,
                "B": b,
                "ratio": ratio,
            }
        )
    return out


def table(measured: Sequence[dict[str, Any]], labels: list[str]) -> str:
    """Return the metrics as a markdown table."""
    two = len(labels) == 2
    heads = ["group", "metric", "unit", *labels, *([f"{labels[0]} better by"] if two else [])]
    out = ["| " + " | ".join(heads) + " |", "|---|---|---|" + "---:|" * (len(heads) - 3)]
    for one in measured:
        cells = [shown(one[key]) for key in "AB"[: len(labels)]]
        if two:
            cells.append("-" if one["ratio"] is None else f"{one['ratio']:.2f}x")
        unit = one["unit"] or (f"n>={one['n']}" if one["n"] else "")
        out.append(f"| {one['group']} | {one['metric']} | {unit} | " + " | ".join(cells) + " |")
    return "\n".join(out)
