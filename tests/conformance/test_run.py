"""The runner of the official tests: what it counts, and what it calls a regression."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import run as conformance

API = "chromadb/test/test_api.py"


def write_events(path: Path, *events: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def collected(test: str) -> dict[str, object]:
    return {"event": "collected", "id": test}


def reported(test: str, outcome: str, when: str = "call") -> dict[str, object]:
    return {"event": "report", "id": test, "outcome": outcome, "when": when, "message": "why"}


def test_outcomes_are_read_from_the_events(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    names = [f"{API}::test_{letter}" for letter in "abcdef"]
    a, b, c, d, e, f = names
    write_events(
        results,
        *map(collected, names),
        *({"event": "start", "id": name} for name in (a, b, c, d, e)),
        reported(f"/some/where/{a}[single-region]", "passed"),
        reported(b, "failed"),
        reported(c, "failed", "setup"),
        reported(d, "passed"),
        reported(d, "failed", "teardown"),
    )
    found = conformance.read_results(results, "test_api.py", "killed")
    kinds = {test: outcome.kind for test, outcome in found.items()}
    assert kinds == {a: "passed", b: "failed", c: "error", d: "error", e: "error", f: "error"}
    assert "in the middle" in found[e].message
    assert "before it" in found[f].message
    assert conformance.counts(found) == "1 passed, 1 failed, 4 errors, 0 skipped"


def test_a_file_that_ran_nothing_is_an_error(tmp_path: Path) -> None:
    found = conformance.read_results(tmp_path / "absent", "test_api.py", 4)
    assert [outcome.kind for outcome in found.values()] == ["error"]
    assert conformance.read_results(tmp_path / "absent", "test_api.py", 5) == {}


def test_only_what_passed_before_can_regress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline_path = tmp_path / "baseline.txt"
    baseline_path.write_text(
        f"# mode=integration\npassed\t{API}::a\npassed\t{API}::b\nskipped\t{API}::c\n"
        "passed\tchromadb/test/test_other.py::d\n"
    )
    baseline = conformance.read_baseline(baseline_path)
    passed, failed = conformance.Outcome("passed"), conformance.Outcome("failed", "because")
    outcomes = {f"{API}::a": passed, f"{API}::b": failed, f"{API}::c": passed}
    worse = conformance.compare(outcomes, baseline, None)
    assert worse == [f"{API}::b", "chromadb/test/test_other.py::d"]
    assert conformance.compare(outcomes, baseline, ["test_api.py"]) == [f"{API}::b"]
    said = capsys.readouterr().out
    assert "REGRESSION chromadb/test/test_other.py::d missing" in said
    assert f"BETTER {API}::c baseline: skipped" in said


def test_the_committed_baseline_is_the_official_servers() -> None:
    baseline = conformance.read_baseline(conformance.HERE / "baseline.txt")
    kinds = list(baseline.values())
    assert (kinds.count("passed"), kinds.count("skipped"), len(kinds)) == (422, 134, 556)
