"""Where the system may refuse memory: whether there is enough for an answer, before it is encoded.

orjson (3.11) does not look whether its buffer could grow: it would crash the process. Mostly the
system never refuses, but ends a process that is above its limit; then nothing is asked here.
"""

from __future__ import annotations

import contextlib
import functools
import resource

_OVERCOMMIT = "/proc/sys/vm/overcommit_memory"
_FIRST_BYTES = 1024  # Of orjson's buffer, which doubles.


@functools.cache
def memory_can_run_out() -> bool:
    """Whether the address space has a limit, or the system promises no more than it has."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return True
    with contextlib.suppress(OSError), open(_OVERCOMMIT, encoding="ascii") as file:
        return file.read().strip() == "2"
    return False  # Not Linux.


def make_sure_of(size: int) -> None:
    """Raises MemoryError unless there is room for an answer of about `size` bytes.

    Takes what orjson will take, block for block, so that the allocator has them ready afterwards.
    Cost: as writing four times so many bytes.
    """
    blocks = []
    block_bytes = _FIRST_BYTES
    while block_bytes < 4 * size + _FIRST_BYTES:
        blocks.append(bytearray(block_bytes))
        block_bytes *= 2
