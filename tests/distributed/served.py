"""One `ochredb serve` process: started, its ready line read, asked over HTTP, stopped or killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

READY = re.compile(
    r"^OchreDB is ready: roles=(\S+) node=(\S+)( rest=(\S+))?( rpc=(\S+))? health=(\S+)$"
)
DATABASE = "/api/v2/tenants/default_tenant/databases/default_database"
PROGRAM = "from ochredb_node.cli import main; raise SystemExit(main())"


class Served:
    """A running process. When it is `ready`, rest and health are URLs, rpc is host:port; None
    where it does not listen."""

    def __init__(
        self,
        log_path: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        plain = {name: text for name, text in os.environ.items() if "OCHREDB_" not in name}
        self.log_path = log_path
        self.http = httpx.Client(trust_env=False, timeout=60)
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-c", PROGRAM, "serve", "--port", "0", "--rpc-port", "0",
                    "--health-port", "0", *arguments,
                ],
                stdout=subprocess.PIPE, stderr=log, text=True,
                env={**plain, **(environment or {})},
            )  # fmt: skip

    def ready(self) -> Served:
        """Wait until it says so. Raises AssertionError with its log if it ends instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        ready = READY.match(line)
        if ready is None:
            self.kill()
        assert ready is not None, (line, self.log_path.read_text())
        self.roles, self.name, self.rest, self.rpc, self.health = ready.group(1, 2, 4, 6, 7)
        self.http.base_url = self.rest or self.health
        return self

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One request of the REST API, of the default database if `path` begins otherwise."""
        url = path if path.startswith("/api") else DATABASE + path
        answer = self.http.request(method, url, json=body)
        assert answer.status_code < 300, (answer.status_code, answer.text)
        return answer.json() if answer.content else None

    def is_ready(self) -> bool:
        return httpx.get(f"{self.health}/readyz", trust_env=False).status_code == 200

    def metric(self, name: str) -> float:
        """One value, without labels."""
        page = httpx.get(f"{self.health}/metrics", trust_env=False).text
        found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
        assert found is not None, page
        return float(found[1])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 60.0) -> int:
        """The exit status."""
        self.http.close()
        code = self.process.wait(timeout_s)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def stop(self) -> int:
        """Ask it to end; the exit status."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """At once; no error if it has ended."""
        self.process.kill()
        self.wait()
