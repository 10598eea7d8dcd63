"""What is skipped as NOT TESTED fails in CI; other skips stay skips. And so for partitions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SKIPS = """
import pytest

@pytest.fixture
def needs():
    pytest.skip("NOT TESTED: no right to mount")

def test_in_its_fixture(needs): ...

@pytest.mark.skipif(True, reason="NOT TESTED: no fork here")
def test_by_its_mark(): ...

def test_in_its_midst():
    pytest.skip("NOT TESTED: not to be had")

def test_that_is_legitimately_skipped():
    pytest.skip("KUBE_APISERVER does not name a kube-apiserver")

@pytest.mark.xfail(reason="NOT TESTED: as expected", strict=True)
def test_that_fails_as_expected():
    raise AssertionError
"""


def _environment(*, ci: bool) -> dict[str, str]:
    plain = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    plain.pop("CI", None)
    return plain | ({"CI": "true"} if ci else {})


def _counts(folder: Path, *options: str, ci: bool) -> dict[str, int]:
    """Of the tests above: how many ended how."""
    (folder / "test_skips.py").write_text(SKIPS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-c", os.devnull]
    command += ["-p", "no:cacheprovider", f"--rootdir={folder}", *options, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(ci=ci), capture_output=True, text=True, check=False
    )
    last = done.stdout.strip().splitlines()[-1]
    return {
        what: int(count) for count, what in re.findall(r"(\d+) (\w+)", last.partition(" in ")[0])
    }


def test_not_tested_is_a_failure_in_ci(tmp_path: Path) -> None:
    counts = _counts(tmp_path, ci=True)
    # One that was skipped in its fixture has not passed its set-up: that is an error.
    assert counts.get("failed", 0) + counts.get("errors", counts.get("error", 0)) == 3, counts
    assert (counts["skipped"], counts["xfailed"]) == (1, 1)


def test_elsewhere_it_is_a_skip(tmp_path: Path) -> None:
    assert _counts(tmp_path, ci=False) == {"skipped": 4, "xfailed": 1}


def test_a_plan_runs_nothing_and_misses_nothing(tmp_path: Path) -> None:
    assert "failed" not in _counts(tmp_path, "--setup-plan", ci=True)


@pytest.mark.parametrize("ci", [False, True])
def test_partitions_that_cannot_be_made_fail_in_ci(ci: bool, tmp_path: Path) -> None:
    """Where a tool is missing, as everything is here; without root it is told before."""
    script = ROOT / "tests" / "distributed" / "in_namespace.sh"
    for name in ("bash", "id"):
        found = next(Path(path, name) for path in os.get_exec_path() if Path(path, name).exists())
        (tmp_path / name).symlink_to(found)
    text = script.read_text().replace("export PATH=", "unused=")
    done = subprocess.run(
        ["bash", "-c", text, "in_namespace", "true"],
        env=_environment(ci=ci) | {"PATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "NOT TESTED: partitions between hosts" in done.stderr
    assert done.returncode == (1 if ci else 0)
