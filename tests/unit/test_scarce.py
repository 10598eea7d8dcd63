"""Little memory, few threads and descriptors: what is refused, and what goes on with less."""

from __future__ import annotations

import asyncio
import resource
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from ochredb.cancel import Cancel
from ochredb.errors import OutOfMemory, StorageFull
from ochredb.types import Op
from ochredb_frontend import room
from ochredb_frontend.messages import error_response
from ochredb_frontend.pool import WorkerPool
from ochredb_frontend.server import connections_max

from .kernel import ids_of, make_collection, operations, running_node, submit


def _no_thread(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_pool_goes_on_with_the_threads_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> list[int]:
        pool = WorkerPool("test", threads=8, queue_max=10)
        assert await pool.submit(lambda: 0) == 0
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", _no_thread)
            futures = [pool.submit(partial(abs, number)) for number in range(5)]
            results = await asyncio.gather(*futures)
        pool.close()
        assert pool.pending == 0
        return results

    assert asyncio.run(run()) == [0, 1, 2, 3, 4]


def test_a_pool_without_any_thread_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        pool = WorkerPool("test", threads=1, queue_max=10)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", _no_thread)
            with pytest.raises(OutOfMemory, match="no thread"):
                pool.submit(lambda: 0)
        assert pool.pending == 0
        assert await pool.submit(lambda: 1) == 1
        pool.close()

    asyncio.run(run())


def test_a_log_without_a_thread_takes_nothing_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_node(str(tmp_path)) as node:
        collection = make_collection(node)
        add = operations(Op.ADD, ["a"], [[1.0]])
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", _no_thread)
            with pytest.raises(OutOfMemory, match="no thread"):
                node.log.submit(collection, add, cancel=Cancel(), deliver=lambda _: None)
        assert ids_of(node, collection) == []
        assert submit(node, collection, add).first_offset == 1


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [(MemoryError(), 503, "1"), (OutOfMemory("x"), 503, "1"), (StorageFull("x"), 507, "5")],
)
def test_what_a_client_is_told(error: Exception, status: int, retry: str) -> None:
    response = error_response(error)
    assert response.status == status
    assert dict(response.headers)["retry-after"] == retry


def test_room_for_an_answer_is_taken_as_the_encoder_will_take_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(room, "bytearray", taken.append, raising=False)
    room.make_sure_of(100_000)
    assert taken == [1 << power for power in range(10, 19)]


def test_whether_memory_is_refused_at_all_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(_kind: int) -> tuple[int, int]:
        return 1 << 32, resource.RLIM_INFINITY

    monkeypatch.setattr(resource, "getrlimit", limited)
    assert room.memory_can_run_out.__wrapped__()


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1_024, 1_024 - 64 - 40), (100, 50), (resource.RLIM_INFINITY, sys.maxsize)],
)
def test_connections_leave_descriptors(
    monkeypatch: pytest.MonkeyPatch, limit: int, expected: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (limit, limit))
    assert connections_max(threads=10) == expected
