"""The runs that `make bench` makes: what each asks of peer_bench.

The official server takes 600 to 1,000 records a second at 128 dimensions and 330 to 600 at 768, so
each run writes into it only as often as its bars need: that is most of the 6 to 10 minutes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import orjson

READS = "query,target,filter,doc,get,ryw"


@dataclasses.dataclass(frozen=True)
class Size:
    """One run on fresh servers.

    arguments: of peer_bench. cold: whether to stop both servers afterwards and time their starts.
    """

    title: str
    arguments: tuple[str, ...]
    cold: bool = True


SIZES = {
    "20k-128": Size(
        "20k × 128",
        (
            *("--n", "20000", "--dims", "128"),
            *("--only", f"{READS},indexed,settle,mix,spaces,under_ingest"),
            *("--indexed-rounds", "2", "--indexed-rounds-b", "1"),
            *("--writers", "4", "--spaces-n", "10000"),
        ),
    ),
    "20k-768": Size(
        "20k × 768",
        (
            *("--n", "20000", "--dims", "768", "--only", f"{READS},indexed,settle,mix,spaces"),
            *("--indexed-rounds", "2", "--indexed-rounds-b", "1"),
            *("--writers", "4", "--writers-n", "10000", "--spaces-n", "5000"),
        ),
    ),
    "100k-128": Size(
        "100k × 128",
        (
            *("--n", "100000", "--dims", "128", "--only", f"{READS},indexed,settle"),
            *("--indexed-rounds", "2", "--indexed-rounds-b", "1"),
        ),
    ),
    "many": Size(
        "5,000 collections",
        (
            *("--n", "1000", "--dims", "128", "--only", "many"),
            *("--many", "5000", "--many-b", "500"),
        ),
        cold=False,
    ),
    "quick": Size(
        "5k × 128",
        (
            *("--quick", "--dims", "128", "--only", f"{READS},indexed,settle,mix"),
            *("--indexed-rounds", "1", "--writers", "4"),
        ),
        cold=False,
    ),
}
FULL = ("20k-128", "20k-768", "100k-128", "many")
RECORD_SIZES = ("20k-128", "20k-768", "100k-128")


def load_results(results: Path) -> dict[str, dict[str, Any]]:
    """Return the results that are there, by name, in the order of SIZES."""
    paths = {name: results / f"{name}.json" for name in SIZES}
    return {name: orjson.loads(path.read_bytes()) for name, path in paths.items() if path.exists()}
