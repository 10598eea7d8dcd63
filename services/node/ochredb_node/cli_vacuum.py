"""`ochredb vacuum`: give back, or erase, what was deleted, of a directory or a server."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ochredb_node.cli_common import FAILURE, add_token, failed, token_headers

if TYPE_CHECKING:
    from ochredb.vacuum import Phase, Progress, VacuumReport

COMMAND = "vacuum"
_INTERRUPTED = 130
_LINE_PERIOD_S = 5.0
_SHOWN: dict[Phase, tuple[str, str]] = {
    "compacting": ("compacting", "collections"),
    "waiting": ("waiting for reads that began before", "s"),
    "deleting": ("deleting", "objects"),
    "catalog": ("shrinking the catalog", "steps"),
}


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        COMMAND,
        help="give back at once what deleted data takes, or erase it",
        description=(
            "Fold and merge everything, delete what is replaced, and shrink the catalog, while the"
            " database is read and written. If anything was replaced in the last minute, it waits"
            " until no read can need that any more."
        ),
    )
    add = parser.add_argument
    add("target", metavar="PATH|URL", help="directory of the data, or http(s)://host:port")
    add(
        "--purge", action="store_true",
        help="also erase: afterwards nothing deleted or replaced before is in any file",
    )  # fmt: skip
    add("--json", action="store_true", help="print the report as JSON")
    add_token(parser)


def run(options: dict[str, Any]) -> int:
    """Returns the exit status: 0, 1 if it failed or is not complete."""
    # Late: `ochredb --help` needs none of it.
    from ochredb.api.exceptions import ChromaError
    from ochredb.errors import OchreError
    from ochredb.vacuum import vacuum

    started_s = time.monotonic()
    try:
        with _progress() as progress:
            report = vacuum(
                options["target"],
                purge=options["purge"],
                headers=token_headers(options),
                progress=progress,
            )
    except (OchreError, ChromaError, OSError, ValueError) as error:
        return failed(str(error), FAILURE)
    except KeyboardInterrupt:
        return failed("interrupted; what was done stays done", _INTERRUPTED)
    _show(options, report, time.monotonic() - started_s)
    return 0 if report.is_complete else FAILURE


def _show(options: dict[str, Any], report: VacuumReport, elapsed_s: float) -> None:
    if options["json"]:
        import orjson

        print(orjson.dumps(report.to_json(), option=orjson.OPT_INDENT_2).decode())
        return
    print(
        f"{options['target']}: {report.bytes_before / 1e6:,.1f} MB before,"
        f" {report.bytes_after / 1e6:,.1f} MB after;"
        f" {_count(report.collections, 'collection')},"
        f" {_count(report.parts_rewritten, 'part')} written anew,"
        f" {_count(report.objects_deleted, 'object')} deleted, in {elapsed_s:.1f} s"
    )
    for text in report.problems:
        print(f"ochredb: not done: {text}", file=sys.stderr)
    for text in report.kept:
        print(f"ochredb: still kept: {text}", file=sys.stderr)
    if report.purge and not report.is_complete:
        print("ochredb: the purge is not complete: run it again", file=sys.stderr)
    elif report.purge:
        print("nothing that was deleted before is in any file of the database")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, a line now and then elsewhere; both on stderr."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bars:
        task = bars.add_task("beginning", total=None, unit="")

        def show(phase: Phase, done: float, total: float) -> None:
            description, unit = _SHOWN[phase]
            bars.update(
                task, completed=int(done), total=int(total), description=description, unit=unit
            )

        yield show


class _Lines:
    """Progress for logs: at most one line every few seconds."""

    def __init__(self) -> None:
        self._shown_s = time.monotonic()

    def __call__(self, phase: Phase, done: float, total: float) -> None:
        now = time.monotonic()
        if now - self._shown_s >= _LINE_PERIOD_S:
            self._shown_s = now
            description, unit = _SHOWN[phase]
            print(f"{description}: {done:.0f} of {total:.0f} {unit}", file=sys.stderr, flush=True)
