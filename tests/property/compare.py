"""Answers of an engine against those of the model, exactly; graph answers within their recall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ochredb.testing.model import CollectionModel, Neighbours, Refusal, canonical

Json = dict[str, Any]


def float32(value: float | None) -> float | None:
    """The wire carries the shortest text of a float32: parse it back as one."""
    return None if value is None else float(np.float32(value))


def check_equal(actual: Any, expected: Any, what: str) -> None:
    assert canonical(actual) == canonical(expected), (
        f"{what}\n  answered: {canonical(actual)}\n  expected: {canonical(expected)}"
    )


def check_refusal(status: int, answer: Any, refusal: Refusal, what: str) -> None:
    found = (status, answer.get("error") if isinstance(answer, dict) else answer)
    assert found == (refusal.status, refusal.name), f"{what}: {answer}, expected {refusal}"
    assert refusal.message in answer["message"], f"{what}: {answer}, expected {refusal}"


def rounded(answer: Any) -> Any:
    """Embeddings (or distances) of an answer as float32s."""
    if isinstance(answer, list):
        return [rounded(item) for item in answer]
    return float32(answer)


@dataclass(slots=True)
class Recall:
    """Over all answers that came from a graph."""

    answers: int = 0
    wanted: int = 0
    found: int = 0

    @property
    def share(self) -> float:
        return self.found / self.wanted if self.wanted else 1.0


def check_query(
    model: CollectionModel, body: Json, answer: Json, by_graph: bool, recall: Recall
) -> None:
    """The answer to a query, in full. by_graph: ids may differ within the recall."""
    expected = model.query(body)
    include = body.get("include", ["metadatas", "documents", "distances"])
    n_results = body.get("n_results", 10)
    if "include" in body:
        check_equal(answer["include"], include, "include")
    names = {"ids", "embeddings", "documents", "uris", "metadatas", "distances", "include"}
    assert set(answer) == names, f"keys of a query's answer: {sorted(answer)}"
    assert len(answer["ids"]) == len(expected), "one row of ids for each query vector"
    for number, neighbours in enumerate(expected):
        ids: list[str] = answer["ids"][number]
        distances = rounded(answer["distances"][number]) if answer["distances"] else None
        what = f"query {number} of {body}"
        exact_ids, exact = neighbours.ids[:n_results], neighbours.distances[:n_results]
        if by_graph and None not in exact:
            _check_approximate(ids, neighbours, n_results, recall, what)
            known = dict(zip(neighbours.ids, neighbours.distances, strict=True))
            exact = [known[name] for name in ids]
        else:
            check_equal(ids, exact_ids, f"{what}: ids (distances: {distances}, {exact})")
        if "distances" in include:
            check_equal(distances, exact, f"{what}: distances of {ids}")
    for name in ("embeddings", "documents", "uris", "metadatas", "distances"):
        if name not in include:
            assert answer[name] is None, f"{name} was not asked for"
        elif name != "distances":
            columns = [model.column(name, ids) for ids in answer["ids"]]
            actual = rounded(answer[name]) if name == "embeddings" else answer[name]
            check_equal(actual, columns, f"{name} of {body}")


def _check_approximate(
    ids: list[str], neighbours: Neighbours, n_results: int, recall: Recall, what: str
) -> None:
    place = {name: number for number, name in enumerate(neighbours.ids)}
    assert len(ids) == min(n_results, len(place)), f"{what}: too few results (I10): {ids}"
    assert set(ids) <= set(place), f"{what}: {set(ids) - set(place)} do not match"
    places = [place[name] for name in ids]
    assert places == sorted(set(places)), f"{what}: not by (distance, seq): {ids}"
    if not ids:
        return
    distances = neighbours.distances
    furthest = distances[len(ids) - 1]
    assert furthest is not None
    recall.answers += 1
    recall.wanted += len(ids)
    # A record as near as the furthest true neighbour is a neighbour.
    recall.found += sum((distances[number] or 0.0) <= furthest for number in places)


def check_get(model: CollectionModel, body: Json, answer: Json) -> None:
    if answer["embeddings"] is not None:
        answer = {**answer, "embeddings": rounded(answer["embeddings"])}
    check_equal(answer, model.get(body), f"get {body}")
