"""Long work without the interpreter yields to everything else; its caller does not."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from ochredb.priority import at_lowest_priority


def _priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities on Linux only")
def test_the_work_has_the_lowest_priority_and_the_caller_keeps_its_own() -> None:
    before = _priority()
    assert at_lowest_priority(_priority) == 19
    assert _priority() == before


def test_results_and_errors_come_back() -> None:
    assert at_lowest_priority(lambda: "done") == "done"
    assert at_lowest_priority(lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        at_lowest_priority(lambda: 1 // 0)
    with pytest.raises(KeyboardInterrupt):
        at_lowest_priority(_interrupted)


def _interrupted() -> None:
    raise KeyboardInterrupt
