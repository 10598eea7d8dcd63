"""exact, explain and target_recall on real engines: embedded on disk, in memory, and over HTTP."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import ochredb
from ochredb.explain import PlanStep
from ochredb.testing.server_process import ServerProcess

COUNT, DIMENSION = 300, 8


def vectors(seed: int, count: int) -> list[list[float]]:
    numbers = random.Random(seed)
    return [[numbers.uniform(-1, 1) for _ in range(DIMENSION)] for _ in range(count)]


@pytest.fixture(params=["persistent", "ephemeral", "http"])
def filled(
    request: pytest.FixtureRequest, tmp_path: Path, collection_name: str
) -> Iterator[ochredb.Collection]:
    """A collection with 300 records, of which a third has kind 0."""
    if request.param == "persistent":
        client = ochredb.PersistentClient(tmp_path / "data")
    elif request.param == "ephemeral":
        client = ochredb.EphemeralClient()
    else:
        server: ServerProcess = request.getfixturevalue("server")
        client = ochredb.HttpClient(server.host, server.port)
    with client:
        collection = client.create_collection(collection_name)
        collection.add(
            ids=[f"r{number}" for number in range(COUNT)],
            embeddings=vectors(1, COUNT),
            documents=[f"text {number}" for number in range(COUNT)],
            metadatas=[{"kind": number % 3} for number in range(COUNT)],
        )
        yield collection
        client.delete_collection(collection_name)


def steps_of(plan: PlanStep) -> Iterator[PlanStep]:
    yield plan
    for step in plan.steps:
        yield from steps_of(step)


def check_times(plan: PlanStep) -> None:
    """Every step took time, and no more than the one around it (rounded to 0.1 µs)."""
    assert plan.time_us > 0
    assert sum(step.time_us for step in plan.steps) <= plan.time_us + 0.05 * (len(plan.steps) + 1)
    for step in plan.steps:
        check_times(step)


def test_a_query_explains_itself_and_answers_as_ever(filled: ochredb.Collection) -> None:
    queries = vectors(2, 3)
    plain = filled.query(queries, n_results=5, where={"kind": 0})
    explained = filled.query(queries, n_results=5, where={"kind": 0}, explain=True)
    plan = explained.pop("plan")
    assert explained == plain
    assert plan.operator == "Query"
    check_times(plan)
    steps = {step.operator: step for step in steps_of(plan)}
    assert {"Filter", "Nearest", "Project"} <= steps.keys()
    assert steps["Filter"].details["rows_out"] == COUNT // 3
    nearest = steps["Nearest"].details
    assert (nearest["queries"], nearest["n_results"]) == (3, 5)
    assert "Filter" in str(plan) and max(map(len, str(plan).splitlines())) <= 100


def test_a_get_explains_itself_and_answers_as_ever(filled: ochredb.Collection) -> None:
    plain = filled.get(where={"kind": 1}, limit=7)
    explained = filled.get(where={"kind": 1}, limit=7, explain=True)
    plan = explained.pop("plan")
    assert explained == plain
    check_times(plan)
    steps = {step.operator: step for step in steps_of(plan)}
    assert steps["Filter"].details["rows_out"] == COUNT // 3
    assert "Project" in steps


def test_exact_and_target_recall_agree_where_everything_is_scanned(
    filled: ochredb.Collection,
) -> None:
    query = vectors(3, 1)
    plain = filled.query(query)
    for target_recall in (0.0, 0.5, 0.999):
        assert filled.query(query, target_recall=target_recall) == plain
    assert filled.query(query, exact=True) == plain
    exact = filled.query(query, exact=True, explain=True, target_recall=0.1)
    assert "Graph" not in {step.operator for step in steps_of(exact["plan"])}


def test_raw_answers_have_a_plan_only_when_it_is_asked_for(server: ServerProcess) -> None:
    base = f"{server.url}/api/v2/tenants/default_tenant/databases/default_database/collections"
    with httpx.Client(trust_env=False) as http:
        made = http.post(base, json={"name": f"raw-{uuid.uuid4().hex}"}).json()
        path = f"{base}/{made['id']}"
        http.post(f"{path}/add", json={"ids": ["a"], "embeddings": [[1, 2]]})
        for verb, body in (("get", {}), ("query", {"query_embeddings": [[1, 2]]})):
            plain = http.post(f"{path}/{verb}", json=body).json()
            asked = http.post(f"{path}/{verb}", json={**body, "explain": True}).json()
            refused = http.post(f"{path}/{verb}", json={**body, "explain": "yes"})
            assert set(asked) - set(plain) == {"plan"}
            assert set(asked["plan"]) == {"operator", "time_us", "details", "steps"}
            assert refused.status_code == 422 and "explain" in refused.json()["message"]
        nothing = {"query_embeddings": [], "explain": True}
        answer = http.post(f"{path}/query", json=nothing)
        assert answer.status_code == 200 and "plan" not in answer.json()
