"""Two query nodes before a real bucket: the second has on its disk what the first reads."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from functools import partial

import httpx
import numpy as np
import pytest

from ochredb.cluster.rendezvous import order

from .cluster import Cluster, Shape
from .drivers import ClusterDriver
from .members import Member

SHAPE = Shape(mode="graphs")
_DIM, _ROWS = 32, 600
_DATABASE = "/api/v2/tenants/default_tenant/databases/default_database"
_WAIT_S_MAX = 60.0


@pytest.fixture
def driver(cluster: Cluster) -> Iterator[ClusterDriver]:
    opened = ClusterDriver(cluster)
    yield opened
    opened.close()


def metric(member: Member, name: str) -> float:
    url = f"http://{member.host}:{member.health_port}/metrics"
    page = httpx.get(url, trust_env=False).text
    found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
    assert found is not None, page
    return float(found[1])


def wait_for(is_so: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + _WAIT_S_MAX
    while not is_so():
        assert time.monotonic() < until_s, what
        time.sleep(0.05)


def add(driver: ClusterDriver, collection: str, first: int) -> None:
    rows = range(first, first + _ROWS)
    vectors = np.random.default_rng(first).standard_normal((_ROWS, _DIM)).tolist()
    body = {
        "ids": [f"id-{row}" for row in rows],
        "embeddings": vectors,
        "documents": [f"row {row}" for row in rows],
        "metadatas": [{"n": row} for row in rows],
    }
    status, answer = driver.call("POST", f"{_DATABASE}/collections/{collection}/add", body)
    assert status == 201, answer
    driver.compactor.compact_now(collection)


def answers(driver: ClusterDriver, collection: str) -> list[object]:
    path = f"{_DATABASE}/collections/{collection}"
    found = []
    for verb, body in (
        ("query", {"query_embeddings": [[0.5] * _DIM, [-0.5] * _DIM], "n_results": 7}),
        ("query", {"query_embeddings": [[0.1] * _DIM], "where": {"n": {"$lt": 900}}}),
        ("get", {"limit": 30, "offset": 300, "include": ["documents", "embeddings", "metadatas"]}),
        ("get", {"where_document": {"$contains": "row 11"}}),
    ):
        status, answer = driver.call("POST", f"{path}/{verb}", body)
        assert status == 200, answer
        found.append(answer)
    return found


@pytest.mark.timeout(180)
def test_when_the_first_is_killed_the_second_fetches_nothing(
    cluster: Cluster, driver: ClusterDriver
) -> None:
    status, made = driver.call("POST", f"{_DATABASE}/collections", {"name": "records"})
    assert status == 200, made
    collection = str(made["id"])
    names = [member.name for member in cluster.of("query")]
    first, second = (cluster.members[name] for name in order(collection, names))

    def fetched() -> float:
        return metric(second, "ochredb_cache_fetched_bytes_total")

    def has_fetched(count_bytes: int) -> bool:
        return fetched() >= count_bytes

    def stored() -> dict[str, int]:
        node = driver._node
        version = node.logs.snapshot(collection).version
        parts = node.versions.parts(collection, version)
        return {part.manifest.id: part.manifest.size_bytes for part in parts}

    seen: dict[str, int] = {}
    for number in range(3):  # The first read, and two new versions.
        add(driver, collection, number * _ROWS)
        expected = answers(driver, collection)
        seen |= stored()
        wait_for(partial(has_fetched, sum(seen.values())), "the second was never asked")
    before = fetched()
    misses = metric(second, "ochredb_cache_misses_total")
    first.kill()
    for _ in range(5):
        assert answers(driver, collection) == expected
    assert fetched() == before
    assert metric(second, "ochredb_cache_misses_total") == misses
    first.start()
    first.wait_ready()
