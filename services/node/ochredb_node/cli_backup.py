"""`ochredb backup` and `ochredb restore`: a copy of a store at work, and a store from a copy."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ochredb_node.cli_common import FAILURE, USAGE_ERROR, add_token, failed, token_headers

if TYPE_CHECKING:
    from ochredb.backup import BackupManifest, Progress

BACKUP, RESTORE = "backup", "restore"
COMMANDS = (BACKUP, RESTORE)
_INTERRUPTED = 130
_LINE_PERIOD_S = 5.0


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands to the program's parser."""
    parser = commands.add_parser(
        BACKUP,
        help="copy a database that is in use",
        description=(
            "Copy a whole database as it is at one moment, while it is read and written. Everything"
            " is checked while it is copied; damage is named, and then there is no backup."
        ),
    )
    add = parser.add_argument
    add("source", metavar="PATH|URL", help="directory of the data, or http(s)://host:port")
    add("target", metavar="TARGET", help="a new or an empty directory")
    add_token(parser)
    add(
        "--keep-going", action="store_true",
        help="complete the backup although something is damaged; ends with 1 all the same",
    )  # fmt: skip
    parser = commands.add_parser(
        RESTORE,
        help="make a database from a backup",
        description=(
            "Check a whole backup, make a new database of it, open that and compare its counts."
        ),
    )
    add = parser.add_argument
    add("backup", metavar="BACKUP", help="directory of the backup")
    add("target", metavar="TARGET", nargs="?", help="a new or an empty directory")
    add("--check-only", action="store_true", help="read and compare the backup, restore nothing")
    add(
        "--shared",
        action="store_true",
        help="restore into the empty catalog and object store that `ochredb serve` would use with"
        " this environment or --config",
    )
    add("--config", metavar="FILE", help="with --shared: the configuration of `ochredb serve`")
    add(
        "--keep-going", action="store_true",
        help="accept what was damaged when the backup was taken",
    )  # fmt: skip


def run(command: str, options: dict[str, Any]) -> int:
    """Returns the exit status: 0, 1 if it failed or found damage, 2 for wrong options."""
    if command == RESTORE:
        ways = (options["target"] is not None, options["check_only"], options["shared"])
        if ways.count(True) != 1:
            return failed("restore needs one of TARGET, --shared, --check-only", USAGE_ERROR)
    # Late: `ochredb --help` needs none of it.
    from ochredb.api.exceptions import ChromaError
    from ochredb.errors import OchreError

    try:
        return _backup(options) if command == BACKUP else _restore(options)
    except (OchreError, ChromaError, OSError) as error:
        return failed(str(error), FAILURE)
    except KeyboardInterrupt:
        left = f"; {options['target']} is incomplete" if options["target"] else ""
        return failed(f"interrupted{left}", _INTERRUPTED)


def _backup(options: dict[str, Any]) -> int:
    from ochredb.backup import backup

    started_s = time.monotonic()
    with progress_shown("backing up") as progress:
        manifest = backup(
            options["source"],
            options["target"],
            headers=token_headers(options),
            keep_going=options["keep_going"],
            progress=progress,
        )
    print(f"{options['target']}: {_summary(manifest)}, in {time.monotonic() - started_s:.1f} s")
    return _report_damage(manifest)


def _restore(options: dict[str, Any]) -> int:
    from ochredb.backup import check, restore

    started_s = time.monotonic()
    path, keep_going = options["backup"], options["keep_going"]
    with progress_shown("checking" if options["check_only"] else "restoring") as progress:
        if options["check_only"]:
            manifest = check(path, keep_going=keep_going, progress=progress)
            told = f"{path}: complete and undamaged"
        elif options["shared"]:
            manifest, told = _restore_shared(path, options["config"], keep_going, progress)
        else:
            manifest, store_id = restore(
                path, options["target"], keep_going=keep_going, progress=progress
            )
            told = f"{options['target']}: restored and counted, store {store_id}"
    if manifest.damaged:
        told = told.replace("complete and undamaged", "as it was taken")
    print(f"{told}; {_summary(manifest)}, in {time.monotonic() - started_s:.1f} s")
    return _report_damage(manifest)


def _restore_shared(
    path: str, config_path: str | None, keep_going: bool, progress: Progress
) -> tuple[BackupManifest, str]:
    """The manifest, and where the backup is now."""
    from ochredb.backup.restore_shared import restore_shared
    from ochredb.clock import SystemClock
    from ochredb.errors import InvalidArgument
    from ochredb.ids import IdSource
    from ochredb.storage.space import Reserve
    from ochredb_node.cli import node_config
    from ochredb_node.foundation import open_foundation
    from ochredb_node.serve_settings import ServeSettings
    from ochredb_node.settings import SettingsError, load_table

    try:
        config = node_config(load_table(ServeSettings, {"config": config_path}).settings)
    except SettingsError as error:
        raise InvalidArgument(str(error)) from error
    if config.catalog_url is None:
        raise InvalidArgument("--shared needs a catalog_url; without one, give a TARGET")
    clock = SystemClock()
    opened = open_foundation(config, clock, IdSource(clock), Reserve(config.path))
    with contextlib.closing(opened):
        catalog = opened.catalog
        manifest = restore_shared(
            path,
            catalog.database,
            opened.objects,
            catalog.store_id,
            keep_going=keep_going,
            progress=progress,
        )
    told = f"{catalog.name} and {opened.store_name}: restored, store {catalog.store_id}"
    return manifest, told


def _summary(manifest: BackupManifest) -> str:
    collections = len(manifest.collections)
    return (
        f"{collections:,} collection{'' if collections == 1 else 's'},"
        f" {manifest.records:,} records, {megabytes(manifest.size_bytes)}"
    )


def _report_damage(manifest: BackupManifest) -> int:
    for name, reason in manifest.damaged:
        print(f"ochredb: damaged at the source: {name}: {reason}", file=sys.stderr)
    return FAILURE if manifest.damaged else 0


def megabytes(size: int) -> str:
    """As people read it."""
    return f"{size / 1e6:,.1f} MB"


@contextlib.contextmanager
def progress_shown(verb: str) -> Iterator[Progress]:
    """A bar on a terminal, a line now and then elsewhere; both on stderr."""
    if not sys.stderr.isatty():
        yield _Lines(verb)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bars:
        task = bars.add_task(verb, total=None)

        def show(what: str, done_bytes: int, total_bytes: int) -> None:
            shown = what if what.count("/") == 0 else what.split("/")[0]
            bars.update(
                task, completed=done_bytes, total=total_bytes or None, description=f"{verb} {shown}"
            )

        yield show


class _Lines:
    """Progress for logs: at most one line every few seconds."""

    def __init__(self, verb: str) -> None:
        self._verb, self._shown_s = verb, time.monotonic()

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now - self._shown_s >= _LINE_PERIOD_S:
            self._shown_s = now
            share = f": {megabytes(done_bytes)} of {megabytes(total_bytes)}" if total_bytes else ""
            print(f"{self._verb} {what}{share}", file=sys.stderr, flush=True)
