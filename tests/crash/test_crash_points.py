"""A process is killed at every crash point, in every role; a fresh one then checks I1 to I8.

Each case is two crashes. One by kill -9 at the point, which loses nothing that was written; and,
where the recorder runs, one by power loss at the same moment: from what it noted a second tree is
made, with only what had been synced by then. Both are checked (`points/aftermath.py`).

A point is a case at its first hit in each scenario that reaches it, and at a later one, in the
middle of the run. `make crash-long` (OCHREDB_CRASH_HITS=all) takes every hit of every scenario.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ochredb.crash_points import VARIABLE, every_point
from ochredb.testing.server_process import ONE_THREAD, free_port

from .harness import GONE, Client
from .nursery import Nursery
from .points.journal import Journal
from .points.plants import PLANTS
from .points.scenarios import (
    CLOSE,
    ELSEWHERE,
    PROBE,
    SCENARIOS,
    SEAL,
    SERVER_POINTS,
    SERVER_REQUESTS,
)
from .powerloss import PowerLoss, build_library, read_log

ROOT = Path(__file__).resolve().parents[2]
EVERY_HIT = os.environ.get("OCHREDB_CRASH_HITS") == "all"
SERVER = "from ochredb_node.cli import main; raise SystemExit(main())"


def cases() -> Iterator[tuple[str, str, str]]:
    """(scenario, point, which hit): the later one for the first scenario that has it only."""
    seen: set[str] = set()
    for name, scenario in SCENARIOS.items():
        for point in scenario.points:
            yield name, point, "first"
            if EVERY_HIT or point not in seen:
                seen.add(point)
                yield name, point, "later"


def environment(**more: str) -> dict[str, str]:
    """This process's, without a crash point of its own."""
    inherited = {name: text for name, text in os.environ.items() if name != VARIABLE}
    return {**inherited, **ONE_THREAD, **more}


@dataclass(frozen=True)
class Prepared:
    """A scenario's tree and journal before its run, and how often the run reaches each point."""

    folder: Path
    hits: dict[str, int]


