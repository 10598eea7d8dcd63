"""What we want to reach, per size, and the verdict on what was measured.

A bar that is missed is no error of the benchmark: the table says how far off it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peer_bench.report import shown

Metrics = Mapping[tuple[str, str], dict[str, Any]]

# How a bar reads a metric. RATIO: times better than the official server, at least. SHARE: of the
# official server's figure, at most. LEAST, MOST: our own figure. NOT_BELOW: not below theirs.
RATIO, SHARE, LEAST, MOST, NOT_BELOW = "ratio", "share", "least", "most", "not_below"

FILTERS = {
    "50 %": "50% num<500",
    "10 %": "10% num<100",
    "10 %, clustered": "10% cat=c3 (clustered)",
    "5 %, clustered": "5% cat=c3 and num<500",
    "1 %": "1% num<10",
    "0.1 %": "0.1% num=7",
}
# The log refuses writes above this many rows that are not yet in parts.
TAIL_ROWS_MAX = 200_000


@dataclasses.dataclass(frozen=True)
class Bar:
    """One thing wanted of one metric. `wanted` is in the metric's unit, or a ratio or share."""

    name: str
    group: str
    metric: str
    kind: str
    wanted: float = 0.0

    def said(self, unit: str) -> str:
        """Return what is wanted, for a table."""
        own = f"{self.wanted:,g} {unit}".rstrip()
        signs = {RATIO: f"≥ {self.wanted:g}×", SHARE: f"≤ {self.wanted:g} of theirs"}
        signs |= {LEAST: f"≥ {own}", MOST: f"≤ {own}"}
        return signs.get(self.kind, "≥ theirs")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """measured: the figure that the bar is about; None when there is none. short: 0 when the bar
    holds, else the share by which the figure misses it."""

    bar: Bar
    measured: float | None
    ours: float | None
    theirs: float | None
    unit: str
    short: float

    @property
    def known(self) -> bool:
        return self.measured is not None

    def said(self) -> str:
        """Return "holds", "short by 12 %", "over by 12 %", "over: 3 times" or "not measured"."""
        if not self.known:
            return "not measured"
        if not self.short:
            return "holds"
        over = self.bar.kind in (SHARE, MOST)
        if self.short >= 1:
            return "**over**" if math.isinf(self.short) else f"**over: {1 + self.short:.3g} times**"
        return f"**{'over' if over else 'short'} by {100 * self.short:.2g} %**"

    def measured_said(self) -> str:
        if self.measured is None:
            return "-"
        unit = f" {self.unit}" if self.unit else ""
        if self.bar.kind == RATIO:
            return f"{shown(self.measured)}×"
        if self.bar.kind == SHARE:
            return f"{shown(self.measured)} of theirs"
        if self.bar.kind == NOT_BELOW:
            return f"{shown(self.measured)}, theirs {shown(self.theirs)}"
        return f"{shown(self.measured)}{unit}"


def judge(bar: Bar, metrics: Metrics) -> Verdict:
    """Return how the measured figure stands to the bar."""
    one = metrics.get((bar.group, bar.metric))
    if bar.kind == LEAST:  # Of our own figure alone, so over all that we were asked.
        one = metrics.get((bar.group, f"{bar.metric}, all asked"), one)
    ours, theirs = (one["A"], one["B"]) if one else (None, None)
    measured, wanted = ours, bar.wanted
    if bar.kind == RATIO:
        measured = one["ratio"] if one else None
    elif bar.kind == SHARE:
        measured = ours / theirs if ours is not None and theirs else None
    elif bar.kind == NOT_BELOW:
        measured, wanted = (ours, theirs) if theirs is not None else (None, 0.0)
    short = 0.0
    if measured is not None:
        if bar.kind in (SHARE, MOST):
            if measured > wanted:
                short = measured / wanted - 1 if wanted else math.inf
        elif measured < wanted:
            short = 1 - measured / wanted
    return Verdict(bar, measured, ours, theirs, one["unit"] if one else "", short)


