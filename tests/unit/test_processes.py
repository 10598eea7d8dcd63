"""Who is gone: dead processes and numbers given anew, never what runs or is elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from ochredb.ids import IdSource
from ochredb.processes import is_gone, process_name

from .kernel import ROOT

NAME = "from ochredb.ids import IdSource; from ochredb.processes import process_name; "
NAME += "print(process_name(IdSource()), flush=True)"
linux = pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: needs /proc")


def named_child(*before: str) -> tuple[subprocess.Popen[str], str]:
    """A process that waits, and its name."""
    child = subprocess.Popen(
        [*before, sys.executable, "-c", NAME + "; input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert child.stdout is not None
    return child, child.stdout.readline().strip()


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def test_whoever_runs_is_not_gone() -> None:
    name = process_name(IdSource())
    assert name.split("/")[1] == str(os.getpid())
    assert not is_gone(name)
    child, name = named_child()
    try:
        assert not is_gone(name)
    finally:
        end(child)
    assert is_gone(name)


@linux
def test_a_zombie_is_gone() -> None:
    child, name = named_child()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # It is dead, and stays unreaped.
    os.kill(child.pid, 0)
    assert is_gone(name)
    end(child)


@linux
def test_a_number_that_was_given_anew_is_not_who_had_it() -> None:
    place, pid, start, random = process_name(IdSource()).split("/")
    assert is_gone(f"{place}/{pid}/{int(start) - 100}/{random}")


def test_nobody_elsewhere_can_be_judged() -> None:
    _, pid, start, random = process_name(IdSource()).split("/")
    assert not is_gone(f"elsewhere/{pid}/{start}/{random}")
    assert not is_gone("elsewhere/4194304/1/x")
    assert not is_gone("nonsense")
    assert not is_gone("")


@linux
def test_a_namespace_of_its_own_is_another_place() -> None:
    """As in containers: the same number means another process, in either direction."""
    command = [shutil.which("unshare") or "unshare", "--pid", "--fork", "--mount-proc"]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("NOT TESTED: no right to make a namespace")
    child, name = named_child(*command)
    try:
        assert name.split("/")[1] == "1"
        assert name.split("/")[0] != process_name(IdSource()).split("/")[0]
    finally:
        end(child)
    assert not is_gone(name)
