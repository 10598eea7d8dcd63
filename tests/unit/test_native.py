"""A server's native libraries have one thread each, unless its environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ochredb.testing.server_process import ONE_THREAD

# What a command does before it starts anything, and then a product.
_PRODUCT = """
import os, sys
from ochredb_node import cli
cli.run = cli.serve = lambda *_: 0
if sys.argv[1:]:
    cli.main(sys.argv[1:])
import numpy
rows = numpy.ones((20_000, 128), numpy.float32)
rows @ rows[:64].T
print(len(os.listdir("/proc/self/task")))
"""


def _threads_after_a_product(command: list[str], **more: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if name not in ONE_THREAD}
    done = subprocess.run(
        [sys.executable, "-c", _PRODUCT, *command],
        env={**inherited, **more},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
@pytest.mark.parametrize("command", [["run"], ["serve", "--roles", "query"]])
def test_a_product_is_computed_by_the_thread_that_asks_for_it(command: list[str]) -> None:
    if _threads_after_a_product([]) == 1:
        pytest.skip("one processor, or a library without threads: nothing to keep from it")
    assert _threads_after_a_product(command) == 1
    assert _threads_after_a_product(command, OPENBLAS_NUM_THREADS="2") == 2, "as it was asked for"
