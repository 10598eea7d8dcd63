"""A server whose compaction is paused takes writes up to its limit exactly, and answers all reads.

Nothing is folded behind the back of the test, so what is accepted and refused is exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pybase64 import b64encode_as_string

import ochredb
from ochredb.catalog.appends import BacklogLimits
from ochredb.testing.server_process import ochredb_server

BATCH = 10_000
LIMIT = BacklogLimits().tail_rows_max
PATH = "/api/v2/tenants/default_tenant/databases/default_database/collections"


def _body(first: int, count: int) -> dict[str, Any]:
    numbers = range(first, first + count)
    vectors = np.array([(number, 1.0) for number in numbers], "<f4")
    return {
        "ids": [f"id-{number}" for number in numbers],
        "embeddings": [b64encode_as_string(row.tobytes()) for row in vectors],
        "metadatas": [{"third": number % 3} for number in numbers],
    }


@pytest.mark.timeout(180)
def test_paused_it_refuses_the_first_row_beyond_the_limit_and_reads_go_on(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with (
        ochredb_server(root, "--pause-compaction") as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        collection = f"{PATH}/{client.post(PATH, json={'name': 'full'}).json()['id']}"
        other = f"{PATH}/{client.post(PATH, json={'name': 'other'}).json()['id']}"
        for first in range(0, LIMIT - BATCH, BATCH):
            assert client.post(f"{collection}/add", json=_body(first, BATCH)).status_code == 201
        too_many = client.post(f"{collection}/add", json=_body(LIMIT - BATCH, BATCH + 1))
        assert too_many.status_code == 429, "all of a request or nothing"
        assert client.post(f"{collection}/add", json=_body(LIMIT - BATCH, BATCH)).status_code == 201
        for verb, body in (
            ("add", _body(LIMIT, 1)),
            ("upsert", _body(0, 1)),
            ("update", _body(0, 1)),
            ("delete", {"ids": ["id-0"]}),
            ("delete", {"where": {"third": 1}}),
        ):
            refused = client.post(f"{collection}/{verb}", json=body)
            assert refused.status_code == 429, (verb, refused.text)
            assert int(refused.headers["retry-after"]) >= 1
            assert f"limit {LIMIT}" in refused.json()["message"]
        assert client.post(f"{other}/add", json=_body(0, 1)).status_code == 201, "only that one"
        assert client.get(f"{collection}/count").json() == LIMIT
        third = {"where": {"third": 1}, "include": []}
        assert len(client.post(f"{collection}/get", json=third).json()["ids"]) == len(
            range(1, LIMIT, 3)
        )
        query = {"query_embeddings": [[LIMIT - 1.2, 1.0]], "n_results": 3, "include": []}
        assert client.post(f"{collection}/query", json=query).json()["ids"] == [
            [f"id-{LIMIT - 1}", f"id-{LIMIT - 2}", f"id-{LIMIT - 3}"]
        ]
        status = client.get(f"{collection}/indexing_status").json()
        assert status["num_unindexed_ops"] == LIMIT, "nothing was folded"
    with ochredb.PersistentClient(str(root)) as embedded:
        # An embedded writer makes room by itself.
        full = embedded.get_collection("full", embedding_function=None)
        full.add(ids=["one-more"], embeddings=[[0.0, 1.0]])
        assert full.count() == LIMIT + 1
