"""`ochredb migrate`: bring a store to this release's format, without starting anything else."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ochredb_node.cli_common import FAILURE, USAGE_ERROR, failed

COMMAND = "migrate"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        COMMAND,
        help="bring a database to this release's format",
        description=(
            "Bring a database to this release's format. Opening it does the same; this does nothing"
            " else. There is no way back: take a backup before. Older processes that have the"
            " database open refuse to go on afterwards."
        ),
    )
    parser.add_argument("path", metavar="PATH", help="directory of the data")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, change nothing"
    )


def run(options: dict[str, Any]) -> int:
    """Returns the exit status: 0, 1 if it failed or is not ours, 2 if there is no database."""
    # Late: `ochredb --help` needs none of it.
    from ochredb.catalog.migrate import format_version, open_directory
    from ochredb.catalog.schema import FORMAT_VERSION
    from ochredb.clock import SystemClock
    from ochredb.errors import InvalidArgument, OchreError, newer_message
    from ochredb.ids import IdSource
    from ochredb.storage.open_directory import check_directory

    path = options["path"]
    try:
        before = format_version(path)
        if before is None:
            return failed(f"{path} holds no OchreDB database", USAGE_ERROR)
        if before > FORMAT_VERSION:
            raise InvalidArgument(newer_message(path, before, FORMAT_VERSION))
        if before == FORMAT_VERSION:
            print(f"{path} has format version {before} already")
            return 0
        if options["dry_run"]:
            print(f"{path} has format version {before} and would get {FORMAT_VERSION}")
            return 0
        check_directory(path)
        database, _ = open_directory(os.path.abspath(path), SystemClock(), IdSource())
        database.close()
    except (OchreError, OSError) as error:
        return failed(error, FAILURE)
    print(f"{path}: migrated from format version {before} to {FORMAT_VERSION}")
    return 0
