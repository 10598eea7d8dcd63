"""`ochredb run` as a process: the ready line, the clean stop, and starts that fail."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ochredb_frontend.server import listen

READY = re.compile(r"^OchreDB is ready on (http://127\.0\.0\.1:\d+) \(data: (.+)\)$")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ochredb_node.cli", "run", *arguments]


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("OCHREDB_")}


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, its URL and the directory that it names."""
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline().strip()
        ready = READY.match(line)
        assert ready is not None, (line, process.stderr.read() if line == "" else "")
        yield process, ready[1], ready[2]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_when_it_is_ready_and_ends_with_0(tmp_path: Path, number: signal.Signals) -> None:
    data = tmp_path / "data"
    with running("--path", str(data), "--port", "0") as (process, url, named):
        assert named == str(data)
        with httpx.Client(base_url=url, trust_env=False) as http:
            databases = "/api/v2/tenants/default_tenant/databases"
            made = http.post(f"{databases}/default_database/collections", json={"name": "kept"})
            assert made.status_code == 200
            assert http.post("/api/v2/reset").status_code == 403
            process.send_signal(number)
            _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")
    with running("--path", str(data), "--port", "0", "--token", "t") as (_, url, _):
        path = f"{url}{databases}/default_database/collections/kept"
        with httpx.Client(trust_env=False) as http:
            assert http.get(path).status_code == 401
            answer = http.get(path, headers={"authorization": "Bearer t"})
            assert answer.json() == made.json()


def test_failed_starts_say_why_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, status, reason in (
            (("--path", str(file), "--port", "0"), 2, str(file)),
            (("--path", str(tmp_path / "data"), "--port", port), 1, f"127.0.0.1:{port}"),
        ):
            done = subprocess.run(
                command(*arguments), capture_output=True, text=True, env=environment(), timeout=60
            )
            assert done.returncode == status
            assert done.stderr.startswith("ochredb: ") and reason in done.stderr
            assert "Traceback" not in done.stderr
            assert done.stdout == ""
