"""Executed plans: how they are collected, shown, and carried over the wire with their request."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import orjson
import pytest

from ochredb.errors import Unprocessable
from ochredb.explain import PlanStep, Trace, tree
from ochredb.peers import GetRequest, QueryRequest
from ochredb.types import QueryAnswer, Records
from ochredb_frontend import wire
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.messages import Request

from .frontend_client import Client

CONFIG = FrontendConfig()
PLAN = PlanStep(
    "Query",
    {"collection": "01890a5d-ac96-774b-bcce-b302099a8057", "parts": 2, "tail_rows": 512,
     "rows": 100_512, "queries": 1, "n_results": 10, "matches": 9_970},
    1412.2,
    [
        PlanStep("Filter", {"where": "year >= 2020", "rows_out": 9_970, "read_bytes": 48_128}, 83),
        PlanStep("Nearest", {}, 1209, [
            PlanStep(
                "Graph",
                {"part": "0190", "rows": 100_000, "ef": 412, "target_recall": 0.95,
                 "candidates": 412, "rows_out": 10, "estimate_us": 870.3,
                 "scan_estimate_us": 4400.0, "widened": False},
                905,
            ),
            PlanStep("Scan", {"part": "tail", "rows": 512, "graph_estimate_us": None}, 12.2),
        ]),
        PlanStep("Project", {"rows": 10, "columns": "documents"}, 31),
    ],
)  # fmt: skip
TREE = """\
1.41 ms  Query  collection=01890a5d-ac96-774b-bcce-b302099a8057  parts=2
         │      tail_rows=512  rows=100,512  queries=1  n_results=10
         │      matches=9,970
  83 µs  ├─ Filter  where=year >= 2020  rows_out=9,970  read=47.0 KiB
