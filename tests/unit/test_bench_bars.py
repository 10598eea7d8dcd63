"""The benchmark's verdicts, pictures and pages: a missed bar must be seen, on every page."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import bars
import orjson
import picture
import pytest
import writeup
from bars import LEAST, MOST, NOT_BELOW, RATIO, SHARE, Bar, judge
from peer_bench import __main__ as peer_bench_main
from sizes import FULL, RECORD_SIZES, SIZES


def metric(
    ours: float | None,
    theirs: float | None,
    ratio: float | None = None,
    *,
    group: str = "g",
    name: str = "m",
    unit: str = "ms",
) -> dict[str, Any]:
    figures = {"A": ours, "B": theirs, "ratio": ratio, "n": None}
    return {"dim": 128, "group": group, "metric": name, "unit": unit, "better": "high", **figures}


@pytest.mark.parametrize(
    ("kind", "wanted", "one", "said"),
    [
        (RATIO, 4.0, metric(8.0, 2.0, 4.0), "holds"),
        (RATIO, 4.0, metric(6.0, 2.0, 3.0), "**short by 25 %**"),
        (RATIO, 4.0, metric(6.0, None), "not measured"),
        (SHARE, 0.5, metric(1.0, 2.0, 2.0), "holds"),
        (SHARE, 0.5, metric(1.2, 2.0, 1.67), "**over by 20 %**"),
        (SHARE, 0.5, metric(1.2, 0.0), "not measured"),
        (LEAST, 0.99, metric(0.99, 0.5), "holds"),
        (LEAST, 0.99, metric(0.891, 0.5), "**short by 10 %**"),
        (MOST, 5.0, metric(5.0, None), "holds"),
        (MOST, 5.0, metric(6.0, None), "**over by 20 %**"),
        (MOST, 5.0, metric(15.0, None), "**over: 3 times**"),
        (MOST, 0.0, metric(0.0, None), "holds"),
        (MOST, 0.0, metric(3.0, None), "**over**"),
        (NOT_BELOW, 0.0, metric(0.97, 0.96), "holds"),
        (NOT_BELOW, 0.0, metric(0.9, 1.0), "**short by 10 %**"),
        (NOT_BELOW, 0.0, metric(0.9, None), "not measured"),
    ],
)
def test_a_verdict_says_what_was_missed_and_by_how_much(
    kind: str, wanted: float, one: dict[str, Any], said: str
) -> None:
    assert judge(Bar("bar", "g", "m", kind, wanted), {("g", "m"): one}).said() == said


def test_a_metric_that_is_not_there_is_no_success() -> None:
    found = judge(Bar("bar", "g", "m", MOST, 5.0), {})
    assert found.said() == "not measured"
    assert bars.summary([found]) == "0 of 0 bars hold, 1 not measured"


def test_our_own_recall_is_judged_over_all_queries_that_we_answered() -> None:
    both, every = metric(1.0, 1.0), metric(0.9, 1.0)
    measured = {("g", "m"): both, ("g", "m, all asked"): every}
    assert judge(Bar("bar", "g", "m", LEAST, 0.99), measured).measured == 0.9
    assert judge(Bar("bar", "g", "m", NOT_BELOW), measured).measured == 1.0


def test_every_size_has_its_bars_and_every_full_one_is_known() -> None:
    assert set(FULL) == set(bars.BARS)
    assert set(FULL) <= set(SIZES)
    for name in RECORD_SIZES:
        kinds = {bar.kind for bar in bars.BARS[name]}
        assert kinds == {RATIO, SHARE, LEAST, MOST, NOT_BELOW}
        keys = [(bar.group, bar.metric, bar.kind) for bar in bars.BARS[name]]
        assert len(keys) == len(set(keys))


def test_every_size_measures_what_its_bars_are_about() -> None:
    p = peer_bench_main.parser()
    for name, size in SIZES.items():
        options = p.parse_args(["--a", "http://127.0.0.1:1", *size.arguments])
        phases = peer_bench_main.chosen(p, options)
        phases |= {"cold"} if size.cold else set()
        assert {bar.group for bar in bars.BARS.get(name, ())} <= phases


def test_the_table_shows_a_missed_bar() -> None:
    one = metric(6.0, 2.0, 3.0, group="get", name="count c=1 QPS", unit="/s")
    found = bars.verdicts("20k-128", [one])
    text = bars.verdict_table(found, ["ours", "theirs"])
    assert "| count | ≥ 4× | 3.000× | 6.000 /s | 2.000 /s | **short by 25 %** |" in text
    assert len(text.splitlines()) == len(bars.BARS["20k-128"]) + 2
    assert bars.summary(found).startswith("0 of 1 bars hold")
    assert bars.verdicts("quick", [one]) == []


def series_of(*ratios: float | None) -> list[dict[str, Any]]:
    return [
        metric(1.0, 1.0, ratio, group=group, name=name)
        for (group, name), ratio in zip(picture.BARS, ratios, strict=False)
    ]


def drawn(root: ElementTree.Element, color: str) -> int:
    """Return how many bars have this colour; the legend's squares are lower."""
    return sum(node.get("fill") == color for node in root.iter() if node.tag.endswith("rect"))


