"""Tenants, databases, collections: names, revisions, and what a drop takes with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ochredb.catalog import quarantine
from ochredb.catalog.namespace import DEFAULT_DATABASE, DEFAULT_TENANT, Namespace
from ochredb.catalog.schema import metadata
from ochredb.errors import AlreadyExists, InvalidArgument, NotFound
from ochredb.types import CollectionInfo, Op
from ochredb_node.node import Node

from .kernel import add_rows, append, make_collection, operations, running_node, sql


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node() as node:
        yield node


@pytest.fixture
def names(node: Node) -> Namespace:
    return node.namespace


def _create(names: Namespace, name: str, **more: Any) -> CollectionInfo:
    options: dict[str, Any] = {
        "configuration": {"hnsw": {}},
        "schema": {"s": 1},
        "metadata": {"k": "v"},
        "get_or_create": False,
    }
    return names.create_collection(DEFAULT_TENANT, DEFAULT_DATABASE, name, **(options | more))


def _quarantined(collection: str) -> quarantine.Quarantined:
    return quarantine.Quarantined(
        collection=collection,
        start=1,
        stop=2,
        reason="no reason",
        payload=b"bytes",
        object_key=None,
        checksum=0,
    )


class TestTenantsAndDatabases:
    def test_the_defaults_exist_once(self, names: Namespace) -> None:
        names.ensure_defaults()
        assert names.get_tenant(DEFAULT_TENANT)["resource_name"] is None
        assert [item.name for item in names.list_databases(DEFAULT_TENANT)] == [DEFAULT_DATABASE]

    def test_a_dropped_default_database_stays_dropped(self, names: Namespace) -> None:
        names.delete_database(DEFAULT_TENANT, DEFAULT_DATABASE)
        names.ensure_defaults()
        assert names.list_databases(DEFAULT_TENANT) == []

    def test_names_are_unique_within_their_parent(self, names: Namespace) -> None:
        names.create_tenant("t")
        with pytest.raises(AlreadyExists, match=r"\[t\]"):
            names.create_tenant("t")
        for tenant in ("t", DEFAULT_TENANT):
            names.create_database(tenant, "d")
        with pytest.raises(AlreadyExists, match=r"\[d\]"):
            names.create_database("t", "d")
        assert names.get_database("t", "d").id != names.get_database(DEFAULT_TENANT, "d").id

    def test_what_does_not_exist(self, names: Namespace) -> None:
        for call in (
            lambda: names.get_tenant("x"),
            lambda: names.create_database("x", "d"),
            lambda: names.get_database(DEFAULT_TENANT, "x"),
            lambda: names.delete_database(DEFAULT_TENANT, "x"),
            lambda: names.set_resource_name("x", "r"),
        ):
            with pytest.raises(NotFound, match="x"):
                call()
        assert names.list_databases("x") == []

    def test_a_resource_name(self, names: Namespace) -> None:
        names.set_resource_name(DEFAULT_TENANT, "r")
        assert names.get_tenant(DEFAULT_TENANT) == {"name": DEFAULT_TENANT, "resource_name": "r"}

    def test_databases_are_listed_by_name_in_pages(self, names: Namespace) -> None:
        names.create_tenant("t")
        for name in ("c", "a", "b"):
            names.create_database("t", name)
        assert [item.name for item in names.list_databases("t")] == ["a", "b", "c"]
        assert [item.name for item in names.list_databases("t", 1, 1)] == ["b"]
        assert names.list_databases("t", 0) == []


class TestCollections:
    def test_it_comes_back_as_it_was_created(self, names: Namespace) -> None:
        info = _create(names, "one", metadata={"k": "ä", "n": 1.5})
        assert info.revision == 0
        assert info.dimension is None
        assert names.get_collection(DEFAULT_TENANT, DEFAULT_DATABASE, "one") == info
        assert names.get_collection_by_id(info.id) == info
        assert _create(names, "two", metadata=None).metadata is None

    def test_get_or_create(self, names: Namespace) -> None:
        info = _create(names, "one")
        with pytest.raises(AlreadyExists, match=r"\[one\]"):
            _create(names, "one")
        assert _create(names, "one", metadata={"other": 1}, get_or_create=True) == info
        assert _create(names, "two", get_or_create=True).id != info.id

    def test_eight_threads_create_one(self, node: Node) -> None:
        found: list[str] = []
        threads = [
            threading.Thread(
                target=lambda: found.append(_create(node.namespace, "one", get_or_create=True).id)
            )
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(found) == 8
        assert len(set(found)) == 1

    def test_in_a_database_that_does_not_exist(self, names: Namespace) -> None:
        with pytest.raises(InvalidArgument, match=r"\[x\]"):
            names.create_collection(
                DEFAULT_TENANT, "x", "c", configuration={}, schema={}, metadata=None,
                get_or_create=True,
            )  # fmt: skip
        assert names.list_collections(DEFAULT_TENANT, "x") == []
        assert names.count_collections(DEFAULT_TENANT, "x") == 0

    def test_they_are_listed_in_order_of_creation_in_pages(self, names: Namespace) -> None:
        order = [f"c{i * 7 % 20}" for i in range(20)]
        for name in order:
            _create(names, name)

        def listed(*page: int) -> list[str]:
            found = names.list_collections(DEFAULT_TENANT, DEFAULT_DATABASE, *page)
            return [item.name for item in found]

        assert listed() == order
        assert listed(3, 5) == order[5:8]
        assert listed(0) == []
        assert names.count_collections(DEFAULT_TENANT, DEFAULT_DATABASE) == 20

    def test_each_change_grows_the_revision_and_leaves_the_rest(self, names: Namespace) -> None:
        info = _create(names, "one")
        renamed = names.update_collection(info.id, new_name="two")
        assert (renamed.name, renamed.metadata, renamed.revision) == ("two", {"k": "v"}, 1)
        changed = names.update_collection(info.id, new_metadata={"a": 1})
        assert (changed.name, changed.metadata, changed.revision) == ("two", {"a": 1}, 2)
        configured = names.update_collection(
            info.id, change_configuration=lambda known: ({"hnsw": {"ef": 7}}, known.schema)
        )
        assert configured.configuration == {"hnsw": {"ef": 7}}
        assert configured.schema == {"s": 1}
        assert configured == names.get_collection_by_id(info.id)
        with pytest.raises(NotFound):
            names.get_collection(DEFAULT_TENANT, DEFAULT_DATABASE, "one")
        assert names.update_collection(info.id, new_name="two").name == "two"

    def test_a_name_that_is_taken_and_an_id_that_is_none(self, names: Namespace) -> None:
        one, _ = _create(names, "one"), _create(names, "two")
        with pytest.raises(AlreadyExists, match=r"\[two\]"):
            names.update_collection(one.id, new_name="two")
        assert names.get_collection_by_id(one.id).revision == 0
        with pytest.raises(NotFound, match="nobody"):
            names.update_collection("nobody", new_name="x")

    def test_a_change_that_is_refused_changes_nothing(self, names: Namespace) -> None:
        info = _create(names, "one")

        def refuse(_known: CollectionInfo) -> tuple[dict[str, Any], dict[str, Any]]:
            raise InvalidArgument("no")

        with pytest.raises(InvalidArgument):
            names.update_collection(info.id, new_name="two", change_configuration=refuse)
        assert names.get_collection_by_id(info.id) == info

    def test_keys_and_dimension_come_from_the_log(self, node: Node) -> None:
        collection = make_collection(node)
        request = operations(Op.ADD, ["a"], [[1.0, 2.0]])
        pairs = frozenset({("n", "int"), ("n", "float"), ("s", "string")})
        append(node, collection, type(request)(op=Op.ADD, ids=["a"], embeddings=request.embeddings,
                                               key_types=pairs))  # fmt: skip
        info = node.namespace.get_collection_by_id(collection)
        assert (info.key_types, info.dimension) == (pairs, 2)

    def test_each_one_of_a_list_has_its_own_keys(self, node: Node) -> None:
        one, two, none = (make_collection(node, name) for name in ("one", "two", "none"))
        for collection, keys in ((one, {("a", "int"), ("b", "float")}), (two, {("a", "string")})):
            add = operations(Op.ADD, ["id"], [[1.0]])
            append(node, collection, replace(add, key_types=frozenset(keys)))

        def listed(limit: int | None, offset: int) -> list[CollectionInfo]:
            return node.namespace.list_collections(DEFAULT_TENANT, DEFAULT_DATABASE, limit, offset)

        wanted = [node.namespace.get_collection_by_id(each) for each in (one, two, none)]
        assert [len(info.key_types) for info in wanted] == [2, 1, 0]
        assert listed(None, 0) == wanted
        assert listed(1, 1) == wanted[1:2]


class TestDrops:
    def _tables_of(self, node: Node, collection: str) -> set[str]:
        """Tables in which any column still names the collection."""
        found = set()
        with node.database.read() as session:
            for table in metadata.sorted_tables:
                for row in session.all(sql(f"SELECT * FROM {table.name}")):
                    if collection in row:
                        found.add(table.name)
        return found

    def _fill(self, node: Node, name: str) -> str:
        collection = make_collection(node, name)
        add_rows(node, collection, 0, 3)
        node.compactor.compact_now(collection)
        append(node, collection, operations(Op.UPSERT, ["z"], [[1.0] * 4]), idempotency_key="k")
        with node.database.write() as session:
            quarantine.record(session, [_quarantined(collection)], now_us=1)
        return collection

    def test_a_dropped_collection_leaves_only_objects_to_collect(self, node: Node) -> None:
        collection, other = self._fill(node, "one"), self._fill(node, "two")
        assert len(self._tables_of(node, collection)) >= 9
        dropped = node.namespace.delete_collection(DEFAULT_TENANT, DEFAULT_DATABASE, "one")
        assert dropped == collection
        assert self._tables_of(node, collection) == set()
        assert len(self._tables_of(node, other)) >= 9
        with pytest.raises(NotFound, match=r"\[one\]"):
            node.namespace.delete_collection(DEFAULT_TENANT, DEFAULT_DATABASE, "one")

    def test_a_dropped_database_takes_its_collections_along(self, node: Node) -> None:
        collection = self._fill(node, "one")
        node.namespace.delete_database(DEFAULT_TENANT, DEFAULT_DATABASE)
        assert self._tables_of(node, collection) == set()
        with pytest.raises(NotFound, match=collection):
            node.namespace.get_collection_by_id(collection)

    def test_a_reset_leaves_the_defaults(self, node: Node) -> None:
        collection = self._fill(node, "one")
        node.namespace.create_tenant("t")
        node.namespace.reset()
        assert self._tables_of(node, collection) == set()
        with pytest.raises(NotFound):
            node.namespace.get_tenant("t")
        assert node.namespace.list_databases(DEFAULT_TENANT)[0].name == DEFAULT_DATABASE
        assert node.namespace.list_collections(DEFAULT_TENANT, DEFAULT_DATABASE) == []
