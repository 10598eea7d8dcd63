"""`ochredb check`: every byte and every fact of a store, which may be in use."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ochredb_node.cli_backup import megabytes, progress_shown
from ochredb_node.cli_common import FAILURE, add_token, failed, token_headers

if TYPE_CHECKING:
    from ochredb.integrity import Finding, Report

COMMAND = "check"
_INTERRUPTED = 130


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        COMMAND,
        help="verify a database that is in use",
        description=(
            "Read a whole database as it is at one moment, while it is in use, and compare every"
            " checksum. Ends with 1 if something is damaged."
        ),
    )
    add = parser.add_argument
    add("source", metavar="PATH|URL", help="directory of the data, or http(s)://host:port")
    add_token(parser)
    add("--json", action="store_true", help="print the report as JSON")


def run(options: dict[str, Any]) -> int:
    """Returns the exit status: 0 if all is well, 1 for damage or if it could not be checked."""
    # Late: `ochredb --help` needs none of it.
    import orjson

    from ochredb.api.exceptions import ChromaError
    from ochredb.errors import OchreError
    from ochredb.integrity import check

    source = options["source"]
    try:
        with progress_shown("checking") as progress:
            report = check(source, headers=token_headers(options), progress=progress)
    except (OchreError, ChromaError, OSError) as error:
        return failed(str(error), FAILURE)
    except KeyboardInterrupt:
        return failed("interrupted", _INTERRUPTED)
    if options["json"]:
        print(orjson.dumps(report.to_document(), option=orjson.OPT_INDENT_2).decode())
    else:
        _print(source, report)
    return FAILURE if report.is_damaged else 0


def _print(source: str, report: Report) -> None:
    for finding in report.findings:
        print(f"ochredb: damaged: {told(finding)}", file=sys.stderr)
    for item in report.quarantine:
        where = f"collection {item.collection}, offsets {item.start} to {item.stop}"
        print(f"quarantined: {where}: {item.reason}")
    for note in report.notes:
        print(f"note: {note}")
    count = len(report.findings)
    state = "undamaged" if not count else f"{counted(count, 'damage')} found"
    speed = int(report.size_bytes / max(report.elapsed_s, 1e-9))
    size = f"{counted(report.collections, 'collection')}, {counted(report.objects, 'object')}"
    size += f", {megabytes(report.size_bytes)}, in {report.elapsed_s:.1f} s"
    print(f"{source}: {state}; {size} ({megabytes(speed)}/s)")


def counted(count: int, what: str) -> str:
    """A number of things."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def told(finding: Finding) -> str:
    """One line about what is damaged, who needs it, and what it means."""
    text = f"{finding.place}: {finding.problem}"
    if finding.sections:
        text += f" (in {', '.join(finding.sections)})"
    if finding.collections:
        text += f"; of {', '.join(finding.collections)}"
    if finding.derived and not finding.mended:
        text += "; can be made again"
    return text
