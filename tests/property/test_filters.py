"""Generated filters, up to depth 4 with patterns, against the reference evaluator and the model.

The same records, of a generated schema, lie in the log's tail, in parts, and in a mixture: parts of
which the tail changes and deletes rows. Each filter must select the same records everywhere, in
get, in a page of it, in query (exactly the nearest, in order) and, for some, in delete, after which
the remaining filters go on without what was deleted.

    OCHREDB_FILTERS       how many filters (default 500)
    OCHREDB_FILTERS_SEED  of the generator (default 500)
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

from .compare import Recall, check_equal, check_get, check_query
from .drivers import COLLECTIONS, EmbeddedDriver, make_small

Json = dict[str, Any]
_FILTERS = int(os.environ.get("OCHREDB_FILTERS", "500"))
_SEED = int(os.environ.get("OCHREDB_FILTERS_SEED", "500"))
_FILTERS_PER_EXAMPLE = 25
_DELETE_EVERY = 8
_LAYOUTS = ("tail", "parts", "mixture")
_POOLS: dict[str, tuple[Any, ...]] = {
    "i": strategies.INTEGERS, "f": strategies.FLOATS, "s": strategies.STRINGS, "b": (True, False),
}  # fmt: skip


@pytest.fixture(scope="module")
def driver() -> Iterator[EmbeddedDriver]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch, graphs=False, steps=True)
        opened = EmbeddedDriver(None)
        yield opened
        opened.close()


class _Schema:
    """Which share of the records has each key, of which types, as list or as scalar."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._keys = {key: self._key(key) for key in strategies.KEYS}

    def _key(self, key: str) -> tuple[float, str, float]:
        own = key[-1] if key in ("i", "f", "s", "b", "li", "lf", "ls", "lb") else ""
        kinds = own or "".join(self._rng.sample("ifsb", self._rng.randrange(1, 5)))
        stray = self._rng.choice(["", "", "ifsb"])
        is_list = 0.9 if key[0] == "l" else self._rng.choice([0.0, 0.1, 0.5])
        return self._rng.choice([0.03, 0.3, 0.7, 0.7, 1.0]), 3 * kinds + stray, is_list

    def metadata(self) -> Json | None:
        rng = self._rng
        item: Json = {}
        for key, (share, kinds, is_list) in self._keys.items():
            if rng.random() < share:
                pool = _POOLS[rng.choice(kinds)]
                items = [rng.choice(pool) for _ in range(rng.randrange(1, 4))]
                item[key] = items if rng.random() < is_list else items[0]
        return item or None


def _records(number: int) -> Json:
    """One upsert of distinct ids. Some have long documents, so that text indexes prune."""
    rng = random.Random(_SEED * 1_000_003 + number)
    count = rng.choice([1, 30, 50, 80])
    padding = rng.choice(["", " " + "lorem ipsum " * 300])
    # Few words without spaces: what a needle names also stands across the ends of documents.
    words, space = rng.choice([(strategies.WORDS, " "), (("x", "red", "tower", "e\u0301"), "")])
    schema = _Schema(rng)

    def document() -> str | None:
        if rng.random() < 0.15:
            return None
        return space.join(rng.choices(words, k=rng.randrange(5))) + padding

    return {
        "ids": [f"r{row}" for row in range(count)],
        "embeddings": [[float(row % 9), 1.0] for row in range(count)],
        "documents": [document() for _ in range(count)],
        "metadatas": [schema.metadata() for _ in range(count)],
    }


@st.composite
def _filter(draw: st.DrawFn) -> Json:
    kind = draw(st.sampled_from(["where", "where", "where_document", "both"]))
    body: Json = {}
    if kind != "where_document":
        body["where"] = draw(strategies.wheres)
    if kind != "where":
        body["where_document"] = draw(strategies.where_documents)
    if draw(st.sampled_from([False, False, False, True])):
        # Most of up to 80 records, in any order, with names that are not there and repetitions.
        rows = draw(st.permutations(range(0, 100, draw(st.sampled_from([2, 3, 20])))))
        body["ids"] = [f"r{row}" for row in (*rows, rows[0])]
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
        # First every record with another one's values, and some more, in parts; then the right
        # values, for one half in a later part and for the other in the tail. The others are
        # deleted, one half before they were folded and the other in the tail.
        half = len(body["ids"]) // 2
        others = [f"gone-{row}" for row in range(half)]
        texts = body["documents"]
        wrong = {
            "ids": body["ids"] + others,
            "embeddings": body["embeddings"] + body["embeddings"][:half],
            # An upsert cannot remove a document.
            "documents": [None if text is None else "red tower" for text in texts] + texts[:half],
            "metadatas": [{"i": 1, "s": "x", "wrong": True}] * len(texts)
            + body["metadatas"][:half],
        }
        _ok(driver, f"{path}/upsert", wrong)
        if others[1::2]:
            _ok(driver, f"{path}/delete", {"ids": others[1::2]})
        fold(created["id"])
        for start, stop in ((0, half), (half, len(body["ids"]))):
            right = _slice(body, start, stop)
            if not right["ids"]:
                continue
            _ok(driver, f"{path}/upsert", _with_nulls(right))
            if start == 0:
                fold(created["id"])
        if others[::2]:
            _ok(driver, f"{path}/delete", {"ids": others[::2]})
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


