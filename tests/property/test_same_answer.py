"""I5: the same reads give the same answers wherever the rows lie, in the tail or in parts.

One log, several layouts: all in the tail, folded once, folded in pieces, merged, opened again. The
vectors have norms from 1e-3 to 1e4, duplicates and near-duplicates, so that any difference in
rounding between a small scan and one of BLAS's would show in ids, order or distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ochredb.testing import strategies
from ochredb.testing.model import CollectionModel, canonical, float32_list

from .compare import Recall, check_get, check_query
from .drivers import COLLECTIONS, Driver, EmbeddedDriver, make_small

Json = dict[str, Any]
Step = tuple[str, Json]
_EVERYTHING = ["documents", "metadatas", "embeddings", "uris"]


@pytest.fixture
def driver(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedDriver]:
    make_small(monkeypatch, graphs=False, steps=False)
    opened = EmbeddedDriver(str(tmp_path / "store"))
    yield opened
    opened.close()


def vectors(rng: np.random.Generator, count: int, dim: int) -> strategies.Float32s:
    """Clusters of near-duplicates and duplicates around few centres, at very different norms."""
    fixed = np.random.default_rng(dim)  # Records and queries share the centres.
    centres = fixed.standard_normal((12, dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    lengths = 10.0 ** fixed.uniform(-3, 4, 12)
    chosen = rng.integers(0, 12, count)
    scale = rng.choice([0.0, 1e-7, 1e-5, 1e-3, 1.0], count)[:, np.newaxis]
    points = centres[chosen] + scale * rng.standard_normal((count, dim))
    points *= lengths[chosen, np.newaxis]
    points[rng.random(count) < 0.02] = 0.0
    result: strategies.Float32s = points.astype(np.float32)
    return result


def log_of(rng: np.random.Generator, count: int, dim: int) -> list[Step]:
    """Writes: adds of `count` records, then changes and deletes of some."""
    points = vectors(rng, 2 * count, dim)
    names = [f"r{number}" for number in range(count)]
    steps: list[Step] = []
    for start in range(0, count, 100):
        rows = range(start, min(start + 100, count))
        steps.append(
            (
                "add",
                {
                    "ids": [names[row] for row in rows],
                    "embeddings": [strategies.encoded(points[row], True) for row in rows],
                    "documents": [
                        None if row % 9 == 0 else " ".join(rng.choice(strategies.WORDS, 4))
                        for row in rows
                    ],
                    "metadatas": [
                        {"n": int(rng.integers(0, 10)), "f": float(row), "l": [row % 3, 7]}
                        for row in rows
                    ],
                },
            )
        )
    changed = rng.choice(count, count // 5, replace=False).tolist()
    for start in range(0, len(changed), 40):
        rows = changed[start : start + 40]
        steps.append(
            (
                "upsert",
                {
                    "ids": [names[row] for row in rows],
                    "embeddings": [strategies.encoded(points[count + row], True) for row in rows],
                    "metadatas": [{"n": None, "new": True} for _ in rows],
                },
            )
        )
        steps.append(
            ("update", {"ids": [names[row] for row in rows[:9]], "documents": ["red"] * 9})
        )
        steps.append(("delete", {"ids": [names[row] for row in rows[9:14]]}))
    steps.append(("delete", {"where": {"n": 3}, "limit": 11}))
    steps.append(("add", {"ids": [names[changed[10]]], "embeddings": [float32_list(points[0])]}))
    return [step for step in steps if step[1].get("ids") != []]


def reads_of(rng: np.random.Generator, count: int, dim: int, queries: int) -> list[Step]:
    points = vectors(rng, queries, dim)
    filters: list[Json] = [
        {}, {}, {"where": {"n": {"$lt": 5}}}, {"where": {"n": 4}},
        {"where": {"$or": [{"f": {"$gte": 0.9 * count}}, {"l": {"$contains": 2}}]}},
        {"where_document": {"$contains": "red"}}, {"where_document": {"$regex": "qu.ck|tow"}},
        {"ids": [f"r{number}" for number in range(0, count, 7)]},
    ]  # fmt: skip
    reads: list[Step] = []
    for number, selection in enumerate(filters):
        reads.append(("get", {**selection, "include": _EVERYTHING}))
        reads.append(("get", {**selection, "limit": 5, "offset": number}))
        for n_results in (1, 10, count // 3, 2 * count):
            chosen = points[rng.integers(0, queries, 3 if n_results <= 10 else 1)]
            body: Json = {"query_embeddings": [float32_list(point) for point in chosen]}
            body |= {**selection, "n_results": n_results, "include": ["distances", "embeddings"]}
            reads.append(("query", body))
    return reads


def answers(driver: Driver, path: str, reads: list[Step]) -> list[str]:
    out = []
    for verb, body in reads:
        status, answer = driver.call("POST", f"{path}/{verb}", body)
        assert status == 200, answer
        out.append(canonical(answer))
    return out


def _never(_driver: Driver, _collection: str, _step: int) -> None:
    pass


def _each_fourth(driver: Driver, collection: str, step: int) -> None:
    if step % 4 == 3:
        driver.compactor.fold_now(collection)


def _each(driver: Driver, collection: str, _step: int) -> None:
    driver.compactor.fold_now(collection)


def _merged(driver: Driver, collection: str, step: int) -> None:
    if step % 3 == 2:
        driver.compactor.compact_now(collection)
        driver.compactor.collect_now(sweep_orphans=True)


_LAYOUTS: list[Callable[[Driver, str, int], None]] = [_never, _each_fourth, _each, _merged]


@pytest.mark.parametrize("space", strategies.SPACES)
@pytest.mark.parametrize(("count", "dim"), [(150, 1), (400, 8), (700, 64)])
def test_layouts_do_not_change_answers(driver: Driver, space: str, count: int, dim: int) -> None:
    rng = np.random.default_rng((count, dim, len(space)))
    log, reads = log_of(rng, count, dim), reads_of(rng, count, dim, 20)
    model = CollectionModel("c", {"space": space})
    expected: list[str] | None = None
    for number, layout in enumerate(_LAYOUTS):
        body = {"name": f"layout-{number}", "configuration": {"hnsw": {"space": space}}}
        status, created = driver.call("POST", COLLECTIONS, body)
        assert status == 200, created
        path = f"{COLLECTIONS}/{created['id']}"
        for step, (verb, body) in enumerate(log):
            status, answer = driver.call("POST", f"{path}/{verb}", body)
            assert status in (200, 201), answer
            if number == 0:
                model.delete(body) if verb == "delete" else model.write(verb, body)
            layout(driver, created["id"], step)
        if expected is None:
            expected = answers(driver, path, reads)
            _check_by_model(model, reads, driver, path)
        _check_unchanged(f"{layout.__name__} as written", expected, driver, path, reads)
        driver.compactor.fold_now(created["id"])
        _check_unchanged(f"{layout.__name__} folded", expected, driver, path, reads)
        driver.compactor.compact_now(created["id"])
        _check_unchanged(f"{layout.__name__} merged", expected, driver, path, reads)
        driver.compactor.collect_now(sweep_orphans=True)
        driver.restart()
        _check_unchanged(f"{layout.__name__} opened again", expected, driver, path, reads)


def _check_unchanged(
    what: str, expected: list[str], driver: Driver, path: str, reads: list[Step]
) -> None:
    for read, before, after in zip(reads, expected, answers(driver, path, reads), strict=True):
        assert after == before, f"{what}: {read}"


def _check_by_model(model: CollectionModel, reads: list[Step], driver: Driver, path: str) -> None:
    for verb, body in reads:
        _, answer = driver.call("POST", f"{path}/{verb}", body)
        if verb == "get":
            body = {"include": ["documents", "metadatas"], **body}
            check_get(model, body, answer)
        else:
            check_query(model, body, answer, by_graph=False, recall=Recall())
