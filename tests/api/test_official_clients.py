"""The official clients against our server: chromadb-client (Python) and chromadb (npm).

Their dependencies stay out of our lock, so their tests, in official/ and js/, run in environments
of their own. `make official` and `make js` build those and then forbid the skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from ochredb.testing.server_process import ServerProcess

HERE = Path(__file__).resolve().parent
CLIENT_PYTHON = HERE.parent.parent / ".venv-client" / "bin" / "python"
CLIENT_MODULES = HERE / "js" / "node_modules" / "chromadb"


def need(path: Path, verb: str) -> None:
    """Skip loudly when `path` is missing; fail if OCHREDB_REQUIRE_CLIENTS names `verb`."""
    if not path.exists():
        message = f"OFFICIAL CLIENT NOT TESTED: {path.name} is missing, run `make {verb}`"
        if verb in os.environ.get("OCHREDB_REQUIRE_CLIENTS", "").split(","):
            pytest.fail(message)
        pytest.skip(message)


def run(command: Sequence[str], server: ServerProcess, directory: Path) -> str:
    """Run `command` with the server's address in its environment; it must end with 0."""
    address = {"OCHREDB_HOST": server.host, "OCHREDB_PORT": str(server.port)}
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **address, "PYTHONPATH": "", "ANONYMIZED_TELEMETRY": "False"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_official_python_client(server: ServerProcess) -> None:
    need(CLIENT_PYTHON, "official")
    tests = str(HERE / "official")
    command = [str(CLIENT_PYTHON), "-m", "pytest", tests, "-q", "-c", os.devnull]
    command += ["--rootdir", tests, "--confcutdir", tests, "-p", "no:cacheprovider"]
    output = run([*command, "--timeout", "120"], server, HERE)
    assert " passed" in output
    assert " skipped" not in output


@pytest.mark.timeout(600)
def test_official_javascript_client(server: ServerProcess) -> None:
    need(CLIENT_MODULES, "js")
    node = shutil.which("node")
    assert node is not None, "node_modules is there, but node is not on the PATH"
    output = run([node, "--test", "--test-reporter=tap", "test.mjs"], server, HERE / "js")
    assert "\n# fail 0\n" in output
    assert "\n# pass 0\n" not in output