def verdicts(name: str, measured: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Return the verdicts on all bars of the size of this name; none for other names."""
    metrics = {(one["group"], one["metric"]): one for one in measured}
    return [judge(bar, metrics) for bar in BARS.get(name, ())]


def verdict_table(found: Sequence[Verdict], labels: Sequence[str]) -> str:
    """Return a markdown table."""
    out = [
        f"| bar | wanted | measured | {labels[0]} | {labels[1]} | verdict |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for one in found:
        pair = " | ".join(figure(value, one.unit) for value in (one.ours, one.theirs))
        cells = f"{one.bar.name} | {one.bar.said(one.unit)} | {one.measured_said()} | {pair}"
        out.append(f"| {cells} | {one.said()} |")
    return "\n".join(out)


def figure(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{shown(value)} {unit}".rstrip()


def summary(found: Sequence[Verdict]) -> str:
    """Return one line: how many bars hold."""
    known = [one for one in found if one.known]
    missing = len(found) - len(known)
    held = sum(not one.short for one in known)
    return f"{held} of {len(known)} bars hold" + (f", {missing} not measured" if missing else "")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The ratios of one size, in the order in which people ask for them. None: no bar."""

    acked: float
    acked_4: float | None
    indexed: float
    knn: tuple[float, float]  # QPS with 8 clients, p50 with 1.
    target: tuple[float, float] | None
    spaces: float | None
    filters: tuple[float, float, float, float]  # 50, 10, 1, 0.1 %.
    filter_recall: float | None
    contains: float
    gets: tuple[float, float, float]  # 10 ids, by filter, count.
    mix: float | None
    single_add: float
    disk: float
    memory: tuple[float, float]  # Anonymous, total.
    cold: float | None


def bars_of(wanted: Wanted) -> Iterator[Bar]:
    """Yield the bars of one size."""
    yield from ingest_bars(wanted)
    yield Bar("knn, queries/s, 8 clients", "query", "knn c=8 QPS", RATIO, wanted.knn[0])
    yield Bar("knn, p50, 1 client", "query", "knn c=1 p50", RATIO, wanted.knn[1])
    yield Bar("recall of that", "query", "knn recall@10 (c=8)", NOT_BELOW)
    if wanted.target:
        name = "knn at the default target recall"
        rate, p50 = wanted.target
        yield Bar(f"{name}, queries/s, 8 clients", "target", "knn c=8 QPS", RATIO, rate)
        yield Bar(f"{name}, p50, 1 client", "target", "knn c=1 p50", RATIO, p50)
    yield Bar("default target recall", "target", "knn recall@10 (c=8)", LEAST, 0.95)
    if wanted.spaces:
        for space in ("cosine", "ip"):
            metric = f"{space} knn c=8 QPS"
            yield Bar(f"{space}, queries/s, 8 clients", "spaces", metric, RATIO, wanted.spaces)
            yield Bar("recall of that", "spaces", f"{space} knn recall@10", NOT_BELOW)
    yield from filter_bars(wanted)
    ids, where, count = wanted.gets
    yield Bar("get 10 ids, 8 clients", "get", "10 ids c=8 QPS", RATIO, ids)
    yield Bar("get where, limit 100", "get", "where limit 100 c=1 QPS", RATIO, where)
    yield Bar("count", "get", "count c=1 QPS", RATIO, count)
    if wanted.mix:
        metric = "60% upsert10 / 20% delete10 / 20% query, c=4"
        yield Bar("mixed upsert/delete/query, 4 clients", "mix", metric, RATIO, wanted.mix)
    yield Bar("single add, acknowledged p50", "ryw", "single add ack p50", RATIO, wanted.single_add)
    yield Bar("stale answers after a write", "ryw", "stale answers", MOST, 0)
    yield Bar("disk 90 s after indexing", "settle", "disk settled", SHARE, wanted.disk)
    anonymous, total = wanted.memory
    yield Bar("anonymous memory then", "settle", "RssAnon settled", SHARE, anonymous)
    yield Bar("resident memory then", "settle", "RSS settled", SHARE, total)
    if wanted.cold:
        metric = "start -> first query"
        yield Bar("cold start to first answer", "cold", metric, SHARE, wanted.cold)


def ingest_bars(wanted: Wanted) -> Iterator[Bar]:
    for name, ratio in (("1 writer", wanted.acked), ("4 writers", wanted.acked_4)):
        if ratio is None:
            continue
        metric = f"{name}: first request -> last ack"
        yield Bar(f"ingest acknowledged, {name}", "indexed", metric, RATIO, ratio)
        yield Bar(f"429 answers, {name}", "indexed", f"{name}: 429 answers", MOST, 0)
        metric = f"{name}: most records not indexed"
        yield Bar(f"most records waiting, {name}", "indexed", metric, MOST, TAIL_ROWS_MAX)
    metric = "1 writer: first request -> indexed"
    yield Bar("ingest until indexed", "indexed", metric, RATIO, wanted.indexed)
    metric = "graph insertions per stored row"
    yield Bar("graph insertions per row", "indexed", metric, MOST, 1.6)


def filter_bars(wanted: Wanted) -> Iterator[Bar]:
    for name, ratio in zip(("50 %", "10 %", "1 %", "0.1 %"), wanted.filters, strict=True):
        metric = f"{FILTERS[name]} c=8 QPS"
        yield Bar(f"filter {name}, queries/s, 8 clients", "filter", metric, RATIO, ratio)
    contains = "$contains 1%"
    yield Bar("`$contains` 1 %, queries/s", "doc", f"{contains} c=1 QPS", RATIO, wanted.contains)
    for name, case in FILTERS.items():
        metric = f"{case} recall@10"
        yield Bar(f"recall, filter {name}, same queries", "filter", metric, NOT_BELOW)
        if wanted.filter_recall:
            yield Bar(f"recall, filter {name}", "filter", metric, LEAST, wanted.filter_recall)
    yield Bar("recall, `$contains` 1 %", "doc", f"{contains} recall@10", NOT_BELOW)


SMALL_CPU = (
    Bar("server CPU per knn", "query", "knn c=8 server CPU", MOST, 0.35),
    Bar("server CPU per get of 10 ids", "get", "10 ids c=8 server CPU", MOST, 0.25),
    Bar("add of 250, idle machine, acknowledged p50", "ryw", "add of 250 ack p50", MOST, 4.0),
)
UNDER_INGEST = (
    Bar("knn p99 under ingest", "under_ingest", "knn p99 under ingest", MOST, 5.0),
    Bar("knn p99 under ingest, beside theirs", "under_ingest", "knn p99 under ingest", SHARE, 0.5),
)
MANY = (
    Bar("5,000 collections: resident memory", "many", "RSS highest", MOST, 600.0),
    Bar("5,000 collections: slowest first query", "many", "first query max", MOST, 20.0),
    Bar("collections created per second", "many", "create + add 100", RATIO, 20.0),
    Bar("first queries that find their record", "many", "first query finds its record", LEAST, 1.0),
)

BARS: dict[str, tuple[Bar, ...]] = {
    "20k-128": (
        *bars_of(
            Wanted(
                acked=15,
                acked_4=15,
                indexed=4,
                knn=(5, 4),
                target=None,
                spaces=5,
                filters=(20, 25, 15, 15),
                filter_recall=None,
                contains=25,
                gets=(3, 30, 4),
                mix=30,
                single_add=3,
                disk=0.6,
                memory=(0.9, 1.0),
                cold=None,
            )
        ),
        *SMALL_CPU,
        *UNDER_INGEST,
    ),
    "20k-768": tuple(
        bars_of(
            Wanted(
                acked=8,
                acked_4=8,
                indexed=2.5,
                knn=(3.5, 3),
                target=None,
                spaces=3.5,
                filters=(15, 15, 15, 15),
                filter_recall=None,
                contains=20,
                gets=(3, 30, 4),
                mix=20,
                single_add=3,
                disk=0.8,
                memory=(0.9, 1.0),
                cold=None,
            )
        )
    ),
    "100k-128": tuple(
        bars_of(
            Wanted(
                acked=20,
                acked_4=None,
                indexed=4,
                knn=(4, 3),
                target=(2, 1.5),
                spaces=None,
                filters=(60, 60, 40, 60),
                filter_recall=0.99,
                contains=60,
                gets=(3, 100, 15),
                mix=None,
                single_add=3,
                disk=0.5,
                memory=(0.7, 1.0),
                cold=0.6,
            )
        )
    ),
    "many": MANY,
}
