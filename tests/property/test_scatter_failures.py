"""Nodes that fail, are silent or see something else: the answer is the same, only later. (I11)"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ochredb.cancel import Cancel, Cancelled
from ochredb.clock import SystemClock
from ochredb.cluster.budget import RetryBudget
from ochredb.configuration import resolve
from ochredb.errors import DeadlineExceeded, Exhausted, Gone, NotFound, Unavailable, Unimplemented
from ochredb.explain import PlanStep
from ochredb.ids import IdSource
from ochredb.peers import GetRequest, PartsAnswer, PartsRequest, QueryRequest
from ochredb.types import Field, Op, Operations, Snapshot
from ochredb_node.node import Node
from ochredb_query.config import QueryConfig
from ochredb_query.service import QueryService

from .drivers import node_config
from .query_nodes import Line, QueryNodes

_ROWS, _PARTS, _DIM = 300, 6, 8
_UNREACHABLE = Unavailable("connection refused", unreachable=True)


class FixedClock:
    """Moves only when somebody sleeps. With ids from a seed, a part always has the same owner."""

    def __init__(self) -> None:
        self.elapsed_s = 0.0

    def now_us(self) -> int:
        return 1_900_000_000_000_000 + int(self.elapsed_s * 1e6)

    def monotonic_s(self) -> float:
        return self.elapsed_s

    def sleep(self, seconds: float) -> None:
        self.elapsed_s += seconds


@pytest.fixture
def node(tmp_path: Any) -> Iterator[Node]:
    clock = FixedClock()
    ids = IdSource(clock, random.Random(1))
    node = Node(node_config(str(tmp_path / "store")), clock=clock, ids=ids)
    node.start(background=False)
    yield node
    node.close()


def write(node: Node, collection: str, op: Op, first: int, count: int) -> None:
    rng = np.random.default_rng(first)
    embeddings = rng.standard_normal((count, _DIM)).astype(np.float32)
    node.log.append(
        collection,
        Operations(
            op=op,
            ids=[f"id-{number}" for number in range(first, first + count)],
            embeddings=None if op is Op.DELETE else embeddings,
            documents=None if op is Op.DELETE else [f"{op.name} {i}" for i in range(count)],
        ),
        cancel=Cancel(),
    )


@pytest.fixture
def collection(node: Node) -> str:
    """Six parts, and a tail that changes some of their rows."""
    configuration, schema = resolve(None, {"hnsw": {"space": "l2"}}, None, num_threads=1)
    info = node.namespace.create_collection(
        "default_tenant",
        "default_database",
        "large",
        configuration=configuration,
        schema=schema,
        metadata=None,
        get_or_create=False,
    )
    each = _ROWS // _PARTS
    for number in range(_PARTS):
        write(node, info.id, Op.ADD, number * each, each)
        node.compactor.fold_now(info.id)
    write(node, info.id, Op.UPSERT, 40, 20)
    write(node, info.id, Op.DELETE, 95, 10)
    write(node, info.id, Op.ADD, _ROWS, 5)
    return info.id


def spread(node: Node, count: int = 3, **more: Any) -> QueryNodes:
    return QueryNodes(node, count, QueryConfig(spread_bytes=0), **more)


READS: list[GetRequest | QueryRequest] = [
    GetRequest(),
    GetRequest(limit=7, offset=93, fields=Field.EMBEDDING | Field.DOCUMENT),
    GetRequest(offset=290),
    QueryRequest(embeddings=np.ones((1, _DIM), np.float32)),
    QueryRequest(embeddings=np.eye(3, _DIM, dtype=np.float32), n_results=1000),
]


def answer(service: Any, collection: str, request: GetRequest | QueryRequest) -> Any:
    """In a form that can be compared."""
    if isinstance(request, GetRequest):
        records = [service.get(collection, request, cancel=Cancel())]
        distances: list[Any] = []
    else:
        found = service.query(collection, request, cancel=Cancel())
        records, distances = found.records, [each.tobytes() for each in found.distances]
    return distances, [
        (
            each.ids,
            each.documents,
            each.metadatas,
            None if each.embeddings is None else each.embeddings.tobytes(),
        )
        for each in records
    ]


def check_all(node: Node, nodes: QueryNodes, collection: str, which: int = 0) -> None:
    for request in READS:
        expected = answer(node.query, collection, request)
        assert answer(nodes.services[which], collection, request) == expected


def test_every_node_is_asked_for_its_parts_alone(node: Node, collection: str) -> None:
    nodes = spread(node)
    check_all(node, nodes, collection)
    asked = [set(line.shares) for line in nodes.lines.values()]
    assert asked[0] == set(), "a node's own parts are searched directly"
    assert all(len(parts) > 0 for parts in asked[1:])
    assert asked[1].isdisjoint(asked[2])
    count = nodes.services[0].count(collection, cancel=Cancel())
    assert count == node.query.count(collection, cancel=Cancel()) == _ROWS - 10 + 5


def test_a_small_collection_is_read_by_one_node(node: Node, collection: str) -> None:
    nodes = QueryNodes(node, 2, QueryConfig())
    check_all(node, nodes, collection)
    assert list(nodes.shares()) == [0, 0]


@pytest.mark.parametrize("error", [_UNREACHABLE, Unavailable("draining"), Unimplemented("old")])
def test_a_node_that_fails_is_passed_over(
    node: Node, collection: str, error: BaseException
) -> None:
    nodes = spread(node)
    nodes.lines["query-1"].always = error
    check_all(node, nodes, collection)
    nodes.lines["query-2"].always = error
    check_all(node, nodes, collection)  # Nobody else is left.


def test_a_node_that_is_back_is_asked_again(node: Node, collection: str) -> None:
    nodes = spread(node)
    nodes.lines["query-1"].fails = [_UNREACHABLE] * 3
    for _ in range(200):
        check_all(node, nodes, collection)
        if not nodes.lines["query-1"].fails:
            break
        node.clock.sleep(0.02)
    before = sum(nodes.lines["query-1"].shares.values())
    node.clock.sleep(1.1)
    check_all(node, nodes, collection)
    assert sum(nodes.lines["query-1"].shares.values()) > before


def test_a_busy_node_is_not_spared_by_others(node: Node, collection: str) -> None:
    """Passing over who says 429 would pass the load on to the next, and to the next."""
    nodes = spread(node)
    nodes.lines["query-1"].always = Exhausted("too much to do")
    with pytest.raises(Exhausted, match="too much"):
        answer(nodes.services[0], collection, READS[0])


class _Silent(Line):
    """Answers only when it is told to, or called off."""

    def __init__(self, line: Line) -> None:
        super().__init__(line.service)
        self.go_on = threading.Event()
        self.called_off = threading.Event()

    def search_parts(
        self, collection_id: str, request: PartsRequest, *, cancel: Cancel
    ) -> PartsAnswer:
        def call_off() -> None:
            self.called_off.set()
            self.go_on.set()

        cancel.when_cancelled(call_off)
        self.go_on.wait()
        cancel.check()
        return super().search_parts(collection_id, request, cancel=cancel)


def test_the_next_is_asked_when_a_node_is_silent(node: Node, collection: str) -> None:
    nodes = spread(node, patience_s=0.02, clock=SystemClock())
    silent = nodes.lines["query-1"] = _Silent(nodes.lines["query-1"])
    expected = answer(node.query, collection, READS[3])
    assert answer(nodes.services[0], collection, READS[3]) == expected
    assert silent.called_off.wait(10), "whoever lost is called off"


def test_without_a_token_no_second_node_is_bothered(
    node: Node, collection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RetryBudget, "take", lambda _self: False)
    nodes = spread(node, patience_s=0.02, clock=SystemClock())
    silent = nodes.lines["query-1"] = _Silent(nodes.lines["query-1"])
    expected = answer(node.query, collection, READS[3])
    timer = threading.Timer(0.2, silent.go_on.set)
    timer.start()
    before = sum(nodes.lines["query-2"].shares.values())
    assert answer(nodes.services[0], collection, READS[3]) == expected
    once = sum(nodes.lines["query-2"].shares.values()) - before
    timer.join()
    silent.always = _UNREACHABLE
    assert answer(nodes.services[0], collection, READS[3]) == expected
    assert sum(nodes.lines["query-2"].shares.values()) - before == 2 * once


def test_a_read_that_is_called_off_calls_off_its_shares(node: Node, collection: str) -> None:
    nodes = spread(node, patience_s=60.0)
    silent = nodes.lines["query-1"] = _Silent(nodes.lines["query-1"])
    cancel = Cancel()
    timer = threading.Timer(0.05, cancel.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        nodes.services[0].get(collection, GetRequest(), cancel=cancel)
    assert silent.called_off.wait(10)
    timer.join()


def test_a_share_has_the_deadline_of_its_read(node: Node, collection: str) -> None:
    nodes = spread(node)
    seen: list[float | None] = []

    class Watching(Line):
        def search_parts(self, *args: Any, cancel: Cancel, **more: Any) -> PartsAnswer:
            seen.append(cancel.remaining_s())
            raise DeadlineExceeded("late")

    nodes.lines["query-1"] = Watching()
    with pytest.raises(DeadlineExceeded):
        nodes.services[0].get(collection, GetRequest(), cancel=Cancel(5.0))
    assert seen[0] is not None
    assert 0 < seen[0] <= 5.0


def test_who_sees_an_older_state_has_the_read_planned_again(node: Node, collection: str) -> None:
    nodes = spread(node)
    nodes.lines["query-1"].fails = [Gone("too old")]
    check_all(node, nodes, collection)
    nodes.lines["query-1"].always = Gone("too old")  # Always: it is not asked a third time.
    check_all(node, nodes, collection)


def snapshot_of(node: Node, collection: str) -> Snapshot:
    return node.logs.snapshot(collection)


def parts_of(node: Node, snapshot: Snapshot) -> tuple[str, ...]:
    parts = node.versions.parts(snapshot.collection_id, snapshot.version)
    return tuple(part.manifest.id for part in parts)


def test_readers_behind_one_another_see_their_own_snapshots(node: Node, collection: str) -> None:
    """What a node was asked for by one is not what it shows another."""
    (service,) = spread(node, 1).services
    snapshots = [snapshot_of(node, collection)]
    for first in (0, 110, 200):
        write(node, collection, Op.DELETE, first, 10)
        snapshots.append(snapshot_of(node, collection))
    parts = parts_of(node, snapshots[0])
    found: dict[int, list[str]] = {}
    for number in (3, 0, 2, 1, 0, 3):
        request = PartsRequest(snapshot=snapshots[number], part_ids=parts, request=GetRequest())
        ids = service.search_parts(collection, request, cancel=Cancel()).records.ids
        assert found.setdefault(number, ids) == ids
    # Twenty were replaced, and ten deleted; then ten more of the parts' rows each time.
    assert [len(found[number]) for number in range(4)] == [270, 260, 250, 240]


def test_a_part_that_joins_later_has_the_whole_log_applied(node: Node, collection: str) -> None:
    (service,) = spread(node, 1).services
    snapshot = snapshot_of(node, collection)
    parts = parts_of(node, snapshot)
    rows = []
    for part_ids in (parts[:2], parts[1:3], parts):
        request = PartsRequest(snapshot=snapshot, part_ids=part_ids, request=GetRequest())
        found = service.search_parts(collection, request, cancel=Cancel())
        rows.append(len(found.records.ids))
    assert rows == [40 + 35, 35 + 45, 270]


def test_what_is_not_there_any_more_is_gone(node: Node, collection: str) -> None:
    early, late, last = spread(node, 3).services
    snapshot = snapshot_of(node, collection)
    parts = parts_of(node, snapshot)

    def ask(service: QueryService, part_ids: tuple[str, ...]) -> int:
        request = PartsRequest(snapshot=snapshot, part_ids=part_ids, request=GetRequest())
        return len(service.search_parts(collection, request, cancel=Cancel()).seqs)

    with pytest.raises(Gone, match="no part"):
        ask(early, ("00000000-0000-7000-8000-000000000000",))
    assert ask(early, parts[:3]) == 120
    node.compactor.compact_now(collection)
    node.versions.release_replaced(2**62, 10)
    with pytest.raises(Gone, match="dropped"):
        ask(late, parts)
    node.compactor.collect_now(sweep_orphans=True)
    assert ask(early, parts[:3]) == 120, "what was opened stays readable"
    with pytest.raises(Gone, match="no object"):
        ask(early, parts)
    node.namespace.delete_collection("default_tenant", "default_database", "large")
    with pytest.raises(NotFound):
        ask(last, parts)


def test_a_merge_between_reads_moves_all_nodes_on(node: Node, collection: str) -> None:
    nodes = spread(node)
    for first in range(0, _ROWS, 60):
        check_all(node, nodes, collection, which=first % 3)
        write(node, collection, Op.UPSERT, first, 30)
        check_all(node, nodes, collection, which=(first + 1) % 3)
        node.compactor.compact_now(collection)
        node.compactor.collect_now(sweep_orphans=True)
    check_all(node, nodes, collection)


def steps_of(plan: PlanStep, operator: str) -> list[PlanStep]:
    found = [plan] if plan.operator == operator else []
    for inner in plan.steps:
        found += steps_of(inner, operator)
    return found


def test_explain_shows_who_did_what(node: Node, collection: str) -> None:
    nodes = spread(node)
    request = QueryRequest(embeddings=np.ones((1, _DIM), np.float32), explain=True)
    plan = nodes.services[0].query(collection, request, cancel=Cancel()).plan
    assert plan is not None
    (scatter,) = steps_of(plan, "Scatter")
    assert scatter.details == {"nodes": 3, "parts": _PARTS}
    shares = [step for step in scatter.steps if step.operator == "Node"]
    assert {step.details["node"] for step in shares} == set(nodes.lines)
    assert sum(int(step.details["parts"] or 0) for step in shares) == _PARTS
    assert all(steps_of(step, "Nearest") for step in shares)
    (merge,) = steps_of(plan, "Merge")
    assert merge.details == {"rows_in": 30, "rows_out": 10}


def test_no_node_has_more_than_its_share_and_a_little(node: Node) -> None:
    """Hashing alone would give some node twice as much as another."""
    (one, two, _), members = spread(node).services, 3
    assert one._scatter is not None
    assert two._scatter is not None
    for parts in (6, 12, 40):
        sizes = {f"part-{parts}-{number:02}": 1_000 for number in range(parts)}
        owners = one._scatter.owners(sizes)
        assert sorted(part for ids in owners.values() for part in ids) == sorted(sizes)
        assert max(map(len, owners.values())) <= 1.15 * parts / members
        assert owners == dict(sorted(two._scatter.owners(sizes).items()))
        assert next(iter(two._scatter.owners(sizes))) == "query-1", "its own come first"
        newest = {**sizes, "part-99": 1_000}
        later = one._scatter.owners(newest)
        stayed = sum(len(set(owners[name]) & set(later[name])) for name in owners)
        assert stayed >= 0.7 * parts
    large = {"part-0": 10_000, "part-1": 10}
    assert sum(len(ids) for ids in one._scatter.owners(large).values()) == 2
