"""Everything that is written from the JSON results: tables, pictures, the section of the README.

No figure is ever typed by hand: `bench/run.py --write-up-only` writes all of it anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from bars import figure, summary, verdict_table, verdicts
from peer_bench.report import table
from picture import draw
from sizes import RECORD_SIZES, SIZES, load_results

LABELS = ("OchreDB", "Chroma 1.5.9")
BEGIN = "<!-- speed: written by `bench/run.py --write-up-only` from bench/results/*.json -->"
END = "<!-- end of speed -->"

# What the README's table tells: (group, metric) -> name. The rest is behind its links.
PICKED = {
    ("indexed", "1 writer: first request -> last ack"): "records acknowledged, 1 writer",
    ("indexed", "4 writers: first request -> last ack"): "the same, 4 writers",
    ("indexed", "1 writer: first request -> indexed"): "records written and indexed, 1 writer",
    ("ryw", "single add ack p50"): "add one record, p50",
    ("query", "knn c=8 QPS"): "nearest 10, `ef_search` 100, 8 clients",
    ("query", "knn c=1 p50"): "the same, p50, 1 client",
    ("query", "knn recall@10 (c=8)"): "recall@10 of those",
    ("target", "knn c=8 QPS"): "nearest 10 as configured by default, 8 clients",
    ("target", "knn recall@10 (c=8)"): "recall@10 of those",
    ("filter", "50% num<500 c=8 QPS"): "filter that keeps 50 %, 8 clients",
    ("filter", "10% num<100 c=8 QPS"): "filter that keeps 10 %",
    ("filter", "1% num<10 c=8 QPS"): "filter that keeps 1 %",
    ("doc", "$contains 1% c=1 QPS"): "`$contains` that keeps 1 %, 1 client",
    ("get", "10 ids c=8 QPS"): "get 10 ids, 8 clients",
    ("get", "where limit 100 c=1 QPS"): "get by filter, limit 100, 1 client",
    ("mix", "60% upsert10 / 20% delete10 / 20% query, c=4"): "upsert, delete, query, 4 clients",
    ("under_ingest", "knn p99 under ingest"): "query p99 while 10,000 records/s are offered",
    ("cold", "start -> first query"): "process start to first answer",
    ("settle", "RSS settled"): "memory, 90 s after indexing",
    ("settle", "disk settled"): "disk, 90 s after indexing",
}


def write_up(name: str, results: Path) -> None:
    """Write the tables and the picture beside one JSON result."""
    result = orjson.loads((results / f"{name}.json").read_bytes())
    measured, labels = result["metrics"], list(result["versions"])
    lines = [f"# {name}: {' beside '.join(labels)}", "", circumstances(result), ""]
    if len(labels) == 2:
        lines += [f"![ratio per operation]({name}.svg)", ""]
        title = f"{labels[0]} beside {labels[1]}: {what(name, result)}, one machine"
        picture = draw([(name, measured)], title, labels)
        (results / f"{name}.svg").write_text(picture)
    if found := verdicts(name, measured):
        lines += ["## Bars", "", f"{summary(found)}.", "", verdict_table(found, labels), ""]
    for dim in result["dims"]:
        rows = [one for one in measured if one["dim"] == int(dim)]
        head = f"## All figures, {result['args']['n']} records of {dim} dimensions"
        lines += [head, "", table(rows, labels), ""]
    (results / f"{name}.md").write_text("\n".join(lines))


def what(name: str, result: Mapping[str, Any]) -> str:
    if name in SIZES:
        return SIZES[name].title
    return f"{result['args']['n']:,} × {' and '.join(result['dims'])}"


def circumstances(result: Mapping[str, Any]) -> str:
    """Return where and how a result came about."""
    before, after = result["load_before"][0], result["load_after"][0]
    machine = result.get("machine") or {}
    named = ", ".join(str(value) for value in machine.values())
    date = f", {result['date']}" if "date" in result else ""
    return (
        f"{result['args']['n']} records, one run{date}; slices alternate between the servers. "
        f"One machine: {result['cpus']} CPUs{f' ({named})' if named else ''}, load average "
        f"{before:.1f} before and {after:.1f} after, {result['wall_s']:.0f} s in all."
    )


def overview(results: Path) -> None:
    """Write results/ratios.svg and results/README.md from whichever sizes have results."""
    found = two_sided(results)
    sized = [name for name in RECORD_SIZES if name in found]
    if sized:
        title = f"{LABELS[0]} beside {LABELS[1]}, server against server"
        series = [(SIZES[name].title, found[name]["metrics"]) for name in sized]
        (results / "ratios.svg").write_text(draw(series, title, LABELS))
    lines = [
        "# Results",
        "",
        "Written by `bench/run.py`; how to read them: [../README.md](../README.md).",
    ]
    if sized:
        lines += ["", "![ratio per operation and size](ratios.svg)"]
    for name, result in found.items():
        judged = verdicts(name, result["metrics"])
        lines += ["", f"## [{SIZES[name].title}]({name}.md)", "", circumstances(result)]
        if judged:
            lines += ["", f"{summary(judged)}.", "", verdict_table(judged, LABELS)]
    (results / "README.md").write_text("\n".join(lines) + "\n")


def two_sided(results: Path) -> dict[str, dict[str, Any]]:
    """Return the results of the known sizes in which both servers took part."""
    return {k: v for k, v in load_results(results).items() if len(v["versions"]) == 2}


def section(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the README's figures, or "" when no size has results."""
    sized = [name for name in RECORD_SIZES if name in found]
    if not sized:
        return ""
    first = found[sized[0]]
    processor = (first.get("machine") or {}).get("processor", "")
    by_size = [
        {(one["group"], one["metric"]): one for one in found[name]["metrics"]} for name in sized
    ]
    lines = [
        f"{LABELS[0]} and {LABELS[1]}, server against server, alternating in one run per size on "
        f"one machine ({first['cpus']} CPUs{f', {processor}' if processor else ''}): documents of "
        "about 100 words, three metadata fields. Ratios hold; absolute figures are this machine's.",
        "",
        "![OchreDB beside Chroma: ratio per operation and size](bench/results/ratios.svg)",
        "",
        " | ".join([f"| {' / '.join(LABELS)} **ratio**", *(SIZES[name].title for name in sized)])
        + " |",
        "|---|" + "---:|" * len(sized),
    ]
    for key, name in PICKED.items():
        if any(key in metrics for metrics in by_size):
            cells = [cell(metrics.get(key)) for metrics in by_size]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += many_collections(found.get("many"))
    judged = [one for name in found for one in verdicts(name, found[name]["metrics"])]
    pages = ", ".join(f"[{SIZES[name].title}](bench/results/{name}.md)" for name in found)
    lines += [
        "",
        f"Of what we set out to reach, {summary(judged)}; which, and by how much the others fall "
        f"short: [bench/results](bench/results/README.md). All figures: {pages}.",
    ]
    return "\n".join(lines)


