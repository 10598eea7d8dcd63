"""`ochredb quarantine`: operations that could not be folded, on a directory or a server."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from ochredb_node.cli_common import FAILURE, USAGE_ERROR, add_token, failed, token_headers

if TYPE_CHECKING:
    from ochredb.api.transport import Response, Transport

COMMAND = "quarantine"
_PATH = "/api/v2/quarantine"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        COMMAND,
        help="look at operations that could not be folded",
        description=(
            "Operations that no release could fold, because of a bug of the one that wrote them."
            " Reads skip them; their bytes are kept until they are dropped here."
        ),
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action, text in (
        ("list", "list them"), ("show", "print what can be read of one"),
        ("drop", "forget one for ever: there is no other copy"),
    ):  # fmt: skip
        sub = actions.add_parser(action, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.add_argument(
            "target", metavar="PATH|URL", help="directory of the data, or http(s)://host:port"
        )
        if action == "list":
            sub.add_argument("--json", action="store_true", help="print JSON, one object a line")
        else:
            sub.add_argument("collection", metavar="COLLECTION_ID", help="as `list` prints it")
            sub.add_argument("offset", metavar="OFFSET", type=int, help="its first offset")
        if action == "show":
            sub.add_argument("--output", metavar="FILE", help="write its bytes to a new file")
        add_token(sub)


def run(options: dict[str, Any]) -> int:
    """Returns the exit status: 0, or 1 if it failed."""
    # Late: `ochredb --help` needs none of it.
    from ochredb.api.exceptions import ChromaError
    from ochredb.errors import OchreError
    from ochredb.storage.open_directory import CATALOG_FILE

    target = options["target"]
    is_url = target.startswith(("http://", "https://"))
    if not is_url and not os.path.exists(os.path.join(target, CATALOG_FILE)):
        message = f"{target} is neither a URL nor a directory with an OchreDB database"
        return failed(message, USAGE_ERROR)
    try:
        transport = _open(target, is_url, options)
        try:
            {"list": _list, "show": _show, "drop": _drop}[options["action"]](transport, options)
        finally:
            transport.close()
    except (OchreError, ChromaError, OSError) as error:
        return failed(error, FAILURE)
    return 0


def _open(target: str, is_url: bool, options: dict[str, Any]) -> Transport:
    from ochredb.api.transport import HttpTransport
    from ochredb.embedded import open_transport

    if is_url:
        return HttpTransport(target, headers=token_headers(options) or {})
    return open_transport(target)


def _list(transport: Transport, options: dict[str, Any]) -> None:
    import orjson

    count = 0
    for item in _items(transport):
        operations = item["last_offset"] - item["first_offset"] + 1
        count += operations
        if options["json"]:
            print(orjson.dumps(item).decode())
            continue
        name = f"{item['tenant']}/{item['database']}/{item['collection']}"
        when = datetime.fromtimestamp(item["time_us"] / 1e6, UTC)
        print(
            f"{item['collection_id']} {item['first_offset']}  {name}  "
            f"{operations:,} operation{'' if operations == 1 else 's'}  "
            f"{when:%Y-%m-%d %H:%M:%S}  {item['reason']}"
        )
    if not options["json"]:
        noun = "operation" if count == 1 else "operations"
        print(f"{count:,} {noun} in quarantine" if count else "nothing is in quarantine")


def _items(transport: Transport) -> Iterator[dict[str, Any]]:
    import orjson

    query: dict[str, Any] = {}
    while True:
        page = orjson.loads(_send(transport, "GET", _PATH, urlencode(query)).body)
        yield from page["operations"]
        if page["is_last"]:
            return
        last = page["operations"][-1]
        query = {"after_collection": last["collection_id"], "after_offset": last["first_offset"]}


def _show(transport: Transport, options: dict[str, Any]) -> None:
    import orjson

    from ochredb.quarantine import Unfoldable, describe

    data = bytes(_send(transport, "GET", _place(options)).body)
    if options["output"] is not None:
        with open(options["output"], "xb") as file:
            file.write(data)
        print(f"{options['output']}: {len(data):,} bytes")
        return
    try:
        for record in describe(data):
            print(orjson.dumps(record).decode())
    except Unfoldable as error:
        print(f"{len(data):,} bytes: {error}", file=sys.stderr)
        print(repr(data[:1_000]))


def _drop(transport: Transport, options: dict[str, Any]) -> None:
    _send(transport, "DELETE", _place(options))
    print(f"dropped {options['collection']} {options['offset']}")


def _place(options: dict[str, Any]) -> str:
    return f"{_PATH}/{quote(options['collection'], safe='')}/{options['offset']}"


def _send(transport: Transport, method: str, path: str, query: str = "") -> Response:
    from ochredb.api.exceptions import error_from_response

    response = transport.send(method, path, None, query)
    if response.status >= 400:
        raise error_from_response(response.status, response.headers, response.body)
    return response
