"""The command line: `ochredb run` starts every role in this process and serves the REST API;
`ochredb serve` starts those that it is told, as one process of a cluster."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ochredb_node import (
    cli_backup,
    cli_check,
    cli_explain,
    cli_migrate,
    cli_quarantine,
    cli_repair,
    cli_vacuum,
)
from ochredb_node.cli_common import USAGE_ERROR, failed, start_failed
from ochredb_node.memory import ShortCollections
from ochredb_node.native import tune_native_libraries
from ochredb_node.settings import (
    READER_VARIABLE,
    WORKER_VARIABLE,
    Settings,
    SettingsError,
    add_arguments,
    load,
    load_table,
)

if TYPE_CHECKING:
    from ochredb_node.config import NodeConfig
    from ochredb_node.serve_settings import ServeSettings
    from ochredb_node.supervisor import Supervisor

_SERVE, _CONFIG = "serve", "config"
_WORKER_NICENESS = 10  # It holds locks of the catalog now and then: not the lowest.
_WORKER_DRAIN_S = 1.0
_OPENED_AHEAD_MAX = 100  # Collections that a reader opens before it is asked.
_READERS_DRAIN_S = 31.0  # They drain when the server does, 30 s at most.


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 after a clean stop, 1 if the start failed, 2 for bad settings."""
    tune_native_libraries()  # First of all: the options of a cluster's processes load numpy.
    given = sys.argv[1:] if arguments is None else arguments
    parser = _parser(of_a_cluster=_SERVE in given or _CONFIG in given)
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    if command is None:
        parser.print_help()
        return USAGE_ERROR
    if command == cli_vacuum.COMMAND:
        return cli_vacuum.run(options)
    if command in cli_backup.COMMANDS:
        return cli_backup.run(command, options)
    if command == cli_check.COMMAND:
        return cli_check.run(options)
    if command == cli_repair.COMMAND:
        return cli_repair.run(options)
    if command == cli_explain.COMMAND:
        return cli_explain.explain(options)
    if command == cli_quarantine.COMMAND:
        return cli_quarantine.run(options)
    if command == cli_migrate.COMMAND:
        return cli_migrate.run(options)
    try:
        if command in (_SERVE, _CONFIG):
            from ochredb_node import cli_config
            from ochredb_node.serve_settings import ServeSettings

            if command == _CONFIG:
                return cli_config.run(options)
            served = load_table(ServeSettings, options).settings
            return serve(served, own_command(arguments))
        return run(load(options), own_command(arguments))
    except SettingsError as error:
        return failed(error, USAGE_ERROR)


def _parser(*, of_a_cluster: bool) -> argparse.ArgumentParser:
    """of_a_cluster: with the many options of `serve` and `config`, which take time to make."""
    parser = argparse.ArgumentParser(prog="ochredb", description="A vector database for AI.")
    parser.add_argument(
        "--version", action=_Version, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS,
        help="show the version and exit",
    )  # fmt: skip
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
    serve_parser = commands.add_parser(
        _SERVE,
        usage="ochredb serve [OPTION]...",
        help="start one process of a cluster",
        description=(
            "Start some of the roles, as one process of several on one catalog and one object"
            " store. Options as of `ochredb run`; `ochredb config` shows what they come to."
        ),
    )
    config_parser = commands.add_parser(
        _CONFIG,
        usage="ochredb config [OPTION]...",
        help="show the settings that `ochredb serve` would have",
        description=(
            "Check the settings that `ochredb serve` would have with the same flags, environment"
            " and file, and print them as TOML, each with where it came from. Secrets are hidden."
        ),
    )
    if of_a_cluster:
        from ochredb_node.serve_settings import ServeSettings

        add_arguments(serve_parser, ServeSettings)
        add_arguments(config_parser, ServeSettings)
        config_parser.add_argument(
            "--reference", action="store_true", help="print a table of all settings instead"
        )
    cli_vacuum.add_command(commands)
    cli_explain.add_command(commands)
    cli_backup.add_commands(commands)
    cli_quarantine.add_command(commands)
    cli_migrate.add_command(commands)
    cli_check.add_command(commands)
    cli_repair.add_command(commands)
    return parser