@pytest.mark.timeout(0 if _FILTERS > 2_000 else 600)
def test_filters_select_what_the_reference_selects(driver: EmbeddedDriver) -> None:
    seen = selected = deleted = 0
    numbers = itertools.count()
    filters_of_one = st.lists(
        _filter(), min_size=_FILTERS_PER_EXAMPLE, max_size=_FILTERS_PER_EXAMPLE
    )

    @seed(_SEED)
    @settings(
        max_examples=1 + max(1, _FILTERS // _FILTERS_PER_EXAMPLE),
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(filters_of_one)
    def run(filters: list[Json]) -> None:
        nonlocal seen, selected, deleted
        number = next(numbers)
        body = _records(number)
        model = CollectionModel("c")
        model.write("upsert", body)
        name = f"c-{number}"
        paths = {layout: _build(driver, layout, body, f"{name}-{layout}") for layout in _LAYOUTS}
        for layout, path in paths.items():
            _check_records(driver, path, model, layout)
        for place, item in enumerate(filters):
            expected = _expected(item, model)
            for layout, path in paths.items():
                _check(driver, path, item, model, expected, layout, number + place)
            seen += 1
            selected += 0 < len(expected) < len(model.records)
            if place % _DELETE_EVERY == _DELETE_EVERY - 1:
                deleted += _delete(driver, paths, item, model, (None, 1, 3)[number % 3])
        for layout in _LAYOUTS:
            driver.call("DELETE", f"{COLLECTIONS}/{name}-{layout}")

    run()
    print(f"{seen} filters, {selected} select some records but not all; {deleted} deleted")
    assert seen >= _FILTERS
    assert selected >= seen // 5
    assert deleted >= seen // _DELETE_EVERY // 2


def _expected(item: Json, model: CollectionModel) -> list[str]:
    """What the reference selects, after checking that the model selects the same."""
    where = combine(
        parse_where(item.get("where")), parse_where_document(item.get("where_document"))
    )
    given = item.get("ids")
    expected = [
        name
        for name, record in model.records.items()
        if (given is None or name in given)
        and matches(
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
    variant: int,
) -> None:
    answer = _ok(driver, f"{path}/get", {**item, "include": []})
    check_equal(answer["ids"], expected, f"{layout}: {item}")
    limit, offset = (1, 2, 7)[variant % 3], (0, 1, 5)[variant // 3 % 3]
    page = {**item, "limit": limit, "offset": offset, "include": []}
    answer = _ok(driver, f"{path}/get", page)
    check_equal(answer["ids"], expected[offset : offset + limit], f"{layout}: {page}")
    query = {**item, "query_embeddings": [[3.0, 0.0]], "n_results": (1, 5, 100)[variant % 3]}
    query |= {"include": ["distances"], "exact": variant % 2 == 0}
    if "ids" in item and model.records.keys().isdisjoint(item["ids"]):
        return  # Refused, as none of the ids is there.
    answer = _ok(driver, f"{path}/query", query)
    assert len(answer["ids"][0]) == min(query["n_results"], len(expected)), f"{layout}: {query}"
    check_query(model, query, answer, by_graph=False, recall=Recall())


def _delete(
    driver: EmbeddedDriver,
    paths: dict[str, str],
    item: Json,
    model: CollectionModel,
    limit: int | None,
) -> int:
    """Delete what the filter selects, up to a limit, everywhere; returns how many."""
    request = item if limit is None else {**item, "limit": limit}
    expected = model.delete(request)
    for layout, path in paths.items():
        answer = _ok(driver, f"{path}/delete", request)
        check_equal(answer, {"deleted": expected}, f"{layout}: delete {request}")
        _check_records(driver, path, model, f"{layout} after delete {request}")
    return expected


def _check_records(driver: EmbeddedDriver, path: str, model: CollectionModel, what: str) -> None:
    """Everything that is stored, and the count."""
    status, count = driver.call("GET", f"{path}/count")
    assert (status, count) == (200, len(model.records)), what
    body = {"include": ["documents", "metadatas"]}
    check_get(model, body, _ok(driver, f"{path}/get", body))
