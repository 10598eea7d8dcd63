"""A server's native libraries have one thread each, whatever its environment says of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ochredb.testing.server_process import ONE_THREAD

_PRODUCT = """
import os
from ochredb_node import cli
from ochredb_node.native import tune_native_libraries
if {tuned}:
    tune_native_libraries()
import numpy
rows = numpy.ones((20_000, 128), numpy.float32)
rows @ rows[:64].T
print(len(os.listdir("/proc/self/task")))
"""


def _threads_after_a_product(*, tuned: bool, **more: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if name not in ONE_THREAD}
    done = subprocess.run(
        [sys.executable, "-c", _PRODUCT.format(tuned=tuned)],
        env={**inherited, **more},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(done.stdout)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_a_product_is_computed_by_the_thread_that_asks_for_it() -> None:
    if _threads_after_a_product(tuned=False) == 1:
        pytest.skip("one processor, or a library without threads: nothing to keep from it")
    assert _threads_after_a_product(tuned=True) == 1
    assert _threads_after_a_product(tuned=True, OPENBLAS_NUM_THREADS="2") == 2, (
        "as it was asked for"
    )
