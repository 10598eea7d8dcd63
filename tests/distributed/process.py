"""What a process of a cluster runs: `ochredb serve`, or a client of the storm.

OCHREDB_TEST_MODE says what is made small or eager, so that little data crosses every border:

    ""      nothing: it is the command itself
    eager   folds, merges and collections all the time, objects for half of the writes
    small   merges, graphs and indexes with tens of rows; graphs are never used by the planner
    graphs  the same, and graphs are always used; each use adds a byte to OCHREDB_TEST_PROBE

OCHREDB_TEST_FAULT plants a bug, which the judges must find:

    lost    a log node says that it has committed, and has not, now and then
    stale   a query node reads what was there up to half a second ago

Run as a program it is the nursery that forks such processes; with arguments, one of them.
"""

from __future__ import annotations

import dataclasses
import os
import random
import sys
import time
from functools import partial
from typing import Any

import ochredb_node.cli as cli
from ochredb_compactor.config import CompactorConfig
from ochredb_node.config import NodeConfig
from ochredb_node.settings import Settings

GRACE_S = 3.0  # Shorter than some uploads under faults: those must be done again.
_CLONE_NEWNET = 0x40000000
_as_set = cli.node_config


def eager(settings: Settings) -> NodeConfig:
    plain: NodeConfig = _as_set(settings)
    compactor = dataclasses.replace(
        plain.compactor,
        tail_rows_due=60,
        tail_bytes_due=64 << 10,
        idle_due_s=0.1,
        replaced_retention_s=0.5,
        grace_s=GRACE_S,
        collect_period_s=0.5,
        sweep_period_s=2.0,
    )
    log = dataclasses.replace(plain.log, inline_bytes_max=1200)
    return dataclasses.replace(plain, compactor=compactor, log=log)


def small(settings: Settings) -> NodeConfig:
    plain: NodeConfig = _as_set(settings)
    compactor = CompactorConfig(grace_s=GRACE_S, graph_threads=1, paused=plain.compactor.paused)
    log = dataclasses.replace(plain.log, inline_bytes_max=2 << 10)
    return dataclasses.replace(plain, compactor=compactor, log=log)


def apply_mode(mode: str) -> None:
    """Before `main`."""
    if mode == "eager":
        cli.node_config = eager
    elif mode in ("small", "graphs"):
        import pytest

        from tests.property.drivers import make_small

        make_small(
            pytest.MonkeyPatch(),
            graphs=mode == "graphs",
            steps=False,
            probe_path=os.environ["OCHREDB_TEST_PROBE"],
        )
        cli.node_config = small
    else:
        assert not mode, f"no such mode: {mode}"


def plant(fault: str, role: str) -> None:
    """A bug in processes of one role."""
    if fault == "lost" and role == "log":
        from ochredb.catalog.postgres_session import PostgresSession

        commit, rng = PostgresSession.commit, random.Random(1)

        def sometimes(self: PostgresSession) -> None:
            (self.roll_back if rng.random() < 0.03 else partial(commit, self))()

        PostgresSession.commit = sometimes  # type: ignore[method-assign]
    elif fault == "stale" and role == "query":
        from ochredb.catalog.logs import LogTable
        from ochredb.types import Snapshot

        now, kept = LogTable.snapshot, dict[str, tuple[float, Snapshot]]()

        def lately(self: LogTable, collection: str) -> Snapshot:
            if time.monotonic() > kept.get(collection, (0.0, None))[0] + 0.5:
                kept[collection] = (time.monotonic(), now(self, collection))
            return kept[collection][1]

        LogTable.snapshot = lately  # type: ignore[method-assign]


def enter_network(path: str) -> None:
    """Go over to another network namespace; before there are threads."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {path}")


def main() -> None:
    """With the arguments of `ochredb`."""
    apply_mode(os.environ.get("OCHREDB_TEST_MODE", ""))
    plant(os.environ.get("OCHREDB_TEST_FAULT", ""), os.environ["OCHREDB_ROLES"])
    sys.exit(cli.main())


def run(order: dict[str, Any]) -> None:
    """In a fork. An order has `arguments` and `environment` of `ochredb`, or is a client's."""
    if "client" in order:
        from tests.distributed.storm_client import client

        client(order)
        return
    os.environ.update(order["environment"])
    if namespace := os.environ.get("OCHREDB_TEST_NAMESPACE"):
        enter_network(namespace)
    sys.argv = ["ochredb", *order["arguments"]]
    # As if it had been started so: a compactor's workers are started from this.
    sys.orig_argv = [sys.executable, "-m", "tests.distributed.process", *order["arguments"]]
    main()


if __name__ == "__main__":
    if sys.argv[1:]:
        main()
    from tests.crash import nursery
    from tests.distributed.preload import preload

    preload()
    nursery.serve(run)
