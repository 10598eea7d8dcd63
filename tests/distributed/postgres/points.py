"""The scenarios of `tests/crash/points` on a catalog in PostgreSQL, and what a fresh process finds.

`python -m tests.distributed.postgres.points` is a nursery. An order names a `stage` (`prepare`,
`run`, `count`, `check`), a `scenario`, its `tree` and `journal`, the `url` of a database that is
the catalog, the crash `point` if any, and a `bug` to plant if any. `count` prints how often each
point was reached, `check` what is wrong, as a JSON list of texts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alembic.command  # noqa: F401  So that the children need not.
import psycopg

from ochredb import crash_points
from ochredb.catalog.migrate_postgres import open_postgres
from ochredb.catalog.postgres import CatalogClock
from ochredb.catalog.postgres_config import PostgresConfig
from ochredb.clock import Clock
from ochredb.ids import IdSource
from ochredb.storage.space import Reserve
from ochredb_node import foundation
from ochredb_node.config import NodeConfig
from ochredb_node.foundation import Catalog
from tests.crash.nursery import serve
from tests.crash.points.acts import prepare_write
from tests.crash.points.aftermath import check_trees
from tests.crash.points.journal import Journal
from tests.crash.points.plants import PLANTS
from tests.crash.points.scenarios import LEASE, SCENARIOS, commits, nothing
from tests.crash.points.stage import Stage


@dataclass(frozen=True)
class OnPostgres:
    """points: what a process is killed at, each in the middle of the run.

    is_old: what was prepared is taken back to the first format before the run.
    """

    run: Callable[[Stage], None]
    prepare: Callable[[Stage], None]
    points: tuple[str, ...]
    is_old: bool = False


def create(stage: Stage) -> None:
    with stage.node():
        pass


def _take_back(url: str) -> None:
    """What the later formats added is gone. (All that an older one had besides was never used.)"""
    schema = PostgresConfig().schema
    texts = (
        "DROP TABLE {0}.pins, {0}.quarantine",
        "UPDATE {0}.store SET format_version = 1",
        "UPDATE {0}.alembic_version SET version_num = '0001'",
    )
    with psycopg.connect(url) as connection:
        for text in texts:
            connection.execute(text.format(schema).encode())


def _of(name: str, points: tuple[str, ...]) -> OnPostgres:
    scenario = SCENARIOS[name]
    return OnPostgres(scenario.run, scenario.prepare, points)


ON_POSTGRES = {
    "create": OnPostgres(
        create,
        nothing,
        (
            "catalog.locked", "migration.committing", "migration.committed", "store-id.created",
            *commits("defaults-create"),
        ),
    ),
    "migrate": OnPostgres(
        create,
        prepare_write,
        ("catalog.locked", "migration.committing", "migration.committed"),
        is_old=True,
    ),
    "write": _of("write", commits("append", "record-nothing", "append-evaluated")),
    "compact": _of("compact", (*LEASE, *commits("version"))),
    "collect": _of(
        "collect",
        commits(
            "pin-expire", "expire-keys", "release-replaced", "gc-mark", "gc-forget",
            "sweep-condemn", "sweep-forget",
        ),
    ),
}  # fmt: skip


def _use(url: str) -> None:
    """Whatever node this process starts has its catalog there, and the time that it is told."""

    def open_catalog(config: NodeConfig, clock: Clock, ids: IdSource, reserve: Reserve) -> Catalog:
        del config, reserve
        database, store_id = open_postgres(url, clock, ids)
        return Catalog(
            database=database, store_id=store_id, name=database.place, clock=database.clock
        )

    def not_the_servers(_clock: CatalogClock, _server_us: int, _asked_s: float) -> None:
        """Days pass in a scenario, and none on the server."""

    foundation._open_catalog = open_catalog
    CatalogClock.set = not_the_servers  # type: ignore[assignment,method-assign]


def main(order: dict[str, Any]) -> None:
    _use(order["url"])
    name, tree, journal = order["scenario"], Path(order["tree"]), order["journal"]
    if order["stage"] == "check":
        print(json.dumps(check_trees(name, journal, str(tree))))
        return
    scenario = ON_POSTGRES[name]
    stage = Stage(tree, Journal(journal), setattr)
    hits: Counter[str] = Counter()
    if order["stage"] == "prepare":
        scenario.prepare(stage)
        if scenario.is_old:
            _take_back(order["url"])
    elif order["stage"] == "count":
        crash_points.observe(lambda point: hits.update([point]))
        scenario.run(stage)
        print(json.dumps(hits))
    else:
        if order["bug"]:
            PLANTS[order["bug"]].put()
        crash_points.observe(crash_points.armed({crash_points.VARIABLE: order["point"]}))
        scenario.run(stage)


if __name__ == "__main__":
    serve(main)
