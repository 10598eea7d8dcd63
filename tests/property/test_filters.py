"""Generated filters, up to depth 4 with patterns, against the reference evaluator and the model.

The same records lie in the log's tail, in parts, and in a mixture in which the tail changes rows of
parts; each filter must select the same records everywhere.

    OCHREDB_FILTERS   how many filters (default 500)
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ochredb.testing import strategies
from ochredb.testing.model import CollectionModel
from ochredb.testing.reference import ReferenceRecord, matches
from ochredb.where_parse import combine, parse_where, parse_where_document

from .compare import Recall, check_equal, check_query
from .drivers import COLLECTIONS, EmbeddedDriver, make_small

Json = dict[str, Any]
_FILTERS = int(os.environ.get("OCHREDB_FILTERS", "500"))
_FILTERS_PER_EXAMPLE = 25
_LAYOUTS = ("tail", "parts", "mixture")


@pytest.fixture(scope="module")
def driver() -> Iterator[EmbeddedDriver]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch, graphs=False, steps=True)
        opened = EmbeddedDriver(None)
        yield opened
        opened.close()


def _records(number: int) -> Json:
    """One upsert of distinct ids: most keys present, most values of the key's own type.

    Some have long documents, so that text indexes prune.
    """
    rng = random.Random(number)
    count = rng.choice([1, 30, 50, 80])
    padding = rng.choice(["", " " + "lorem ipsum " * 300])
    pools: list[tuple[Any, ...]] = [
        strategies.INTEGERS, strategies.FLOATS, strategies.STRINGS, (True, False),
    ]  # fmt: skip

    def value(key: str) -> Any:
        own = {"i": 0, "f": 1, "s": 2, "b": 3}.get(key[-1])
        pool = rng.choice(pools) if own is None or rng.random() < 0.15 else pools[own]
        items = [rng.choice(pool) for _ in range(rng.randrange(1, 4))]
        return items if (key[0] == "l") != (rng.random() < 0.1) else items[0]

    def metadata() -> Json | None:
        return {key: value(key) for key in strategies.KEYS if rng.random() < 0.7} or None

    def document() -> str | None:
        if rng.random() < 0.15:
            return None
        return " ".join(rng.choices(strategies.WORDS, k=rng.randrange(5))) + padding

    return {
        "ids": [f"r{row}" for row in range(count)],
        "embeddings": [[float(row % 9), 1.0] for row in range(count)],
        "documents": [document() for _ in range(count)],
        "metadatas": [metadata() for _ in range(count)],
    }


@st.composite
def _filter(draw: st.DrawFn) -> Json:
    kind = draw(st.sampled_from(["where", "where", "where_document", "both"]))
    body: Json = {}
    if kind != "where_document":
        body["where"] = draw(strategies.wheres)
    if kind != "where":
        body["where_document"] = draw(strategies.where_documents)
    return body


def _build(driver: EmbeddedDriver, layout: str, body: Json, name: str) -> str:
    """A collection with these records in a layout; its path."""
    created = _ok(driver, COLLECTIONS, {"name": name})
    path = f"{COLLECTIONS}/{created['id']}"
    fold = driver.node.compactor.fold_now
    if layout == "tail":
        _ok(driver, f"{path}/upsert", body)
    elif layout == "parts":
        for start in range(0, len(body["ids"]), 8):
            _ok(driver, f"{path}/upsert", _slice(body, start, start + 8))
            fold(created["id"])
    else:
        # First every record with another one's values, in parts; then the right ones in the tail
        # or, for every other record, in a later part.
        half = len(body["ids"]) // 2
        texts = body["documents"]
        wrong = {
            **body,  # An upsert cannot remove a document.
            "documents": [None if text is None else "red tower" for text in texts],
            "metadatas": [{"i": 1, "s": "x", "wrong": True} for _ in texts],
        }
        _ok(driver, f"{path}/upsert", wrong)
        fold(created["id"])
        for start, stop in ((0, half), (half, len(body["ids"]))):
            right = _slice(body, start, stop)
            if not right["ids"]:
                continue
            _ok(driver, f"{path}/upsert", _with_nulls(right))
            if start == 0:
                fold(created["id"])
    return path


def _slice(body: Json, start: int, stop: int) -> Json:
    return {name: column[start:stop] for name, column in body.items()}


def _with_nulls(body: Json) -> Json:
    """Replaces the wrong metadata: an upsert merges, so its keys are removed."""
    wrong = {"i": None, "s": None, "wrong": None}
    return {**body, "metadatas": [{**wrong, **(item or {})} for item in body["metadatas"]]}


def _ok(driver: EmbeddedDriver, path: str, body: Json) -> Any:
    status, answer = driver.call("POST", path, body)
    assert status in (200, 201), answer
    return answer


@pytest.mark.timeout(1800)
def test_filters_select_what_the_reference_selects(driver: EmbeddedDriver) -> None:
    seen = selected = 0
    numbers = itertools.count()
    filters_of_one = st.lists(
        _filter(), min_size=_FILTERS_PER_EXAMPLE, max_size=_FILTERS_PER_EXAMPLE
    )

    @seed(500)
    @settings(
        max_examples=1 + max(1, _FILTERS // _FILTERS_PER_EXAMPLE),
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(filters_of_one)
    def run(filters: list[Json]) -> None:
        nonlocal seen, selected
        number = next(numbers)
        body = _records(number)
        model = CollectionModel("c")
        model.write("upsert", body)
        name = f"c-{number}"
        paths = {layout: _build(driver, layout, body, f"{name}-{layout}") for layout in _LAYOUTS}
        for item in filters:
            expected = _expected(item, model)
            for layout, path in paths.items():
                _check(driver, path, item, model, expected, layout)
            seen += 1
            selected += 0 < len(expected) < len(model.records)
        for layout in _LAYOUTS:
            driver.call("DELETE", f"{COLLECTIONS}/{name}-{layout}")

    run()
    print(f"{seen} filters, {selected} of them select some records but not all")
    assert seen >= _FILTERS
    assert selected >= seen // 5


def _expected(item: Json, model: CollectionModel) -> list[str]:
    """What the reference selects, after checking that the model selects the same."""
    where = combine(
        parse_where(item.get("where")), parse_where_document(item.get("where_document"))
    )
    expected = [
        name
        for name, record in model.records.items()
        if matches(
            where,
            ReferenceRecord(id=name, document=record.document, metadata=record.metadata),
        )
    ]
    check_equal(model.matching(item), expected, f"model and reference: {item}")
    return expected


def _check(
    driver: EmbeddedDriver,
    path: str,
    item: Json,
    model: CollectionModel,
    expected: list[str],
    layout: str,
) -> None:
    answer = _ok(driver, f"{path}/get", {**item, "include": []})
    check_equal(answer["ids"], expected, f"{layout}: {item}")
    query = {**item, "query_embeddings": [[3.0, 0.0]], "n_results": 5, "include": ["distances"]}
    answer = _ok(driver, f"{path}/query", query)
    check_query(model, query, answer, by_graph=False, recall=Recall())
