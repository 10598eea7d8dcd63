"""Start servers of ours, run the official tests against them, stop them, report.

    .venv/bin/python tests/conformance/against_ochredb.py --python .venv-peer/bin/python

Takes the options of run.py. Without --url it starts two `ochredb run --allow-reset`, each on a free
port and in a directory of its own. Exit code: 0 if nothing regressed against the official server
and both servers ended by themselves with 0 when asked to.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import run

from ochredb.testing.server_process import ochredb_server

SERVERS = 2


def main() -> int:
    options = run.parser().parse_args()
    if options.baseline is None and options.mode == "integration":
        options.baseline = run.HERE / "baseline.txt"
    with tempfile.TemporaryDirectory(prefix="ochredb_conformance_") as scratch:
        servers = [
            ochredb_server(Path(scratch) / f"server{index}", "--allow-reset")
            for index in range(SERVERS)
        ]
        with contextlib.ExitStack() as stack:
            for server in servers:
                stack.enter_context(server)
                run.log(f"ochredb on {server.url}, pid {server.pid}")
            options.url = [f"{server.host}:{server.port}" for server in servers]
            code = run.execute(options)
        for server in servers:
            if server.returncode != 0:
                print(f"{server.url} ended with {server.returncode}\n{server.output_tail()}")
                code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
