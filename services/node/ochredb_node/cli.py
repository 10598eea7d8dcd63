"""The command line: `ochredb run` starts every role in this process and serves the REST API."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ochredb_node.memory import tune_allocator
from ochredb_node.settings import Settings, SettingsError, add_arguments, load

if TYPE_CHECKING:
    from ochredb_node.node import NodeConfig

_USAGE_ERROR, _FAILURE = 2, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 after a clean stop, 1 if the start failed, 2 for bad settings."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    if command is None:
        parser.print_help()
        return _USAGE_ERROR
    try:
        settings = load(options)
    except SettingsError as error:
        print(f"ochredb: {error}", file=sys.stderr)
        return _USAGE_ERROR
    return run(settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ochredb", description="A vector database for AI.")
    version = importlib.metadata.version("ochredb")
    parser.add_argument("--version", action="version", version=f"ochredb {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    run_parser = commands.add_parser(
        "run",
        help="start the server",
        description=(
            "Start the server. Each option can also be given as an environment variable"
            " (OCHREDB_PATH, OCHREDB_PORT, ...) or in the configuration file; flags win over"
            " variables, variables over the file."
        ),
    )
    add_arguments(run_parser)
    return parser


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT."""
    _set_up_logging(settings.log_level)
    tune_allocator()
    # Late: `ochredb --help` and refusals of settings need none of it.
    from ochredb.errors import OchreError
    from ochredb_frontend.app import App
    from ochredb_frontend.server import listen, serve
    from ochredb_node.node import Node

    data = os.path.abspath(settings.path)
    try:
        sock = listen(settings.host, settings.port)
        node = Node(node_config(settings))
        node.start()
    except (OchreError, OSError) as error:
        print(f"ochredb: {error}", file=sys.stderr)
        return _FAILURE
    try:
        serve(
            App(node.frontend),
            sock,
            on_ready=lambda url: print(f"OchreDB is ready on {url} (data: {data})", flush=True),
            log_level="info" if settings.log_level == "debug" else "warning",
        )
    finally:
        node.close()
    return 0


def _set_up_logging(level: str) -> None:
    """OchreDB's own lines from `level` on; of libraries only warnings, unless it is debug."""
    logging.basicConfig(
        level="INFO" if level == "debug" else "WARNING",
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("ochredb").setLevel(level.upper())


def node_config(settings: Settings) -> NodeConfig:
    """The node's configuration that these settings mean."""
    from ochredb_frontend.config import FrontendConfig
    from ochredb_node.node import NodeConfig

    threads = {
        name: value
        for name in ("read_threads", "write_threads")
        if (value := getattr(settings, name)) is not None
    }
    frontend = FrontendConfig(
        allow_reset=settings.allow_reset,
        token=settings.token,
        deadline_s=settings.deadline_s,
        slow_request_s=settings.slow_request_s,
        **threads,
    )
    return NodeConfig(path=settings.path, frontend=frontend)


if __name__ == "__main__":
    sys.exit(main())
