"""A node and its directory: whose it is, who shares it, and what a fork does to it."""

from __future__ import annotations

import os
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

from ochredb.cancel import Cancel
from ochredb.catalog.migrate import CATALOG_NAME
from ochredb.errors import Corrupt, InvalidArgument, NotFound, Unavailable
from ochredb.storage.directory import DirectoryStore
from ochredb_node import shared
from ochredb_node.node import Node, NodeConfig
from ochredb_node.roles import Role
from ochredb_node.shared import SharedNode, open_shared

from .kernel import add_rows, ids_of, make_collection, running_node

COLLECTIONS = "/api/v2/tenants/default_tenant/databases/default_database/collections"


def _call(node: Node | SharedNode, method: str, path: str, body: Any = None) -> Any:
    headers = {"content-type": "application/json"}
    content = b"" if body is None else orjson.dumps(body)
    status, _, answer = node.handle(method, path, "", headers, content)
    assert status < 300, answer
    return orjson.loads(answer) if answer else None


def _create(node: Node | SharedNode, name: str) -> str:
    return str(_call(node, "POST", COLLECTIONS, {"name": name})["id"])


def _add(node: Node | SharedNode, collection: str, name: str) -> None:
    body = {"ids": [name], "embeddings": [[1.0, 2.0]]}
    _call(node, "POST", f"{COLLECTIONS}/{collection}/add", body)


def _ids(node: Node | SharedNode, collection: str) -> list[str]:
    return list(_call(node, "POST", f"{COLLECTIONS}/{collection}/get", {})["ids"])