def test_the_picture_of_one_size_has_a_bar_per_operation() -> None:
    series = [("20k", series_of(0.2, 1.0, 12.5, None))]
    root = ElementTree.fromstring(picture.draw(series, "a & b", ["ours", "theirs"]))
    assert (drawn(root, picture.WORSE), drawn(root, picture.BETTER)) == (1, 2)
    words = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert {"a & b", "0.2×", "1×", "12×"} <= set(words)


def test_the_picture_of_several_sizes_has_a_bar_of_each() -> None:
    series = [("small", series_of(2.0, 3.0)), ("large", series_of(4.0, None, 250.0))]
    root = ElementTree.fromstring(picture.draw(series, "title", ["ours", "theirs"]))
    assert [drawn(root, color) for color in picture.SIZES[:3]] == [3, 3, 0]  # With the legend.
    words = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert {"small", "large", "250×"} <= set(words)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results of one size, of which one bar holds and one does not."""
    measured = [
        metric(6.0, 2.0, 3.0, group="get", name="count c=1 QPS", unit="/s"),
        metric(1200.0, 2.0, 600.0, group="query", name="knn c=8 QPS", unit="/s"),
    ]
    result = {
        "args": {"n": 20000},
        "cpus": 2,
        "load_before": [0.1],
        "load_after": [1.0],
        "wall_s": 60.0,
        "dims": {"128": {}},
        "versions": dict.fromkeys(writeup.LABELS, "1"),
        "metrics": measured,
    }
    (tmp_path / "20k-128.json").write_bytes(orjson.dumps(result))
    return tmp_path


def test_all_pages_are_written_from_the_results(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "project.md"
    readme.write_text(f"before\n{writeup.BEGIN}\nold figures\n{writeup.END}\nafter\n")
    writeup.write_everything(results, readme)
    for page in ("20k-128.md", "README.md"):
        words = (results / page).read_text()
        assert "**short by 25 %**" in words
        assert "1 of 2 bars hold" in words
    told = readme.read_text()
    assert told.startswith(f"before\n{writeup.BEGIN}\n")
    assert told.endswith(f"\n{writeup.END}\nafter\n")
    assert "old figures" not in told
    assert "| 1,200 / 2.000 /s **600×** |" in told
    writeup.write_everything(results, readme)
    assert readme.read_text() == told
    for name in ("ratios.svg", "20k-128.svg"):
        ElementTree.fromstring((results / name).read_text())


def test_a_readme_without_the_markers_is_left_alone(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "project.md"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="lacks"):
        writeup.fill_section(readme, results)
    assert readme.read_text() == "no markers"


def test_the_projects_readme_has_the_markers() -> None:
    words = (Path(writeup.__file__).parent.parent / "README.md").read_text()
    assert words.count(writeup.BEGIN) == words.count(writeup.END) == 1
