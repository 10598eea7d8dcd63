"""`ochredb migrate`: bring a store to this release's format, without starting anything else."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from ochredb_node.cli_common import FAILURE, USAGE_ERROR, failed

COMMAND = "migrate"
_URL_VARIABLE = "OCHREDB_CATALOG_URL"
_SCHEMA_VARIABLE = "OCHREDB_CATALOG_SCHEMA"


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
    parser.add_argument("path", metavar="PATH", nargs="?", help="directory of the data")
    parser.add_argument(
        "--catalog-url",
        help="or the catalog in PostgreSQL: postgresql://USER@HOST:PORT/DATABASE; prefer"
        f" {_URL_VARIABLE}, if it has a password",
    )
    parser.add_argument(
        "--catalog-schema", help=f"its schema there (default: {_SCHEMA_VARIABLE}, or public)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, change nothing"
    )


def run(options: dict[str, Any]) -> int:
    """Returns the exit status: 0, 1 if it failed or is not ours, 2 if there is no database."""
    # Late: `ochredb --help` needs none of it.
    from ochredb.catalog.schema import FORMAT_VERSION
    from ochredb.errors import InvalidArgument, OchreError, newer_message

    url = options["catalog_url"]
    if options["path"] is None and url is None:
        url = os.environ.get(_URL_VARIABLE)
    if (options["path"] is None) == (url is None):
        return failed(
            "say which database: PATH, or --catalog-url (OCHREDB_CATALOG_URL)", USAGE_ERROR
        )
    schema = options["catalog_schema"] or os.environ.get(_SCHEMA_VARIABLE) or "public"
    name = options["path"] or "the catalog"
    try:
        find, migrate = _in_directory(options["path"]) if url is None else _in_postgres(url, schema)
        before = find()
        if before is None and url is None:
            return failed(f"{name} holds no OchreDB database", USAGE_ERROR)
        if before is None:  # By somebody who may; those who serve it then need not.
            found, done = "is not there yet", "created"
        elif before > FORMAT_VERSION:
            raise InvalidArgument(newer_message(name, before, FORMAT_VERSION))
        elif before == FORMAT_VERSION:
            print(f"{name} has format version {before} already")
            return 0
        else:
            found = f"has format version {before}"
            done = f"migrated from format version {before} to {FORMAT_VERSION}"
        if options["dry_run"]:
            print(f"{name} {found} and would get format version {FORMAT_VERSION}")
            return 0
        migrate()
    except (OchreError, OSError) as error:
        return failed(error, FAILURE)
    print(f"{name}: {done}")
    return 0


_Steps = tuple[Callable[[], int | None], Callable[[], None]]
"""What finds the format, None where there is no database; and what migrates."""


def _in_directory(path: str) -> _Steps:
    from ochredb.catalog.migrate import format_version, open_directory
    from ochredb.clock import SystemClock
    from ochredb.ids import IdSource
    from ochredb.storage.open_directory import check_directory

    def migrate() -> None:
        check_directory(path)
        open_directory(os.path.abspath(path), SystemClock(), IdSource())[0].close()

    return lambda: format_version(path), migrate


def _in_postgres(url: str, schema: str) -> _Steps:
    from ochredb.catalog.migrate_postgres import format_version, open_postgres
    from ochredb.catalog.postgres_config import PostgresConfig
    from ochredb.clock import SystemClock
    from ochredb.ids import IdSource

    clock, config = SystemClock(), PostgresConfig(schema=schema)

    def migrate() -> None:
        open_postgres(url, clock, IdSource(), config)[0].close()

    return lambda: format_version(url, clock, config), migrate
