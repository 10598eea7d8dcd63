"""Random damage to every kind of file: an error or the right answer, never a wrong one, never a
native crash, and `check` finds it (I9, I12).

OCHREDB_DAMAGE_CASES (default 200) mutilations are drawn from the seeds OCHREDB_DAMAGE_SEED (default
0) and following: a third of them of a store that was closed, a third of one whose last writer was
killed, and a third of the catalog of one that another process has open, writes to, and is killed.
"""

from __future__ import annotations

import collections
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from ochredb.integrity import check

from .mutilate import WAL, copy_store, kinds_of

ROOT = Path(__file__).resolve().parent.parent.parent
CASES = int(os.environ.get("OCHREDB_DAMAGE_CASES", "200"))
HOWS = ("closed", "killed", "open")
SEED = int(os.environ.get("OCHREDB_DAMAGE_SEED", "0"))

pytestmark = pytest.mark.timeout(300 + 2 * CASES)


def _run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, check=False, text=True,
        capture_output=True, env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip


def _store(folder: Path, how: str) -> str:
    path = str(folder / how)
    done = _run("tests.damage.stores", path, how)
    assert done.returncode == 0, done.stderr
    kinds = kinds_of(path)
    wanted = {"catalog", "deleted", "fragments", "graph", "index", "mark", "marker", "packed",
              "quarantine", "records", "seal", "store_id", "vectors"}  # fmt: skip
    assert wanted <= set(kinds), kinds
    assert (how == "killed") == os.path.exists(os.path.join(path, WAL))
    return path


def _cases(store: str, folder: Path, how: str, first: int, stop: int) -> list[dict[str, Any]]:
    """What became of the mutilations of these seeds, each in a process that may die of it."""
    answers, scratch = str(folder / "answers.json"), str(folder / "scratch")
    known = _run("tests.damage.known", store, str(folder / "whole"), answers)
    assert known.returncode == 0, known.stderr
    cases: list[dict[str, Any]] = []
    while first < stop:
        os.makedirs(scratch, exist_ok=True)
        done = _run("tests.damage.worker", store, scratch, answers, how, str(first), str(stop))
        begun = first
        for line in done.stdout.splitlines():
            if line.startswith("begin "):
                begun = int(line.split()[1])
            else:
                cases.append(orjson.loads(line))
        if done.returncode == 0:
            break
        assert done.returncode < 0, f"seed {begun}: {done.stderr[-4_000:]}"
        told = f"signal {-done.returncode}: {done.stderr[-1_000:]}"
        cases.append({"seed": begun, "crash": told})
        first = begun + 1
        shutil.rmtree(scratch)
    return cases


def _told(case: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in case.items() if name != "matters")


@pytest.mark.parametrize("how", HOWS)
def test_damage_is_an_error_or_healed_and_always_found(tmp_path: Path, how: str) -> None:
    store = _store(tmp_path, "closed" if how == "closed" else "killed")
    count = math.ceil(CASES / len(HOWS))
    first = SEED + HOWS.index(how) * count
    cases = _cases(store, tmp_path, how, first, first + count)
    crashes = [case for case in cases if "crash" in case]
    ran = [case for case in cases if "crash" not in case]
    wrong = [case for case in ran if case["wrong"]]
    missed = [case for case in ran if not case["found"] and case.get("matters", True)]
    harmless = sum(not case["found"] for case in ran) - len(missed)
    healed = sum(not case["errors"] and not case["wrong"] for case in ran)
    bugs = collections.Counter(text for case in ran for text in case["bugs"])
    print(
        f"\n{how}: {len(cases)} mutilations: {len(crashes)} crashes, {len(wrong)} with wrong"
        f" answers, {len(missed)} missed by check; {harmless} changed no row of the catalog, or"
        f" only what guards it; {healed} answered everything right"
    )  # Seen with pytest -s.
    for text, count in bugs.most_common(10):
        print(f"  unforeseen error, {count} times: {text}")
    assert len(cases) == count
    bad = {case["seed"]: _told(case) for case in [*crashes, *wrong, *missed]}
    assert not bad, "\n".join(["", *bad.values()][:40])


def test_the_whole_store_is_whole(tmp_path: Path) -> None:
    """Else the campaign would find nothing, or everything."""
    store = _store(tmp_path, "closed")
    copy = str(tmp_path / "copy")
    copy_store(store, copy)
    assert not check(copy).is_damaged
