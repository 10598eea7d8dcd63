"""Commands that take long draw a bar on a terminal: a real one here, and leave only their report.

Elsewhere they print lines, which the tests of each command see.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ochredb

_BAR = "\u2501"  # What the library draws it of.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _on_terminal(*arguments: str) -> tuple[int, str, str]:
    """The exit status, standard output, and all that the terminal was sent."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ochredb_node.cli", *arguments]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
        text=True,
    ) as process:
        os.close(theirs)
        sent = b""
        try:
            while chunk := os.read(ours, 65536):
                sent += chunk
        except OSError:  # Linux says so once nobody has the other end.
            pass
        finally:
            os.close(ours)
        assert process.stdout is not None
        output = process.stdout.read()
    return process.returncode, output, sent.decode()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records, some of which were deleted, in a folded part."""
    path = tmp_path_factory.mktemp("bars") / "data"
    with ochredb.PersistentClient(str(path)) as client:
        collection = client.create_collection("shown", embedding_function=None)
        ids = [f"id-{number}" for number in range(300)]
        vectors = [[float(number), 1.0] for number in range(300)]
        collection.add(ids=ids, embeddings=vectors, documents=ids)
        collection.delete(ids=ids[:100])
    return path


@pytest.mark.parametrize("command", ["check", "repair", "backup", "restore", "vacuum"])
def test_a_bar_is_drawn_and_taken_away(command: str, store: Path, tmp_path: Path) -> None:
    arguments = [str(store)]
    if command in ("backup", "restore"):
        arguments.append(str(tmp_path / "copy"))
    if command == "restore":
        assert _on_terminal("backup", *arguments)[0] == 0
        arguments = [arguments[1], str(tmp_path / "restored")]
    status, output, sent = _on_terminal(command, *arguments)
    assert status == 0, sent
    assert output.strip(), "the report"
    assert _BAR in sent
    assert "\x1b[2K" in sent, "its line is cleared at the end"
    assert _BAR not in output
    words = _ESCAPES.sub("", sent)
    beginnings = {"backup": "backing up", "restore": "restoring", "vacuum": "beginning"}
    assert beginnings.get(command, "checking") in words
