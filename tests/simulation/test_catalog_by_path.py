"""A planted fault that no simulation can show: the catalog's file opened by its path.

POSIX drops all of a process's locks on a file when it closes any descriptor of it. SQLite counts on
them to know whether it is the last that has the database open, and then removes its write-ahead
log: under the feet of the process that lost its locks, whose commits go into a file without a name.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_WRITER = """
import sys
from ochredb.catalog.migrate import CATALOG_NAME
import ochredb

path, plants = sys.argv[1], sys.argv[2] == "planted"
client = ochredb.PersistentClient(path)
notes = client.get_or_create_collection("notes", embedding_function=None)
print("open", flush=True)
for line in sys.stdin:
    if plants:
        open(f"{path}/{CATALOG_NAME}", "rb").close()
        plants = False
    if line.strip() == "write":
        notes.add(ids=["acknowledged"], embeddings=[[1.0, 2.0]])
    print("done", flush=True)
"""
_PASSER_BY = """
import sys
import ochredb

with ochredb.PersistentClient(sys.argv[1]) as client:
    notes = client.get_or_create_collection("notes", embedding_function=None)
    print(sorted(notes.get(include=[])["ids"]))
"""


def _passes_by(path: Path) -> tuple[str, str]:
    """What a process sees that opens the store and closes it again, and what it complains of."""
    seen = subprocess.run(
        [sys.executable, "-c", _PASSER_BY, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return seen.stdout.strip(), seen.stderr


@pytest.mark.parametrize("fault", ["none", "planted"])
def test_a_write_is_lost_if_and_only_if_the_catalog_is_opened_by_path(
    fault: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(store), fault],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdin is not None and writer.stdout is not None

    def say(line: str) -> None:
        assert writer.stdin is not None and writer.stdout is not None
        print(line, file=writer.stdin, flush=True)
        assert writer.stdout.readline() == "done\n"

    try:
        assert writer.stdout.readline() == "open\n"
        say("open it by its path, if that is planted")
        _passes_by(store)
        say("write")
    finally:
        writer.kill()  # Nothing is folded or copied back at the end.
        writer.wait()
        writer.stdin.close()
        writer.stdout.close()
    seen, complaint = _passes_by(store)
    if fault == "none":
        assert (seen, complaint) == ("['acknowledged']", "")
    else:  # Lost, and noticed: the mark of the last acknowledged write tells.
        assert seen == ""
        assert "the catalog has lost writes" in complaint
