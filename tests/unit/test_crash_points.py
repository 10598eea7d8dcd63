"""Crash points: off unless the environment asks, exact about the hit, loud about mistakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from ochredb import crash_points
from ochredb.crash_points import VARIABLE, armed, every_point

_SCRIPT = """
import os, sys
from ochredb.crash_points import reach
for number in range(1, 4):
    reach("object.written")
    reach("object.linked")
    os.write(1, f"{number}\\n".encode())
"""


def run(point: str | None) -> subprocess.CompletedProcess[str]:
    environ = {name: text for name, text in os.environ.items() if name != VARIABLE}
    if point is not None:
        environ[VARIABLE] = point
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environ, capture_output=True, text=True, check=False
    )


def test_off_it_does_nothing() -> None:
    assert armed({}) is None
    assert armed({VARIABLE: ""}) is None
    ended = run(None)
    assert (ended.returncode, ended.stdout.split(), ended.stderr) == (0, ["1", "2", "3"], "")


@pytest.mark.parametrize(
    ("text", "before"),
    [("object.linked", []), ("object.linked:1", []), ("object.linked:3", ["1", "2"])],
)
def test_the_process_ends_at_the_hit(text: str, before: list[str]) -> None:
    ended = run(text)
    assert (ended.returncode, ended.stdout.split()) == (-signal.SIGKILL, before)
    assert f"{VARIABLE}={text}: this process will kill itself" in ended.stderr
    assert "killed at the crash point object.linked" in ended.stderr


def test_a_point_that_is_not_reached_kills_nobody() -> None:
    assert run("object.linked:4").returncode == 0
    assert run("version.committed").returncode == 0


@pytest.mark.parametrize("text", ["object", "object.linkd", "append", ":1", "object.linked:0"])
def test_a_mistake_keeps_the_process_from_starting(text: str) -> None:
    with pytest.raises(ValueError, match=f"{VARIABLE}={text}: "):
        armed({VARIABLE: text})
    ended = run(text)
    assert ended.returncode == 1
    assert f"ValueError: {VARIABLE}={text}" in ended.stderr


def test_changing_the_environment_later_arms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "object.linked")
    crash_points.reach("object.linked")


def test_an_observer_is_told_of_every_point() -> None:
    seen: list[str] = []
    crash_points.observe(seen.append)
    try:
        crash_points.reach("object.linked")
    finally:
        crash_points.observe(None)
    crash_points.reach("object.linked")
    assert seen == ["object.linked"]


def test_names_are_unique() -> None:
    assert len(set(every_point())) == len(every_point())
