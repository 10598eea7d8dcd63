"""`ochredb run` whose compaction, merging and collection are due soon, as in a busy store."""

from __future__ import annotations

import dataclasses
import sys

import ochredb_node.cli as cli
from ochredb_compactor.config import CompactorConfig
from ochredb_node.node import NodeConfig
from ochredb_node.settings import Settings

as_set = cli.node_config


def node_config(settings: Settings) -> NodeConfig:
    eager = CompactorConfig(
        tail_rows_due=100,
        idle_due_s=0.3,
        grace_s=1.0,
        replaced_retention_s=0.5,
        collect_period_s=0.3,
        sweep_period_s=2.0,
    )
    plain: NodeConfig = as_set(settings)
    return dataclasses.replace(plain, compactor=eager)


if __name__ == "__main__":
    cli.node_config = node_config
    sys.exit(cli.main())
