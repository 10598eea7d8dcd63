"""Nodes with some of the roles, on one directory, each the other's peer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import orjson
import pytest

from ochredb.catalog.pins import PinTable
from ochredb.errors import InvalidArgument, NotFound, Unavailable
from ochredb_compactor.config import CompactorConfig
from ochredb_node.node import Node, NodeConfig, Peers
from ochredb_node.roles import ALL_ROLES, Role, names_of, parse_roles

from .kernel import ManualClock, add_rows, make_collection

COLLECTIONS = "/api/v2/tenants/default_tenant/databases/default_database/collections"
EAGER = CompactorConfig(tail_rows_due=10, collect_period_s=0, grace_s=0)


def call(node: Node, method: str, path: str, body: object = None) -> object:
    content = b"" if body is None else orjson.dumps(body)
    headers = {"content-type": "application/json"}
    status, _, answer = node.handle(method, path, "", headers, content)
    assert status < 300, answer
    return orjson.loads(answer) if answer else None


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def start(stack: ExitStack, path: Path, roles: str, peers: Peers | None = None) -> Node:
    config = NodeConfig(path=str(path), roles=parse_roles(roles), compactor=EAGER)
    node = Node(config, peers=peers)
    node.start()
    stack.callback(node.close)
    return node


def test_each_role_in_a_node_of_its_own(stack: ExitStack, tmp_path: Path) -> None:
    log, query = start(stack, tmp_path, "log"), start(stack, tmp_path, "query")
    start(stack, tmp_path, "compactor")
    frontend = start(stack, tmp_path, "frontend", Peers(log=log.log, query=query.query))
    made = call(frontend, "POST", COLLECTIONS, {"name": "all"})
    assert isinstance(made, dict)
    path = f"{COLLECTIONS}/{made['id']}"
    ids = [f"r{number}" for number in range(50)]
    vectors = [[float(number), 1.0] for number in range(50)]
    call(frontend, "POST", f"{path}/add", {"ids": ids, "embeddings": vectors})
    assert call(frontend, "GET", f"{path}/count") == 50
    pause = threading.Event()
    for _ in range(200):
        if log.logs.snapshot(made["id"]).indexed_offset == 50:
            break
        pause.wait(0.05)
    assert log.logs.snapshot(made["id"]).indexed_offset == 50, "the compactor folded it"
    found = call(frontend, "POST", f"{path}/query", {"query_embeddings": [[7, 1]], "n_results": 1})
    assert isinstance(found, dict) and found["ids"] == [["r7"]]


def test_a_node_has_only_the_threads_of_its_roles(stack: ExitStack, tmp_path: Path) -> None:
    def names() -> set[str]:
        return {thread.name for thread in threading.enumerate()}

    query = start(stack, tmp_path, "query")
    assert "tidy" in names() and not names() & {"compact", "merge"}
    assert not {"log", "compactor", "frontend"} & set(query.__dict__), "what it has not is not made"
    start(stack, tmp_path, "compactor")
    assert {"compact", "merge"} <= names()
    stack.close()
    assert not names() & {"compact", "merge", "tidy"}


def test_a_compactor_with_workers_compacts_nothing_itself(stack: ExitStack, tmp_path: Path) -> None:
    node = Node(NodeConfig(path=str(tmp_path), compactor_workers=1, compactor=EAGER))
    node.start()
    stack.callback(node.close)
    assert "compact" not in {thread.name for thread in threading.enumerate()}
    collection = make_collection(node)
    add_rows(node, collection, 0, 20)
    node.compactor.compact_now(collection)
    assert node.logs.snapshot(collection).indexed_offset == 20, "but it does what it is asked for"


@pytest.mark.parametrize("missing", [Role.LOG, Role.QUERY])
def test_a_frontend_needs_its_peers(tmp_path: Path, missing: Role) -> None:
    node = Node(NodeConfig(path=str(tmp_path / "data"), roles=ALL_ROLES - {missing}))
    with pytest.raises(InvalidArgument, match=f"without the {missing.value} role"):
        node.start()
    assert not (tmp_path / "data").exists()


def test_who_does_not_compact_leaves_the_catalog_s_upkeep_to_others(tmp_path: Path) -> None:
    clock = ManualClock()
    nodes: list[Node] = []
    for role in (Role.LOG, Role.QUERY, Role.FRONTEND, Role.COMPACTOR):
        peers = Peers(log=nodes[0].log, query=nodes[1].query) if role is Role.FRONTEND else None
        config = NodeConfig(path=str(tmp_path), roles=frozenset({role}))
        nodes.append(Node(config, clock=clock, peers=peers))
        nodes[-1].start(background=False)
    *others, compactor = nodes
    pins = PinTable(compactor.database, clock)
    with pins.take("pin", "somebody", 10.0):
        pass
    clock.advance(1_000)
    for node in others:
        node._housekeep()
    pins.check("pin")
    compactor._housekeep()
    with pytest.raises(NotFound):
        pins.check("pin")
    for node in nodes:
        node.close()


def test_memory_is_looked_after_while_the_catalog_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    node = Node(NodeConfig(path=str(tmp_path)), clock=ManualClock(), tidy=told.append)
    node.start(background=False)

    def away() -> None:
        raise Unavailable("the catalog is away")

    monkeypatch.setattr(node.sqlite, "check_format", away)
    with pytest.raises(Unavailable):
        node._housekeep()
    assert told == [False]
    node.close()


def test_memory_is_given_back_some_time_after_the_last_job_or_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    node = Node(NodeConfig(path=str(tmp_path)), clock=clock)
    node.start(background=False)
    trims: list[float] = []
    monkeypatch.setattr(node.compactor, "_trim", lambda: trims.append(clock.monotonic_s()))
    collection = make_collection(node)
    for second in range(100):
        if second < 20:
            add_rows(node, collection, 2 * second, 2)
        if second == 50:
            node.compactor.fold_now(collection)
        node.compactor._housekeep()
        clock.advance(1)
    assert trims == [24.0, 49.0, 55.0, 80.0]
    node.close()


def test_free_pages_go_slowly_while_the_catalog_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    node = Node(NodeConfig(path=str(tmp_path)), clock=clock)
    node.start(background=False)
    released: list[int] = []
    monkeypatch.setattr(node.sqlite, "release_free_pages", released.append)
    monkeypatch.setattr(node.sqlite, "checkpoint", lambda: False)
    collection = make_collection(node)
    for wait_s in (11, 5, 11):
        add_rows(node, collection, len(released), 1)
        clock.advance(wait_s)
        node._housekeep()
        clock.advance(6)
        node._housekeep()
    assert released == [2_000, 200, 2_000]
    node.close()


def test_a_draining_node_says_so_and_answers(stack: ExitStack, tmp_path: Path) -> None:
    node = start(stack, tmp_path, "frontend,log,query")
    assert node.handle("GET", "/api/v2/healthcheck", "", {}, b"")[0] == 200
    node.drain()
    assert node.handle("GET", "/api/v2/healthcheck", "", {}, b"")[0] == 503
    add_rows(node, make_collection(node), 0, 3)


def test_roles_have_names() -> None:
    assert parse_roles("log, frontend") == {Role.LOG, Role.FRONTEND}
    assert names_of(parse_roles("compactor,frontend")) == "frontend,compactor"
    assert names_of(ALL_ROLES) == "frontend,log,query,compactor"