1.21 ms  ├─ Nearest
 905 µs  │  ├─ Graph  part=0190  rows=100,000  ef=412
         │  │         target_recall=0.95  candidates=412  rows_out=10
         │  │         estimate=870 µs  scan_estimate=4.40 ms
         │  │         widened=false
  12 µs  │  └─ Scan  part=tail  rows=512  graph_estimate=none
  31 µs  └─ Project  rows=10  columns=documents"""


# -- steps and their collection


def test_a_plan_survives_json() -> None:
    assert PlanStep.from_json(orjson.loads(orjson.dumps(PLAN.to_json()))) == PLAN


@pytest.mark.parametrize("document", [{}, {**PLAN.to_json(), "steps": [{}]}, []])
def test_what_is_no_plan_is_refused(document: Any) -> None:
    with pytest.raises((KeyError, TypeError)):
        PlanStep.from_json(document)


def test_steps_nest_as_their_blocks_do_and_their_time_is_that_of_the_block() -> None:
    trace = Trace("Get")
    with trace.step("Filter", rows_in=5) as filtering:
        with trace.step("Scan") as scanning:
            scanning.details["rows_out"] = 2
        filtering.details["rows_out"] = 2
    with pytest.raises(ZeroDivisionError), trace.step("Project"):
        raise ZeroDivisionError
    with trace.step("Page"):
        pass
    assert [step.operator for step in trace.root.steps] == ["Filter", "Project", "Page"]
    assert trace.root.steps[0].details == {"rows_in": 5, "rows_out": 2}
    assert trace.root.steps[0].steps == [scanning]
    assert 0 < scanning.time_us <= filtering.time_us
    assert trace.root.steps[1].time_us > 0
    assert sum(step.time_us for step in trace.root.steps) <= trace.root.time_us


# -- the tree


def test_a_tree_has_times_branches_and_details_in_columns() -> None:
    assert tree(PLAN, 72) == TREE
    assert str(PLAN) == tree(PLAN, 100)


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_no_line_is_longer_than_the_tree_may_be_and_nothing_is_lost(width: int) -> None:
    plan = PlanStep("Query", {"where": "word " * 39 + "end", "id": "x" * 190}, 5e6, [PLAN])
    text = tree(plan, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("word") == 39 and text.count("x") >= 190
    shown = {part.partition("=")[0] for line in text.splitlines() for part in line.split()}
    assert {"where", "id", "collection", "matches", "candidates", "scan_estimate"} <= shown
    assert text.startswith(" 5.00 s  Query  where=word")


def test_deep_steps_keep_room_for_their_details() -> None:
    plan = PlanStep("Deep", {"rows": 1, "rows_out": 2})
    for _ in range(30):
        plan = PlanStep("Outer", {}, 0.0, [plan])
    *_, last = tree(plan, 40).splitlines()
    assert last.endswith("└─ Deep  rows=1  rows_out=2")


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("rows", 1_234_567, "rows=1,234,567"),
        ("exact", True, "exact=true"),
        ("reason", None, "reason=none"),
        ("share", 0.123456, "share=0.1235"),
        ("estimate_us", 1_000, "estimate=1.00 ms"),
        ("estimate_us", 999.4, "estimate=999 µs"),
        ("read_bytes", 1023, "read=1023 B"),
        ("bytes_read", 2**18, "read=256.0 KiB"),
        ("bytes_read", None, "read=none"),
        ("us_and_bytes", "a", "us_and_bytes=a"),
        ("read_bytes", 3 * 2**20, "read=3.0 MiB"),
        ("where", "größer\n\x1b[31m\x9b", "where=größer\\n\\x1b[31m\\x9b"),
        ("long", "ab" * 200, "long=" + "ab" * 100 + "…"),
    ],
)
def test_values_are_shown_for_people(name: str, value: Any, shown: str) -> None:
    assert tree(PlanStep("Scan", {name: value}), 300) == f"0.0 µs  Scan  {shown}"


# -- the wire


def request(body: Any) -> Request:
    return Request(
        method="POST",
        path="",
        headers={"content-type": "application/json"},
        body=orjson.dumps(body),
        parameters={"collection_id": "01890a5d-ac96-774b-bcce-b302099a8057"},
    )


def query(**extensions: Any) -> QueryRequest:
    asked = request({"query_embeddings": [[1, 2]], **extensions})
    parsed = wire.parse_query(asked, CONFIG).request
    assert isinstance(parsed, QueryRequest)
    return parsed


def test_requests_without_extensions_ask_for_none() -> None:
    assert wire.parse_get(request({}), CONFIG).request == GetRequest()
    for parsed in (query(), query(exact=False, explain=False, target_recall=None)):
        assert (parsed.exact, parsed.explain, parsed.target_recall) == (False, False, None)


def test_extensions_reach_the_request() -> None:
    assert wire.parse_get(request({"explain": True}), CONFIG).request == GetRequest(explain=True)
    for exact, explain in itertools.product((False, True), repeat=2):
        parsed = query(exact=exact, explain=explain)
        assert (parsed.exact, parsed.explain, parsed.target_recall) == (exact, explain, None)
    for given, expected in ((0, 0.0), (0.0, 0.0), (0.95, 0.95), (0.999999, 0.999999)):
        recall = query(target_recall=given).target_recall
        assert recall == expected and type(recall) is float


BAD_EXTENSIONS: list[tuple[str, Any, str]] = [
    ("explain", None, "invalid type: null, expected a boolean"),
    ("explain", 1, "invalid type: integer `1`, expected a boolean"),
    ("explain", "true", 'invalid type: string "true", expected a boolean'),
    ("exact", None, "invalid type: null, expected a boolean"),
    ("exact", [], "invalid type: sequence, expected a boolean"),
    ("target_recall", "0.9", 'invalid type: string "0.9", expected a number'),
    ("target_recall", True, "invalid type: boolean `true`, expected a number"),
    ("target_recall", {}, "invalid type: map, expected a number"),
    ("target_recall", 1, "invalid value: integer `1`, expected at least 0 and below 1"),
    ("target_recall", 1.0, "invalid value: floating point `1.0`, expected at least 0 and below 1"),
    ("target_recall", -0.5, "invalid value: floating point `-0.5`, expected at least 0 and below"),
    ("target_recall", 10**18, f"invalid value: integer `{10**18}`, expected at least 0 and below"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_EXTENSIONS)
def test_bad_extensions_are_refused_by_name(name: str, value: Any, message: str) -> None:
    client = Client()
    path = client.collection()
    verbs = ("get", "query") if name == "explain" else ("query",)
    for verb in verbs:
        body = {"query_embeddings": [[1, 2]], name: value}
        status, error, text = client.refused("POST", f"{path}/{verb}", body)
        assert (status, error) == (422, "ChromaError")
        expected = "Failed to deserialize the JSON body into the target type: "
        assert text.startswith(f"{expected}{name}: {message}")
    assert client.world.requests == []


def test_a_get_does_not_look_at_the_extensions_of_a_query() -> None:
    body = {"exact": "what", "target_recall": 7}
    assert wire.parse_get(request(body), CONFIG).request == GetRequest()
    with pytest.raises(Unprocessable, match=r"^Failed .*: explain: invalid type"):
        wire.parse_get(request({"explain": {}}), CONFIG)


def test_a_plan_is_one_more_key_and_all_else_is_as_without() -> None:
    records = Records(ids=["a"], metadatas=[b'{"x":1.0}'])
    plain = wire.encode_get(records, ["metadatas"])
    records.plan = PLAN
    encoded = wire.encode_get(records, ["metadatas"])
    assert encoded == plain[:-1] + b',"plan":' + orjson.dumps(PLAN.to_json()) + b"}"
    answer = QueryAnswer([Records(ids=["a"])], [np.array([0.5], dtype=np.float32)])
    plain = wire.encode_query(answer, ["distances"])
    answer.plan = PLAN
    encoded = wire.encode_query(answer, ["distances"])
    assert encoded == plain[:-1] + b',"plan":' + orjson.dumps(PLAN.to_json()) + b"}"


def test_only_who_asks_gets_a_plan() -> None:
    client = Client()
    path = client.collection()
    client.call("POST", f"{path}/add", {"ids": ["a"], "embeddings": [[1, 2]]})
    nearest = {"query_embeddings": [[1, 2]]}
    for verb, body, operator in (("get", {}, "Get"), ("query", nearest, "Query")):
        status, plain = client.call("POST", f"{path}/{verb}", body)
        assert status == 200 and "plan" not in plain
        status, explained = client.call("POST", f"{path}/{verb}", {**body, "explain": True})
        assert status == 200
        assert PlanStep.from_json(explained.pop("plan")).operator == operator
        assert explained == plain
