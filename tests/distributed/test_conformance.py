"""The official client's own suite passes on a cluster as on one server: tests/conformance.

Needs the peer's environment (`make test-distributed` makes it). Files of which every test is
skipped are left out. OCHREDB_CONFORMANCE_FILES names files (below chromadb/test, between commas) to
run only these.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".venv-peer" / "bin" / "python"
RUN = ROOT / "tests" / "conformance" / "run.py"
BASELINE = RUN.with_name("baseline.txt")
FILES = [name for name in os.environ.get("OCHREDB_CONFORMANCE_FILES", "").split(",") if name]


def files_with_tests() -> list[str]:
    """Those of which the official server passes a test."""
    passed = [line for line in BASELINE.read_text().splitlines() if line.startswith("passed\t")]
    names = [line.partition("chromadb/test/")[2].partition("::")[0] for line in passed]
    return list(dict.fromkeys(names))


@pytest.mark.skipif(not PEER.exists(), reason="NOT TESTED: no .venv-peer; see make conformance")
@pytest.mark.timeout(1500)
def test_the_official_suite_passes_as_on_one_server(cluster: Cluster) -> None:
    command = [sys.executable, str(RUN), "--python", str(PEER), "--url", cluster.url]
    command += [
        "--baseline",
        str(BASELINE),
        "--out",
        str(cluster.root / "out"),
    ]
    command += ["--files", *(FILES or files_with_tests())]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    print(done.stdout[-300:])
