"""A byte scan of every file below a directory, made by another process.

In this one it would be unlawful: closing a file of SQLite's that is open drops its locks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_PROGRAM = """
import json, os, sys
needles = {name: bytes.fromhex(text) for name, text in json.load(sys.stdin).items()}
found = {name: [] for name in needles}
for folder, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(folder, name)
        with open(path, "rb") as file:
            data = file.read()
        for needle, content in needles.items():
            if content in data:
                found[needle].append(os.path.relpath(path, sys.argv[1]))
print(json.dumps(found))
"""


def files_with(root: Path, needles: Mapping[str, bytes]) -> dict[str, list[str]]:
    """For each needle, the files that hold its bytes."""
    text = json.dumps({name: content.hex() for name, content in needles.items()})
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(root)],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found