def _in_child(work: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestDirectory:
    def test_what_was_written_is_there_after_a_restart(self, tmp_path: Path) -> None:
        with running_node(str(tmp_path)) as node:
            collection = make_collection(node)
            add_rows(node, collection, 0, 5)
        with running_node(str(tmp_path)) as node:
            assert len(ids_of(node, collection)) == 5

    def test_without_closing_too(self, tmp_path: Path) -> None:
        def child() -> None:
            node = Node(NodeConfig(path=str(tmp_path)))
            node.start()
            collection = make_collection(node)
            add_rows(node, collection, 0, 5)

        _in_child(child)
        with running_node(str(tmp_path)) as node:
            (info,) = node.namespace.list_collections("default_tenant", "default_database")
            assert len(ids_of(node, info.id)) == 5

    def test_a_catalog_with_another_store_s_objects_is_refused(self, tmp_path: Path) -> None:
        """Its sweep would delete them all."""
        for name in ("one", "two"):
            with running_node(str(tmp_path / name)) as node:
                add_rows(node, make_collection(node), 0, 2)
        shutil.rmtree(tmp_path / "one" / "objects")
        shutil.copytree(tmp_path / "two" / "objects", tmp_path / "one" / "objects")
        with pytest.raises(InvalidArgument, match=r"belongs to store .* objects in .* to store"):
            Node(NodeConfig(path=str(tmp_path / "one"))).start()

    def test_a_catalog_without_its_objects_is_refused(self, tmp_path: Path) -> None:
        with running_node(str(tmp_path)) as node:
            make_collection(node)
        shutil.rmtree(tmp_path / "objects")
        with pytest.raises(InvalidArgument, match="missing or belong to no store"):
            Node(NodeConfig(path=str(tmp_path))).start()
        assert not (tmp_path / "objects").exists()

    def test_objects_without_their_catalog_are_refused(self, tmp_path: Path) -> None:
        with running_node(str(tmp_path)) as node:
            add_rows(node, make_collection(node), 0, 2)
        for file in tmp_path.glob("ochredb.sqlite3*"):
            file.unlink()
        with pytest.raises(Corrupt, match="is missing: restore a backup"):
            Node(NodeConfig(path=str(tmp_path))).start()

    def test_a_store_whose_creation_was_cut_short_is_completed(self, tmp_path: Path) -> None:
        with running_node(str(tmp_path)):
            pass
        (tmp_path / "objects" / "store_id").unlink()
        with running_node(str(tmp_path)) as node:
            make_collection(node)

    def test_somebody_else_s_directory_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").write_text("dear all")
        with pytest.raises(InvalidArgument, match=r"letter\.txt"):
            Node(NodeConfig(path=str(tmp_path))).start()
        assert [item.name for item in tmp_path.iterdir()] == ["letter.txt"]

    def test_a_failed_start_leaves_nothing_open(self, tmp_path: Path) -> None:
        with running_node(str(tmp_path)) as node:
            make_collection(node)
        shutil.rmtree(tmp_path / "objects")
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(InvalidArgument):
                Node(NodeConfig(path=str(tmp_path))).start()
        assert len(set(os.listdir("/proc/self/fd")) - before) <= 1


def test_closing_folds_what_is_quickly_folded(tmp_path: Path) -> None:
    node = Node(NodeConfig(path=str(tmp_path)))
    node.start()
    collection = make_collection(node)
    add_rows(node, collection, 0, 50)
    node.close()
    node.close()
    with running_node(str(tmp_path)) as again:
        snapshot = again.logs.snapshot(collection)
        assert snapshot.indexed_offset == snapshot.last_offset == 50
        assert len(ids_of(again, collection)) == 50


def test_background_threads_fold_merge_and_collect(tmp_path: Path) -> None:
    from ochredb_compactor.config import CompactorConfig

    config = CompactorConfig(tail_rows_due=10, grace_s=0, collect_period_s=0)
    node = Node(NodeConfig(path=str(tmp_path), compactor=config))
    node.start()
    collection = make_collection(node)
    for number in range(6):
        add_rows(node, collection, 20 * number, 20)
    pause = threading.Event()
    for _ in range(200):
        status = node.query.indexing_status(collection, cancel=Cancel())
        listed = DirectoryStore(str(tmp_path / "objects")).list("parts/")
        if status.progress == 1.0 and len(list(listed)) <= 8:
            break
        pause.wait(0.05)
    assert node.query.indexing_status(collection, cancel=Cancel()).progress == 1.0
    assert len(ids_of(node, collection)) == 120
    node.close()
    assert not any(thread.name in ("compact", "merge") for thread in threading.enumerate())


def test_a_closed_node_refuses(tmp_path: Path) -> None:
    node = Node(NodeConfig(path=str(tmp_path)))
    node.start(background=False)
    node.close()
    with pytest.raises(Unavailable, match="closed"):
        node.handle("GET", "/api/v2/heartbeat", "", {}, b"")


def test_what_fails_to_close_keeps_nothing_else_open(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(NodeConfig())
    node.start()

    def fail() -> None:
        raise RuntimeError("the connection to Redis")

    monkeypatch.setattr(node.shared, "close", fail)
    with pytest.raises(RuntimeError, match="Redis"):
        node.close()
    assert not any(thread.name in ("compact", "merge") for thread in threading.enumerate())


class TestEmbedded:
    """One node per directory and process, counted."""

    @pytest.fixture(autouse=True)
    def _registry(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        registry = shared._Embedded()
        monkeypatch.setattr(shared, "_embedded", registry)
        yield
        registry.close_all()

    def test_two_users_share_a_node_and_the_last_one_closes_it(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "link").symlink_to("data")
        one = open_shared(str(tmp_path / "data"), False)
        two = open_shared(str(tmp_path / "link"), False)
        (node,) = shared._embedded._nodes.values()
        collection = _create(one, "shared")
        _add(one, collection, "a")
        assert _ids(two, collection) == ["a"]
        one.close()
        one.close()
        with pytest.raises(Unavailable, match="closed"):
            _ids(one, collection)
        assert _ids(two, collection) == ["a"]
        two.close()
        assert node._closed
        again = open_shared(str(tmp_path / "data"), False)
        assert _ids(again, collection) == ["a"]
        again.close()

    def test_state_in_memory_outlives_its_users(self) -> None:
        one = open_shared(None, False)
        collection = _create(one, "kept")
        _add(one, collection, "a")
        one.close()
        assert _ids(open_shared(None, False), collection) == ["a"]

    def test_eight_threads_open_one_node(self, tmp_path: Path) -> None:
        opened: list[SharedNode] = []
        threads = [
            threading.Thread(target=lambda: opened.append(open_shared(str(tmp_path), False)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(opened) == 8
        assert len(shared._embedded._nodes) == 1

    def test_a_directory_that_cannot_be_opened_leaves_no_node(self, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").touch()
        with pytest.raises(InvalidArgument):
            open_shared(str(tmp_path), False)
        assert shared._embedded._nodes == {}

    def test_after_a_fork_both_sides_go_on(self, tmp_path: Path) -> None:
        shared = open_shared(str(tmp_path), False)
        collection = _create(shared, "both")
        _add(shared, collection, "before")

        def child() -> None:
            _add(shared, collection, "child")
            assert _ids(shared, collection) == ["before", "child"]
            shared.close()

        _in_child(child)
        assert _ids(shared, collection) == ["before", "child"]
        _add(shared, collection, "parent")
        assert _ids(shared, collection) == ["before", "child", "parent"]

    def test_a_fork_while_a_write_is_going_on(self, tmp_path: Path) -> None:
        """The child inherits locks that nobody will open; it must not need them."""
        shared = open_shared(str(tmp_path), False)
        collection = _create(shared, "busy")
        stop = threading.Event()

        def write() -> None:
            number = 0
            while not stop.is_set():
                _add(shared, collection, f"w{number}")
                number += 1

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for number in range(4):
                _in_child(partial(_add, shared, collection, f"child{number}"))
        finally:
            stop.set()
            writer.join()
        assert {f"child{number}" for number in range(4)} <= set(_ids(shared, collection))

    def test_a_fork_in_memory_is_a_copy(self) -> None:
        shared = open_shared(None, False)
        collection = _create(shared, f"copied-{os.getpid()}")
        _add(shared, collection, "before")

        def child() -> None:
            _add(shared, collection, "child")
            assert _ids(shared, collection) == ["before", "child"]

        _in_child(child)
        assert _ids(shared, collection) == ["before"]


def test_a_node_without_a_directory_keeps_nothing() -> None:
    with running_node() as node:
        collection = make_collection(node)
        add_rows(node, collection, 0, 3)
    with running_node() as node, pytest.raises(NotFound):
        ids_of(node, collection)


def test_who_only_compacts_leaves_the_catalogs_log_to_those_who_append(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    catalog = tmp_path / "store" / CATALOG_NAME
    with running_node(path) as node:
        add_rows(node, make_collection(node), 0, 500)
        before = catalog.stat().st_size
        worker = Node(NodeConfig(path=path, roles=frozenset({Role.COMPACTOR})))
        worker.start(background=False)
        worker.housekeeping.turn()
        assert catalog.stat().st_size == before
        node.housekeeping.turn()
        assert catalog.stat().st_size > before
        worker.close()
