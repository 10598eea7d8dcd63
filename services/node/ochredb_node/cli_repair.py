"""`ochredb repair`: mends what a check finds, and names what is gone."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ochredb_node.cli_backup import progress_shown
from ochredb_node.cli_check import told
from ochredb_node.cli_common import FAILURE, USAGE_ERROR, add_token, failed, token_headers

if TYPE_CHECKING:
    from ochredb.integrity import Finding, Report
    from ochredb_compactor.repair import Repaired
    from ochredb_node.node import Node

COMMAND = "repair"
_INTERRUPTED = 130
_TOLD_LOST = 10
_CATALOG_ADVICE = (
    "the catalog is damaged, which nothing else can replace: nothing was changed. Restore a backup"
    " (ochredb restore); without one, keep the directory and ask"
)

_LEFT_ADVICE = "something is left as it is; --accept-loss goes on without what cannot be read"
_REMOTE_ADVICE = "what is left is no derived file: restore a backup, or drop the collection"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        COMMAND,
        help="mend a damaged database",
        description=(
            "Check a database, which may be in use, and mend what is damaged: put back single"
            " flipped bits, build derived files anew. What cannot be read is named and left, unless"
            " you accept that it is lost. Through a URL, of a server or a cluster's frontend, only"
            " derived files are built anew."
        ),
    )
    add = parser.add_argument
    add("target", metavar="PATH|URL", help="directory of the data, or http(s)://host:port")
    add(
        "--accept-loss", action="store_true",
        help="go on without the records that cannot be read; the damaged files are kept aside",
    )  # fmt: skip
    add("--json", action="store_true", help="print what was done as JSON")
    add_token(parser)


def run(options: dict[str, Any]) -> int:
    """Returns the exit status: 0 if all is well now and nothing is lost, else 1."""
    # Late: `ochredb --help` needs none of it.
    from ochredb.errors import OchreError

    target = options["target"]
    is_remote = target.startswith(("http://", "https://"))
    if is_remote and options["accept_loss"]:
        return failed("--accept-loss is for a directory, whose files it keeps aside", USAGE_ERROR)
    try:
        if is_remote:
            return _repair_remote(target, token_headers(options) or {}, options["json"])
        return _repair(target, options["accept_loss"], options["json"])
    except (OchreError, OSError) as error:
        return failed(str(error), FAILURE)
    except KeyboardInterrupt:
        return failed("interrupted; what was mended stays so", _INTERRUPTED)


def _repair(path: str, accept_loss: bool, as_json: bool) -> int:
    from ochredb.catalog.facts import CATALOG
    from ochredb.clock import SystemClock
    from ochredb.ids import IdSource
    from ochredb.integrity import check
    from ochredb.integrity.evidence import Evidence, unfinished
    from ochredb.integrity.mend_catalog import mend_catalog
    from ochredb.integrity.store_id import KEY, mend_store_id

    root = os.path.realpath(path)
    evidence = Evidence(root, IdSource(SystemClock()).uuid7())
    done: list[dict[str, Any]] = []
    with progress_shown("checking") as progress:
        mended = mend_catalog(root, evidence, lambda: progress(CATALOG, 0, 0))
        report = check(path, progress=progress)
    if mended is not None:
        done.append({"collection": "", "place": CATALOG, "outcome": "put back", "told": mended})
    if any(finding.place == CATALOG for finding in report.findings):
        for finding in report.findings:
            print(f"ochredb: damaged: {told(finding)}", file=sys.stderr)
        return failed(_CATALOG_ADVICE, FAILURE)
    if any(finding.place == KEY for finding in report.findings):
        reason = mend_store_id(path, evidence)
        if reason is None:
            return failed("the objects are not those of the catalog: nothing was changed", FAILURE)
        done.append({"collection": "", "place": KEY, "outcome": "put back", "told": reason})
    done += map(asdict, _mend(path, report, evidence, accept_loss))
    done += [_left(item) for item in report.findings if not _is_answered(item, done)]
    evidence.keep_report({"report": report.to_document(), "repaired": done})
    kept = os.path.relpath(evidence.path, path) if os.path.isdir(evidence.path) else None
    # What is left for another reason says itself what helps.
    is_lossy = any(item["outcome"] == "left" and item.get("lost") for item in done)
    return _tell(path, done, kept, as_json, _LEFT_ADVICE if is_lossy else None, unfinished(root))


def _repair_remote(url: str, headers: dict[str, str], as_json: bool) -> int:
    """The server, which has the objects and their compactor, checks and builds anew."""
    from ochredb.clock import SystemClock
    from ochredb.integrity.remote import check_remote

    with progress_shown("repairing") as progress:
        report = check_remote(url, headers, SystemClock(), progress, repair=True)
    done = [
        {
            "collection": ", ".join(item.collections),
            "place": item.place,
            "outcome": "built anew" if item.mended else "left",
            "told": told(item).removeprefix(f"{item.place}: "),
        }
        for item in report.findings
    ]
    return _tell(url, done, None, as_json, _REMOTE_ADVICE)


def _mend(path: str, report: Report, evidence: Any, accept_loss: bool) -> list[Repaired]:
    from ochredb.catalog import facts
    from ochredb_node.node import Node, NodeConfig

    wanted = {name for finding in report.findings for name in finding.collections}
    if not wanted:
        return []
    node = Node(NodeConfig(path=path))
    node.start(background=False)
    try:
        with node.database.read() as session:
            names = facts.full_names(session)
        with progress_shown("mending") as progress:
            found = node.compactor.repair(
                [collection for collection, name in names.items() if name in wanted],
                evidence,
                accept_loss=accept_loss,
                step=lambda what: progress(what, 0, 0),
            )
            found += _unreadable_quarantine(node, names, wanted)
    finally:
        node.close()
    return found


def _unreadable_quarantine(node: Node, names: dict[str, str], wanted: set[str]) -> list[Repaired]:
    """Nothing was ever made of these bytes, so nothing is lost that a read has shown; and only
    who has looked at them drops them."""
    from ochredb.catalog.facts import CATALOG
    from ochredb_compactor.repair import Repaired

    return [
        Repaired(
            row.collection,
            f"{row.object_key or CATALOG}: quarantined operations {row.start} to {row.stop}",
            "left",
            f"{problem}; `ochredb quarantine drop PATH {row.collection} {row.start}` forgets them",
        )
        for row, problem in node.quarantine.damaged()
        if names.get(row.collection) in wanted
    ]


def _is_answered(finding: Finding, done: list[dict[str, Any]]) -> bool:
    """Whether it was said what became of a finding."""
    from ochredb.catalog.facts import CATALOG, LOG

    if finding.place == LOG:  # Requests that lie in the catalog.
        return any(item["place"].startswith(f"{CATALOG}: ") for item in done)
    return any(finding.place in item["place"] for item in done)


def _left(finding: Finding) -> dict[str, Any]:
    return {
        "collection": ", ".join(finding.collections),
        "place": finding.place,
        "outcome": "left",
        "told": f"{told(finding).removeprefix(f'{finding.place}: ')}; nothing was done about it",
    }


def _tell(
    path: str,
    done: list[dict[str, Any]],
    kept: str | None,
    as_json: bool,
    advice: str | None,
    unfinished: Sequence[str] = (),
) -> int:
    import orjson

    is_well = all(item["outcome"] in ("put back", "built anew") for item in done)
    if as_json:
        document = {"repaired": done, "is_well": is_well, "kept": kept, "unfinished": unfinished}
        print(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
        return 0 if is_well else FAILURE
    for item in done:
        print(f"{item['outcome']}: {item['place']}: {item['told']}")
        for lost in item.get("lost", ())[:_TOLD_LOST]:
            print(f"  id {lost['id'] or 'unknown'}, offset {lost['offset'] or 'unknown'}")
        if len(item.get("lost", ())) > _TOLD_LOST:
            print(f"  and {len(item['lost']) - _TOLD_LOST} more; --json names all of them")
    if kept is not None:
        print(f"kept as it was: {kept}; delete it when nobody needs it any more")
    for folder in unfinished:
        print(f"{folder}: of a repair that was cut off; loss-*.json there say what it gave up")
    if not done:
        print(f"{path}: undamaged")
    elif advice is not None and any(item["outcome"] == "left" for item in done):
        print(advice)
    return 0 if is_well else FAILURE
