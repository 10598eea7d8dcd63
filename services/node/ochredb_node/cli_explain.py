"""`ochredb explain`: run one read, on a directory or a server, and show what was executed."""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING, Any

from ochredb_node.cli_common import FAILURE, USAGE_ERROR, add_token, failed, token_headers

if TYPE_CHECKING:
    from ochredb import ClientAPI, Collection
    from ochredb.api.types import GetResult, QueryResult

COMMAND = "explain"
_N_RESULTS = 10
_QUERY_ONLY = ("n_results", "exact", "target_recall")
_GET_ONLY = ("limit",)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        COMMAND,
        help="show how a read is executed",
        description=(
            "Run one read and show the steps that were executed, with rows, choices and times."
            " With --vector or --like it is a query for the nearest records, otherwise a get."
        ),
    )
    add = parser.add_argument
    add("target", metavar="PATH|URL", help="directory of the data, or http(s)://host:port")
    add("collection", metavar="COLLECTION", help="the collection's name")
    add("--tenant", help="default: default_tenant")
    add("--database", help="default: default_database")
    add("--where", type=_object, metavar="JSON", help="filter on metadata and documents")
    add("--where-document", type=_object, metavar="JSON", help="filter on documents")
    vector = parser.add_mutually_exclusive_group()
    vector.add_argument("--vector", type=_numbers, metavar="JSON", help="query for this embedding")
    vector.add_argument("--like", metavar="ID", help="query for this record's embedding")
    add("--n-results", type=int, metavar="N", help=f"of a query (default: {_N_RESULTS})")
    add("--exact", action="store_true", default=None, help="query without an approximate index")
    add(
        "--target-recall", type=float, metavar="SHARE",
        help="of a query: from 0 (the collection's ef_search alone) to below 1",
    )  # fmt: skip
    add("--limit", type=int, metavar="N", help="of a get (default: all that match)")
    add("--warm", action="store_true", help="run it once before, so that all is in memory")
    add("--json", action="store_true", help="print JSON instead of a tree")
    add_token(parser)


def explain(options: dict[str, Any]) -> int:
    """Returns the exit status: 0, 1 if the read failed, 2 for options that contradict."""
    kind, wrong = ("query", _GET_ONLY) if _is_query(options) else ("get", _QUERY_ONLY)
    for name in wrong:
        if options[name] is not None:
            return failed(f"--{name.replace('_', '-')} is not for a {kind}", USAGE_ERROR)
    # Late: `ochredb --help` needs none of it.
    from ochredb.api.exceptions import ChromaError

    try:
        with _client(options) as client:
            # Without a function: nothing is embedded here, and the stored one may be unknown.
            collection = client.get_collection(options["collection"], embedding_function=None)
            vector = _vector(collection, options)
            if options["warm"]:
                _read(collection, vector, options)
            started = time.perf_counter()
            answer = _read(collection, vector, options)
            elapsed_us = (time.perf_counter() - started) * 1e6
    except (ChromaError, ValueError, TypeError, OSError) as error:
        return failed(str(error), FAILURE)
    if "plan" not in answer:
        return failed(f"{options['target']} answers without a plan", FAILURE)
    _show(answer, elapsed_us, as_json=options["json"])
    return 0


def _show(answer: GetResult | QueryResult, elapsed_us: float, *, as_json: bool) -> None:
    found: list[Any] = answer["ids"]
    records = len(found[0]) if "distances" in answer else len(found)
    if as_json:
        import orjson

        document = {
            "records": records,
            "elapsed_us": round(elapsed_us, 1),
            "plan": answer["plan"].to_json(),
        }
        print(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
        return
    from shutil import get_terminal_size

    from ochredb.explain import WIDTH, tree

    print(tree(answer["plan"], get_terminal_size((WIDTH, 24)).columns))
    noun = "record" if records == 1 else "records"
    print(f"\n{records:,} {noun} in {elapsed_us / 1000:.2f} ms, as the client saw it")


def _read(
    collection: Collection, vector: list[float] | None, options: dict[str, Any]
) -> GetResult | QueryResult:
    filters = {"where": options["where"], "where_document": options["where_document"]}
    if vector is None:
        return collection.get(**filters, limit=options["limit"], explain=True)
    n_results = options["n_results"]
    return collection.query(
        vector,
        n_results=_N_RESULTS if n_results is None else n_results,
        **filters,
        exact=bool(options["exact"]),
        target_recall=options["target_recall"],
        explain=True,
    )


def _is_query(options: dict[str, Any]) -> bool:
    return options["vector"] is not None or options["like"] is not None


def _vector(collection: Collection, options: dict[str, Any]) -> list[float] | None:
    """What to query for. Raises ValueError if no record has the id that was given."""
    if options["like"] is None:
        vector: list[float] | None = options["vector"]
        return vector
    found = collection.get(ids=[options["like"]], include=["embeddings"])["embeddings"]
    if found is None or len(found) == 0:
        raise ValueError(f"no record {options['like']} in {collection.name}")
    return [float(number) for number in found[0]]


def _client(options: dict[str, Any]) -> ClientAPI:
    """Raises ValueError, rather than making a new store, if there is none in the directory."""
    import ochredb
    from ochredb.storage.open_directory import CATALOG_FILE

    names = {name: options[name] for name in ("tenant", "database") if options[name] is not None}
    target = options["target"]
    if target.startswith(("http://", "https://")):
        return ochredb.HttpClient(target, headers=token_headers(options), **names)
    if not os.path.exists(os.path.join(target, CATALOG_FILE)):
        raise ValueError(f"{target} is neither a URL nor a directory with an OchreDB database")
    return ochredb.PersistentClient(target, **names)


def _object(text: str) -> dict[str, Any]:
    value = _json(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, not {text}")
    return value


def _numbers(text: str) -> list[float]:
    value = _json(text)
    if not isinstance(value, list) or any(type(item) not in (int, float) for item in value):
        raise argparse.ArgumentTypeError(f"expected a JSON list of numbers, not {text}")
    return value


def _json(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