class Workshop:
    """What the cases of one test process share; made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prepared: dict[str, Prepared] = {}
        self._nursery: Nursery | None = None
        self._checker: subprocess.Popen[str] | None = None
        self._recorder = build_library(folder) if sys.platform.startswith("linux") else None

    def act(
        self,
        stage: str,
        name: str,
        folder: Path,
        *bugs: str,
        point: str = "",
        loss: PowerLoss | None = None,
    ) -> tuple[int, str]:
        """Have a process do a stage of a scenario; its exit code, and what it said."""
        if self._nursery is None:
            recorder = {"LD_PRELOAD": str(self._recorder)} if self._recorder else {}
            log = str(self._folder / "nursery.log")
            self._nursery = Nursery("tests.crash.points.worker", log, environment(**recorder))
        said = folder.with_suffix(".log")
        answer = self._nursery.ask(
            do="run",
            log=str(said),
            stage=stage,
            scenario=name,
            tree=str(folder / "tree"),
            journal=str(folder / "journal"),
            bugs=bugs,
            point=point,
            loss=loss.environ() if loss else {},
        )
        return answer["code"], said.read_text()

    def prepared(self, name: str) -> Prepared:
        if name not in self._prepared:
            folder, trial = self._folder / name / "prepared", self._folder / name / "trial"
            (folder / "tree").mkdir(parents=True)
            code, said = self.act("prepare", name, folder)
            assert code == 0, said
            shutil.copytree(folder, trial)
            code, said = self.act("count", name, trial)
            assert code == 0, said
            self._prepared[name] = Prepared(folder, json.loads(said.splitlines()[-1]))
        return self._prepared[name]

    def recorder(self, folder: Path) -> PowerLoss | None:
        """Of the tree in `folder`."""
        if self._recorder is None:
            return None
        return PowerLoss(self._recorder, str(folder / "tree"), str(folder / "powerloss.log"))

    def problems(self, name: str, folder: Path, loss: PowerLoss | None) -> list[str]:
        """What a fresh process finds in the tree, and in what a power loss left of it."""
        trees = [folder / "tree"]
        if loss is not None:
            durable = read_log(loss.log)
            assert durable.started
            trees.append(folder / "tree-after-power-loss")
            durable.write_tree(str(trees[-1]))
        if self._checker is None:
            self._checker = subprocess.Popen(
                [sys.executable, "-m", "tests.crash.points.aftermath"],
                env=environment(),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        checker = self._checker
        assert checker.stdin is not None and checker.stdout is not None
        checker.stdin.write(json.dumps([name, *map(str, [folder / "journal", *trees])]) + "\n")
        checker.stdin.flush()
        found: list[str] = json.loads(checker.stdout.readline())
        return found

    def close(self) -> None:
        if self._nursery is not None:
            self._nursery.close()
        if self._checker is not None:
            self._checker.communicate()


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    shared = Workshop(tmp_path_factory.mktemp("workshop"))
    yield shared
    shared.close()


def test_every_point_is_reached_by_a_scenario() -> None:
    covered = {point for scenario in SCENARIOS.values() for point in scenario.points}
    covered |= SERVER_POINTS.keys() | ELSEWHERE.keys()
    assert covered == set(every_point()), covered ^ set(every_point())


@pytest.mark.parametrize(("point", "path"), ELSEWHERE.items())
def test_a_point_that_no_scenario_reaches_is_named_by_its_test(point: str, path: str) -> None:
    assert f'"{point}"' in (ROOT / path).read_text()


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_reaches_what_its_table_says(name: str, workshop: Workshop) -> None:
    hits, scenario = workshop.prepared(name).hits, SCENARIOS[name]
    listed = {*scenario.points, *scenario.also}
    assert listed <= hits.keys(), f"not reached: {sorted(listed - hits.keys())}"
    more = hits.keys() - listed - {*PROBE, *CLOSE, *SEAL}
    assert not more, f"reached, and not in the table: {sorted(more)}"
    once = {point for point in scenario.points if hits[point] == 1}
    assert not once, f"reached only once: {sorted(once)}"


@pytest.mark.parametrize(("name", "point", "which"), [*cases()])
def test_a_crash_loses_nothing(
    name: str, point: str, which: str, workshop: Workshop, tmp_path: Path
) -> None:
    prepared = workshop.prepared(name)
    hits = prepared.hits[point]
    chosen = [1] if which == "first" else [hits // 2 + 1]
    if EVERY_HIT and which == "later":
        chosen = list(range(2, hits + 1))
    for hit in chosen:
        folder = tmp_path / str(hit)
        problems = crash(workshop, name, f"{point}:{hit}", folder)
        assert problems == [], "\n".join([f"hit {hit}", *problems])
        shutil.rmtree(folder)


def crash(workshop: Workshop, name: str, point: str, folder: Path, *bugs: str) -> list[str]:
    """Run a scenario until it kills itself; what a fresh process finds afterwards."""
    shutil.copytree(workshop.prepared(name).folder, folder)
    loss = workshop.recorder(folder)
    code, said = workshop.act("run", name, folder, *bugs, point=point, loss=loss)
    assert code == -signal.SIGKILL, (point, code, said[-3000:])
    assert f"killed at the crash point {point.partition(':')[0]} " in said
    return workshop.problems(name, folder, loss)


@pytest.mark.parametrize("bug", PLANTS)
def test_a_planted_bug_is_found(bug: str, workshop: Workshop, tmp_path: Path) -> None:
    plant = PLANTS[bug]
    found = crash(workshop, plant.scenario, plant.crash_point, tmp_path / "case", bug)
    if not sys.platform.startswith("linux") and "power" in plant.words:
        pytest.skip("NOT TESTED: the recorder is written for Linux")
    assert any(plant.words in problem for problem in found), found


@pytest.mark.parametrize(
    ("point", "hit"), [(point, hit) for point, hits in SERVER_POINTS.items() for hit in hits]
)
def test_a_server_dies_around_its_answers(
    point: str, hit: int, workshop: Workshop, tmp_path: Path
) -> None:
    """The command as it is, over HTTP; what the client was answered is there, whole."""
    (tmp_path / "tree").mkdir()
    journal = Journal(tmp_path / "journal")
    journal.opened("store")
    loss = workshop.recorder(tmp_path)
    port = free_port()
    command = [sys.executable, "-c", SERVER, "run", "--port", str(port), "--path"]
    with subprocess.Popen(
        [*command, str(tmp_path / "tree" / "store")],
        env=environment(**{VARIABLE: f"{point}:{hit}"}, **(loss.environ() if loss else {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as server:
        try:
            assert server.stdout is not None and server.stderr is not None
            assert b"is ready" in server.stdout.readline(), server.stderr.read()
            client = Client(port)
            with contextlib.closing(client), contextlib.suppress(*GONE):
                for request in SERVER_REQUESTS:
                    journal.perform(client.call, "store", request)
            assert server.wait(timeout=60) == -signal.SIGKILL
            assert f"killed at the crash point {point} ".encode() in server.stderr.read()
        finally:
            server.kill()
    assert workshop.problems("serve", tmp_path, loss) == []
