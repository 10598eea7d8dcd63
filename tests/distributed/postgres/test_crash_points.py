"""A process is killed around each commit to a catalog in PostgreSQL, and while it creates or
migrates one; a fresh one then checks I1 to I8.

Objects are in a directory. What is durable is PostgreSQL's affair, so there is no power loss here.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ochredb.testing.server_process import ONE_THREAD
from tests.components.postgres import PostgresServer
from tests.crash.nursery import Nursery

from .points import ON_POSTGRES

_numbers = itertools.count()


@dataclass(frozen=True)
class Prepared:
    """A scenario's tree, journal and database before its run; how often that reaches each point."""

    folder: Path
    database: str
    hits: dict[str, int]


class Workshop:
    """What the cases share; made when it is first asked for."""

    def __init__(self, folder: Path, server: PostgresServer) -> None:
        self._folder, self._server = folder, server
        self._prepared: dict[str, Prepared] = {}
        log = str(folder / "nursery.log")
        self.nursery = Nursery("tests.distributed.postgres.points", log, ONE_THREAD)

    def act(
        self, stage: str, name: str, folder: Path, database: str, point: str = "", bug: str = ""
    ) -> tuple[int, str]:
        """Have a process do a stage of a scenario; its exit code, and what it said."""
        said = folder / f"{stage}.log"
        answer = self.nursery.ask(
            do="run",
            log=str(said),
            stage=stage,
            scenario=name,
            tree=str(folder / "tree"),
            journal=str(folder / "journal"),
            url=self._server.url_of(database),
            point=point,
            bug=bug,
        )
        return answer["code"], said.read_text()

    def _copied(self, database: str) -> str:
        """A database like it; nobody may be connected to that."""
        name = f"points-{next(_numbers)}"
        ended = (
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            f" WHERE datname = '{database}'"
        )
        self._server.execute(ended)
        self._server.execute(f'CREATE DATABASE "{name}" TEMPLATE "{database}"')
        return name

    def _drop(self, database: str) -> None:
        self._server.execute(f'DROP DATABASE "{database}" WITH (FORCE)')

    def prepared(self, name: str) -> Prepared:
        if name not in self._prepared:
            folder, trial = self._folder / name / "prepared", self._folder / name / "trial"
            (folder / "tree").mkdir(parents=True)
            database = f"points-{name}"
            self._server.create_database(database)
            code, said = self.act("prepare", name, folder, database)
            assert code == 0, said
            shutil.copytree(folder, trial)
            code, said = self.act("count", name, trial, self._copied(database))
            assert code == 0, said
            hits = json.loads(said.splitlines()[-1])
            self._prepared[name] = Prepared(folder, database, hits)
        return self._prepared[name]

    def crash(self, name: str, point: str, folder: Path, bug: str = "") -> list[str]:
        """Run a scenario until it kills itself; what a fresh process finds afterwards."""
        prepared = self.prepared(name)
        database = self._copied(prepared.database)
        shutil.copytree(prepared.folder, folder)
        code, said = self.act("run", name, folder, database, point, bug)
        assert code == -signal.SIGKILL, (code, said[-3000:])
        assert f"killed at the crash point {point.partition(':')[0]} " in said
        code, said = self.act("check", name, folder, database)
        assert code == 0, said[-3000:]
        self._drop(database)
        problems: list[str] = json.loads(said.splitlines()[-1])
        return problems


@pytest.fixture(scope="module")
def workshop(
    server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workshop]:
    shared = Workshop(tmp_path_factory.mktemp("workshop"), server)
    yield shared
    shared.nursery.close()


@pytest.mark.parametrize(
    ("name", "point"),
    [(name, point) for name, scenario in ON_POSTGRES.items() for point in scenario.points],
)
def test_a_crash_loses_nothing(name: str, point: str, workshop: Workshop, tmp_path: Path) -> None:
    hit = workshop.prepared(name).hits[point] // 2 + 1
    assert workshop.crash(name, f"{point}:{hit}", tmp_path / "case") == []


def test_a_planted_bug_is_found(workshop: Workshop, tmp_path: Path) -> None:
    bug = "answered before the commit"
    found = workshop.crash("write", "append.committing:2", tmp_path / "case", bug)
    assert any("I1" in problem for problem in found), found
