"""`ochredb run` with compaction, merging and collection due all the time instead of now and then.

So that kills hit them often; also a dead process's lease is taken over at once. Everything else,
and the arguments, are the command's own.
"""

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
        tail_rows_due=150,
        tail_bytes_due=256 << 10,
        idle_due_s=0.1,
        lease_ttl_s=0.2,
        grace_s=0.5,
        collect_period_s=0.2,
        sweep_period_s=0.5,
    )
    plain: NodeConfig = as_set(settings)
    return dataclasses.replace(plain, compactor=eager)


if __name__ == "__main__":
    cli.node_config = node_config
    sys.exit(cli.main())