class _Version(argparse.Action):
    """Looks the version up when it is asked for: reading metadata delays a start by 40 ms."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from importlib.metadata import version

        print(f"ochredb {version('ochredb')}")
        parser.exit()


def run(settings: Settings, command: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT, or be a worker of a process that does.

    command: this process's own, without the interpreter, for its worker.
    """
    _set_up_logging(settings.log_level)
    if os.environ.get(WORKER_VARIABLE) is not None:
        return _help(settings)
    from ochredb_node.readers import ReaderProcesses, likeness, readers_max

    if os.environ.get(READER_VARIABLE) is not None:
        from ochredb_node.reader import read

        return read(node_config(settings), _server_log_level(settings), likeness(settings))
    # Late: `ochredb --help` and refusals of settings need none of it.
    from ochredb.clock import SystemClock
    from ochredb.errors import OchreError
    from ochredb.hints.base import HintKind
    from ochredb_frontend.app import App
    from ochredb_frontend.server import Server, listen, serve
    from ochredb_frontend.sharing import Sharing
    from ochredb_node.helper import Helper
    from ochredb_node.node import Node

    data = os.path.abspath(settings.path)
    clock = SystemClock()
    collections = ShortCollections(clock)

    def tidy(idle: bool) -> None:
        collections.tidy(idle=idle)
        helper.turn()

    def make_worker() -> Supervisor:
        import random

        from ochredb_node.supervisor import Supervisor

        return Supervisor(command, 1, clock=clock, rng=random.Random())

    sharing: Sharing | None = None

    def is_read() -> bool:
        return bool(node.query.read_lately(1)) or (sharing is not None and sharing.reads)

    helper = Helper(
        make_worker,
        clock=clock,
        is_read=is_read,
        is_needed=lambda: node.is_at_work,
    )
    try:
        sock = listen(settings.host, settings.port)
        node = Node(node_config(settings), tidy=tidy, delegate=helper.takes)
        node.start()
    except (OchreError, OSError) as error:
        return start_failed(error)
    collections.start()
    app = App(node.frontend)
    app.metrics.counter(
        "ochredb_graph_insertions_total",
        "Vectors inserted into graphs by this process.",
        lambda: node.compactor.graph_insertions,
    )
    readers = ReaderProcesses(command, likeness(settings), clock)
    sharing = Sharing(
        readers.start,
        readers_max=readers_max(node),
        metrics=app.metrics,
        clock=clock,
        on_damaged=lambda part_id: node.open_parts.found_damaged(part_id, "found by a reader"),
        read_lately=lambda: node.query.read_lately(_OPENED_AHEAD_MAX),
    )
    app.on_reading = sharing.consider
    node.shared.hints.subscribe(HintKind.APPENDED, sharing.appended)
    server = Server(
        app,
        sock,
        on_ready=lambda url: print(f"OchreDB is ready on {url} (data: {data})", flush=True),
        log_level=_server_log_level(settings),
        companion=sharing,
    )
    with contextlib.ExitStack() as closing:  # Last first.
        closing.callback(node.close)
        closing.callback(helper.close)
        closing.callback(lambda: readers.close(0.0 if server.is_cut_off else _READERS_DRAIN_S))
        serve(server)
    return 0


def _server_log_level(settings: Settings) -> str:
    return "info" if settings.log_level == "debug" else "warning"


def _help(settings: Settings) -> int:
    """Be the worker of a server, which comes before it wherever both want the processor."""
    from ochredb_node.worker import work, worker_config

    with contextlib.suppress(OSError):  # Not permitted: only slower for the server.
        os.nice(_WORKER_NICENESS)
    return work(worker_config(node_config(settings), 1, "0"), _WORKER_DRAIN_S)


def serve(settings: ServeSettings, command: Sequence[str]) -> int:
    """Serve some roles until SIGTERM or SIGINT, or be a worker of a process that does.

    command: this process's own, without the interpreter.
    """
    _set_up_logging(settings.log_level)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # What it finds wrong is raised, too.
    from ochredb.errors import OchreError

    try:
        config = node_config(settings)
    except OchreError as error:  # A package is missing.
        return start_failed(error)
    worker = os.environ.get(WORKER_VARIABLE)
    if worker is not None:
        from ochredb_node.worker import work, worker_config

        worker_only = worker_config(config, settings.worker_count, worker)
        return work(worker_only, settings.drain_timeout_s)
    from ochredb_node.serve import serve

    return serve(settings, config, command)


def own_command(arguments: Sequence[str] | None) -> list[str]:
    """What to give the interpreter to run this same command again."""
    if arguments is None:
        return sys.orig_argv[1:]
    return ["-m", "ochredb_node.cli", *arguments]


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
    from ochredb_compactor.config import CompactorConfig
    from ochredb_frontend.config import FrontendConfig
    from ochredb_node.config import NodeConfig
    from ochredb_query.config import QueryConfig

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
    query = QueryConfig(target_recall=settings.target_recall)
    compactor = CompactorConfig(paused=settings.pause_compaction)
    config = NodeConfig(path=settings.path, frontend=frontend, query=query, compactor=compactor)
    if type(settings) is Settings:
        return config
    from ochredb_node.serve_config import in_cluster
    from ochredb_node.serve_settings import ServeSettings

    assert isinstance(settings, ServeSettings)
    return in_cluster(config, settings)


if __name__ == "__main__":
    sys.exit(main())
