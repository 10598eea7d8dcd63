"""`ochredb run` that shares its connections with a reader process as soon as anything is read.

However busy the machine is, and however many processors it has. Everything else, and the arguments,
are the command's own.
"""

from __future__ import annotations

import math
import sys

import ochredb_frontend.sharing as sharing
import ochredb_node.cli as cli
import ochredb_node.readers as readers
from ochredb_node.node import Node


def one(node: Node) -> int:
    del node
    return 1


if __name__ == "__main__":
    sharing._BUSY, sharing._GAP_MIN, sharing._READS_PER_TURN_MIN = 0.0, -math.inf, 1
    sharing._AGAIN_S = 1.0
    readers.readers_max = one
    sys.exit(cli.main())