def many_collections(result: Mapping[str, Any] | None) -> list[str]:
    """Return a paragraph on many small collections in one server, where that was measured."""
    if result is None:
        return []
    many = {one["metric"]: one for one in result["metrics"] if one["group"] == "many"}
    ours, theirs = (
        f"{grouped(many['create + add 100'][key], '')} created per second, "
        f"{grouped(many['RSS highest'][key], 'MB')} of memory, first query to one of them "
        f"{figure(many['first query p50'][key], 'ms')}"
        for key in "AB"
    )
    own, other = (f"{many['collections'][key]:,.0f}" for key in "AB")
    return [
        "",
        f"Collections of 100 records in one server: {LABELS[0]} with {own}: {ours}; {LABELS[1]} "
        f"with {other}: {theirs}.",
    ]


def cell(one: Mapping[str, Any] | None) -> str:
    """Return both figures and the ratio; for recall, where higher by itself is no aim, no ratio."""
    if one is None:
        return "-"
    unit = one["unit"]
    pair = f"{grouped(one['A'], '')} / {grouped(one['B'], unit)}"
    if one["ratio"] is None or one["better"] == "eq":
        return pair
    ratio = one["ratio"]
    return f"{pair} **{ratio:.0f}×**" if ratio >= 20 else f"{pair} **{ratio:.2g}×**"


def grouped(value: float | None, unit: str) -> str:
    """Return a figure with thousands separated."""
    if value is not None and value >= 100:
        return f"{value:,.0f} {unit}".rstrip()
    return figure(value, unit)


def fill_section(readme: Path, results: Path) -> bool:
    """Write the figures between the markers of the README; return whether there were any.

    Raises ValueError when the markers are not there.
    """
    words = section(two_sided(results))
    if not words:
        return False
    whole = readme.read_text()
    head, begin, rest = whole.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} lacks the lines {BEGIN!r} and {END!r}")
    readme.write_text(f"{head}{BEGIN}\n{words}\n{END}{tail}")
    return True


def write_everything(results: Path, readme: Path | None, names: Sequence[str] = ()) -> None:
    """Write all that follows from the JSON results; `names` are results of no known size."""
    for name in dict.fromkeys([*names, *load_results(results)]):
        write_up(name, results)
    overview(results)
    if readme:
        fill_section(readme, results)
