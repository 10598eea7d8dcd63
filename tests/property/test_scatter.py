"""A collection that is spread over query nodes answers as one node does, bit for bit. (I5, I10)

The state machine of `machine.py`, with each read answered by one node alone, and by each of three
nodes that all own some of the parts: all four answers are equal, and equal to the model's.
"""

from __future__ import annotations

import json
import os
import zlib
from typing import Any

import orjson
import pytest

from ochredb.testing.model import canonical
from ochredb_compactor import scheduler
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.messages import Request
from ochredb_frontend.service import Frontend
from ochredb_query.config import QueryConfig

from .drivers import EmbeddedDriver, make_small
from .machine import RECALL_MIN, Run, run_steps
from .query_nodes import QueryNodes

_STEPS = int(os.environ.get("OCHREDB_SCATTER_STEPS", "1200"))
_READS = ("get", "query", "count")
_NODES = 3


class ScatteredDriver(EmbeddedDriver):
    """Every read is asked of a node alone, and of nodes that share the parts."""

    reads = shared = 0

    def _start(self) -> None:
        super()._start()
        if (before := self.__dict__.get("nodes")) is not None:
            before.close()
        self.nodes = QueryNodes(self.node, _NODES, QueryConfig(spread_bytes=0))
        self._frontends = [
            Frontend(
                self.node.namespace,
                self.node.log,
                service,
                FrontendConfig(allow_reset=True),
                clock=self.node.clock,
            )
            for service in self.nodes.services
        ]

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        status, answer = super().call(method, path, body)
        if path.partition("?")[0].rsplit("/", 1)[-1] in _READS:
            before = sum(self.nodes.shares())
            for number, frontend in enumerate(self._frontends):
                found = _sent(frontend, method, path, body)
                what = f"query-{number}: {method} {path} {canonical(body)}"
                assert found[0] == status, what
                assert canonical(found[1]) == canonical(answer), what
            type(self).reads += 1
            type(self).shared += sum(self.nodes.shares()) > before
        return status, answer

    def close(self) -> None:
        self.nodes.close()
        super().close()


def _sent(frontend: Frontend, method: str, path: str, body: Any) -> tuple[int, Any]:
    path, _, query = path.partition("?")
    data = b"" if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    request = Request(method=method, path=path, query_string=query, headers=headers, body=data)
    response = frontend.handle(request)
    answer = bytes(response.body)
    return response.status, orjson.loads(answer) if answer else None


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("graphs", [False, True], ids=["scans", "graphs"])
def test_nodes_together_answer_as_one_alone(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = make_small(monkeypatch, graphs=graphs, steps=graphs)
    monkeypatch.setattr(scheduler, "GRAPH_PART_ROWS_MAX", 12)  # Several large parts.

    class Driver(ScatteredDriver):
        reads = shared = 0

    run = Run(Driver, probe)
    seed = zlib.crc32(f"scatter {graphs}".encode())
    run_steps(run, _STEPS / 2, seed, until=lambda: not graphs or run.recall.answers > 0)
    print(f"{run.step_count} steps, {Driver.reads} reads, {Driver.shared} of them shared")
    assert Driver.shared > 0.1 * Driver.reads
    assert graphs == (run.recall.answers > 0)
    assert run.recall.share >= RECALL_MIN
