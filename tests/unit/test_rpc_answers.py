"""Answers between processes: large ones, and calls that end at any moment."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ochredb.cancel import Cancel, Cancelled
from ochredb.errors import DeadlineExceeded, OutcomeUnknown
from ochredb.peers import GetRequest, QueryRequest
from ochredb.rpc.config import RpcConfig
from ochredb.types import Field, Op, QueryAnswer, Records

from .kernel import make_collection, operations, running_node
from .rpc_kernel import served_role, serving

_WAIT_S = 30.0


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


class _Large:
    """A query role with much to say."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.records = Records(
            ids=[f"id-{row}" for row in range(3_000)],
            documents=[None if row % 7 == 0 else "größe " * (row % 50) for row in range(3_000)],
            uris=[None] * 3_000,
            metadatas=[b'{"n":%d}' % row if row % 2 else None for row in range(3_000)],
            embeddings=rng.standard_normal((3_000, 64), np.float32),
        )
        self.records.documents = ["x" * 3_000_000, *(self.records.documents or [])[1:]]

    def get(self, _collection_id: str, _request: GetRequest, *, cancel: Cancel) -> Records:
        return self.records

    def query(self, _collection_id: str, _request: QueryRequest, *, cancel: Cancel) -> QueryAnswer:
        distances = np.sort(np.random.default_rng(2).random(3_000, np.float32))
        distances[-2:] = np.inf, np.nan
        splits = [0, 1_000, 1_000, 3_000]
        return QueryAnswer(
            self.records.split(splits), [distances[:1_000], distances[:0], distances[1_000:]]
        )


def test_answers_beyond_the_limit_of_a_message() -> None:
    """A single document is beyond it too."""
    role = _Large()
    config = RpcConfig(message_bytes_max=200_000, chunk_bytes=50_000)
    with served_role(role, config) as (_, _, query):
        found = query.get("c", GetRequest(fields=Field.DOCUMENT), cancel=Cancel())
        assert found.embeddings is not None
        assert role.records.embeddings is not None
        assert np.array_equal(found.embeddings, role.records.embeddings)
        assert found.ids == role.records.ids
        assert found.documents == role.records.documents
        assert found.uris == role.records.uris
        assert found.metadatas == role.records.metadatas
        request = QueryRequest(embeddings=np.ones((3, 64), np.float32))
        answer, expected = (
            query.query("c", request, cancel=Cancel()),
            role.query("c", request, cancel=Cancel()),
        )
        assert [each.ids for each in answer.records] == [each.ids for each in expected.records]
        for got, wanted in zip(answer.distances, expected.distances, strict=True):
            assert got.tobytes() == wanted.tobytes()


def test_calls_that_end_at_any_moment_leave_nothing_behind(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    """Writes and reads, cancelled or out of time at random: no thread stays, no write is lost."""
    rng = random.Random(7)
    with running_node(str(tmp_path / "store")) as node, serving(node) as remote:
        collection = make_collection(node)

        def call(number: int, cancel: Cancel) -> str | None:
            """The name of what was acknowledged."""
            try:
                if number % 2:
                    remote.query.get(collection, GetRequest(), cancel=cancel)
                    return None
                name = f"id-{number}"
                remote.log.append(collection, operations(Op.ADD, [name], [[1.0]]), cancel=cancel)
            except (OutcomeUnknown, DeadlineExceeded, Cancelled):
                return None
            return name

        acknowledged = set()
        for _ in range(6):
            cancels = [Cancel(rng.uniform(0.0005, 0.05)) for _ in range(50)]
            calls = [threads.submit(call, rng.randrange(10**9), cancel) for cancel in cancels]
            for cancel in rng.sample(cancels, 25):
                threading.Event().wait(rng.uniform(0, 0.002))
                cancel.cancel()
            acknowledged |= {each.result(_WAIT_S) for each in calls}
        for pool in remote.server._pools.values():
            assert pool.wait_idle(_WAIT_S)
        found = remote.query.get(collection, GetRequest(), cancel=Cancel()).ids
        assert acknowledged - {None} <= set(found)
        assert len(found) == node.logs.snapshot(collection).last_offset
