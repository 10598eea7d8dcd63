"""Ctrl-C while a catalog in memory is read: the lock of its one connection is free afterwards."""

from __future__ import annotations

import contextlib
import dis
import sys
import threading
from typing import Any

import pytest

from ochredb.catalog.migrate import open_memory
from ochredb.clock import SystemClock
from ochredb.ids import IdSource


def _other_thread_takes(lock: Any) -> bool:
    taken: list[bool] = []
    thread = threading.Thread(target=lambda: taken.append(lock.acquire(timeout=5)))
    thread.start()
    thread.join()
    return taken[0]


@pytest.mark.parametrize("nested", [False, True])
def test_an_interrupt_of_a_read_leaves_the_lock_of_a_catalog_in_memory_free(nested: bool) -> None:
    """Ctrl-C wherever Python looks for it while the block is entered or left: others go on."""
    database, _ = open_memory(SystemClock(), IdSource())
    steps = 0

    def read_interrupted_at(number: int) -> bool:
        """Whether the read ended before so many steps."""
        nonlocal steps
        steps = 0
        before: dict[Any, str] = {}

        def trace(frame: Any, event: str, _arg: object) -> Any:
            nonlocal steps
            if "catalog" not in frame.f_code.co_filename:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                if before.get(frame, "").startswith(("CALL", "RESUME")):  # There it looks.
                    steps += 1
                    if steps == number:
                        raise KeyboardInterrupt
                before[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            return trace

        outer = database.read() if nested else contextlib.nullcontext()
        with outer:
            sys.settrace(trace)
            try:
                with database.read():
                    pass
            except KeyboardInterrupt:
                return False
            finally:
                sys.settrace(None)
        return True

    number = 1
    while not read_interrupted_at(number):
        assert _other_thread_takes(database._lock), f"after an interrupt at step {number}"
        database._lock = type(database._lock)()  # Of the thread that took it and is gone.
        number += 1
    assert number > 5
    database.close()
