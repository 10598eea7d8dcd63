"""Garbage and orphans: what is referenced is never deleted, what is not is (I6)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ochredb.catalog.objects import Swept
from ochredb.errors import Conflict, Unavailable
from ochredb.processes import process_name
from ochredb.types import Op
from ochredb_compactor import garbage
from ochredb_compactor.compaction import compact
from ochredb_compactor.world import World
from ochredb_node.node import Node

from .kernel import (
    ManualClock,
    add_rows,
    all_rows,
    append,
    ids_of,
    make_collection,
    object_keys,
    operations,
    running_node,
    sql,
)


def _world(node: Node) -> World:
    return node.compactor._world


def _no_step() -> None:
    pass


def _delete(node: Node, collection: str, *ids: str) -> None:
    append(node, collection, operations(Op.DELETE, ids))


def _fold(node: Node, collection: str) -> None:
    node.compactor.fold_now(collection)


class TestGarbage:
    """An object is deleted a grace period after its last reference went, and never before (I6)."""

    @pytest.fixture
    def node(self, clock: ManualClock) -> Iterator[Node]:
        with running_node(clock=clock, inline_bytes_max=0, grace_s=60) as node:
            yield node

    def _referenced(self, node: Node) -> set[str]:
        keys: set[str] = set()
        with node.database.read() as session:
            keys.update(key for (key,) in session.all(sql("SELECT key FROM object_references")))
        return keys

    def test_a_fragment_object_outlives_its_compaction_by_the_grace(
        self, node: Node, clock: ManualClock
    ) -> None:
        collection = make_collection(node)
        add_rows(node, collection, 0, 5)
        (fragment,) = object_keys(node)
        assert self._referenced(node) == {fragment}
        clock.advance(1_000)
        assert node.compactor.collect_now(sweep_orphans=True) == 0
        _fold(node, collection)
        assert fragment not in self._referenced(node)
        clock.advance(59)
        assert node.compactor.collect_now(sweep_orphans=True) == 0
        assert fragment in object_keys(node)
        clock.advance(2)
        assert node.compactor.collect_now(sweep_orphans=True) == 1
        assert fragment not in object_keys(node)
        assert len(ids_of(node, collection)) == 5

    def test_nothing_referenced_is_ever_deleted_and_the_rest_is(
        self, node: Node, clock: ManualClock
    ) -> None:
        """Exact set of objects after quiescence: those of the newest versions."""
        names = ["one", "two", "three"]
        collections = [make_collection(node, name) for name in names]
        for step in range(24):
            collection = collections[step % 3]
            add_rows(node, collection, 10 * step, 10)
            if step % 4 == 1:
                _delete(node, collection, f"id-{10 * step}")
            if step % 2:
                _fold(node, collection)
            if step % 5 == 0:
                node.compactor.compact_now(collection)
            clock.advance(25)
            node.compactor.collect_now(sweep_orphans=step % 3 == 0)
            assert self._referenced(node) <= object_keys(node)
        expected = [all_rows(node, collection) for collection in collections]
        for collection in collections:
            node.compactor.compact_now(collection)
        node.namespace.delete_collection("default_tenant", "default_database", "three")
        for _ in range(2):
            clock.advance(61)
            node.compactor.collect_now(sweep_orphans=True)
        assert object_keys(node) == self._referenced(node)
        kept = {
            item.key
            for collection in collections[:2]
            for part in node.versions.parts(collection, node.logs.snapshot(collection).version)
            for item in part.manifest.objects
        }
        assert object_keys(node) == kept
        assert [all_rows(node, collection) for collection in collections[:2]] == expected[:2]

    def test_an_object_that_cannot_be_deleted_does_not_keep_the_others(
        self, node: Node, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        collection = make_collection(node)
        for step in range(4):
            add_rows(node, collection, 10 * step, 10)
            node.compactor.compact_now(collection)
        node.namespace.delete_collection("default_tenant", "default_database", "records")
        clock.advance(100)
        delete, stuck = _world(node).store.delete, min(object_keys(node))

        def failing(key: str) -> None:
            if key == stuck:
                raise Unavailable("input/output error")
            delete(key)

        monkeypatch.setattr(_world(node).store, "delete", failing)
        node.compactor.collect_now(sweep_orphans=False)
        assert object_keys(node) == {stuck}
        monkeypatch.undo()
        node.compactor.collect_now(sweep_orphans=False)
        assert object_keys(node) == set()

    def test_a_replaced_version_goes_after_its_retention_and_the_grace(
        self, node: Node, clock: ManualClock
    ) -> None:
        """Without a next version: a settled store holds what it shows, and no more."""
        collection = make_collection(node)
        for number in range(4):
            add_rows(node, collection, 10 * number, 10)
            _fold(node, collection)
        clock.advance(1_000)
        node.compactor.collect_now(sweep_orphans=True)
        old = object_keys(node)
        before = node.logs.snapshot(collection).version
        node.compactor.compact_now(collection)
        version = node.logs.snapshot(collection).version
        assert version == before + 1
        for second in range(1, 80):
            clock.advance(1)
            node.compactor.collect_now(sweep_orphans=second % 10 == 0)
            # Replaced at 0, forgotten at 10, its objects' grace over at 70.
            assert bool(node.versions.parts(collection, before)) == (second < 10)
            assert (old <= object_keys(node)) == (second < 70), second
            assert len(node.versions.parts(collection, version)) == 1
        assert not old & object_keys(node)
        assert len(ids_of(node, collection)) == 40

    def test_a_shared_catalog_is_asked_for_versions_made_lately(
        self, node: Node, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And every ten minutes for all: what is left over is found then."""
        monkeypatch.setattr(type(node.database), "is_local", False)
        collection = make_collection(node)

        def compact_twice() -> None:
            for _ in range(2):
                add_rows(node, collection, len(ids_of(node, collection)), 3)
                node.compactor.compact_now(collection)

        def release() -> int:
            return node.versions.release_replaced(clock.now_us() - 10_000_000, 10)

        compact_twice()
        assert release() == 0  # All were looked at; it is too early.
        clock.advance(11)
        assert node.versions.any_replaced(clock.now_us() - 10_000_000, clock.now_us())
        assert release() == 1
        compact_twice()
        clock.advance(25 * 60)
        node.versions._all_looked_at_us = clock.now_us()
        assert release() == 0
        clock.advance(11 * 60)
        assert release() == 1
        assert release() == 0

    def test_a_version_replaced_while_it_is_released_keeps_its_successor(
        self, node: Node, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was read before the lock is looked at again under it."""
        collection = make_collection(node)
        for number in range(2):
            add_rows(node, collection, 10 * number, 10)
            _fold(node, collection)
        clock.advance(11)
        due = clock.now_us() - 10_000_000
        write = node.database.write

        def fold_first(name: str) -> Any:
            monkeypatch.setattr(node.database, "write", write)
            add_rows(node, collection, 20, 10)
            _fold(node, collection)
            return write(name)

        monkeypatch.setattr(node.database, "write", fold_first)
        assert node.versions.release_replaced(due, 10) == 1
        assert len(node.versions.parts(collection, 3)) == 3
        assert len(node.versions.parts(collection, 2)) == 2  # Replaced just now.
        assert node.versions.parts(collection, 1) == []

    def test_a_read_of_a_collected_version_plans_again(
        self, clock: ManualClock, tmp_path: Path
    ) -> None:
        """Its snapshot or its view may be older than the retention: it answers all the same."""
        with running_node(str(tmp_path), clock=clock, inline_bytes_max=0) as node:
            collection = make_collection(node)
            for number in range(4):
                add_rows(node, collection, 10 * number, 10)
                _fold(node, collection)
            expected = ids_of(node, collection)
            view = node.query._loaded[collection].view
            snapshot = node.logs.snapshot(collection)
            node.compactor.compact_now(collection)
            node.query.drop(collection)
            for _ in range(2):
                clock.advance(100)
                node.compactor.collect_now(sweep_orphans=True)
            stale = [snapshot]
            current = node.logs.snapshot

            def sleepy(name: str) -> Any:
                return stale.pop() if stale else current(name)

            with pytest.MonkeyPatch.context() as monkey:
                monkey.setattr(node.logs, "snapshot", sleepy)
                assert ids_of(node, collection) == expected
            assert not stale
            assert view is not None
            # What is mapped may be read for as long as somebody holds it.
            assert [i for s in view.segments for i in s.segment.take_ids(np.arange(10))] == expected

    def test_a_key_shared_by_two_collections_stays_for_the_other(
        self, node: Node, clock: ManualClock
    ) -> None:
        collection = make_collection(node)
        add_rows(node, collection, 0, 5)
        (key,) = object_keys(node)
        with node.database.write() as session:
            session.run(
                sql(f"INSERT INTO object_references VALUES ('{key}', 'fragment', 'other', 1)")
            )
        node.namespace.delete_collection("default_tenant", "default_database", "records")
        clock.advance(1_000)
        assert node.compactor.collect_now(sweep_orphans=True) == 0
        assert object_keys(node) == {key}

    def test_an_object_being_deleted_cannot_be_referred_to(
        self, node: Node, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        collection = make_collection(node)
        add_rows(node, collection, 0, 5)
        _fold(node, collection)
        clock.advance(100)
        (key,) = _world(node).objects.mark_due(clock.now_us(), 10)
        from ochredb.catalog.objects import refer

        with pytest.raises(Conflict, match="being deleted"), node.database.write() as session:
            refer(session, [key], kind="fragment", collection=collection, number=1)

    def test_what_a_crashed_collector_marked_is_deleted_by_the_next(
        self, node: Node, clock: ManualClock
    ) -> None:
        collection = make_collection(node)
        add_rows(node, collection, 0, 5)
        _fold(node, collection)
        clock.advance(100)

        class Crash(Exception):
            pass

        def crash() -> None:
            raise Crash

        with pytest.raises(Crash):
            garbage.collect(_world(node), crash)
        assert garbage.collect(_world(node), _no_step) == 1
        assert len(object_keys(node)) == 1
        assert _world(node).objects.count() == 1


class TestOrphans:
    """Objects that a crash left without a row (I6)."""

    def _orphan(self, node: Node, number: int = 0) -> str:
        key = f"parts/{node.ids.uuid7()}/packed"
        node.store.create(key, b"left behind %d" % number)
        return key

    def test_only_old_ones_are_swept(self, node: Node, clock: ManualClock) -> None:
        orphan = self._orphan(node)
        assert garbage.find_orphans(_world(node)) == ([], 1)
        clock.advance(61)
        fresh = self._orphan(node)
        assert garbage.find_orphans(_world(node)) == ([orphan], 2)
        assert garbage.sweep(_world(node), _no_step) == 1
        assert object_keys(node) == {fresh}

    def test_a_sweep_that_would_take_too_much_is_refused(
        self, node: Node, clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """More than a fifth of the store without a row: rather the catalog is the wrong one."""
        for number in range(101):
            self._orphan(node, number)
        clock.advance(61)
        with caplog.at_level(logging.ERROR):
            assert garbage.sweep(_world(node), _no_step) == 0
        assert "refused: 101 of 101" in caplog.text
        assert len(object_keys(node)) == 101

    def test_a_commit_that_names_a_swept_object_conflicts_for_days(
        self, node: Node, clock: ManualClock
    ) -> None:
        """The writer slept past the sweep: its part is gone, and so is its right to name it."""
        collection = make_collection(node)
        add_rows(node, collection, 0, 10)
        world = _world(node)
        written: list[str] = []
        introduce = world.before_commit
        assert introduce is not None

        def oversleep(_collection: str, manifest: Any) -> None:
            written.extend(item.key for item in manifest.objects)
            clock.advance(3_600)
            assert garbage.sweep(world, _no_step) == 1
            clock.advance(3 * 86_400)
            garbage.collect(world, _no_step)
            garbage.sweep(world, _no_step)

        object.__setattr__(world, "before_commit", oversleep)
        lease = world.jobs.acquire(collection, "compact", "elsewhere/1/sleeper", 1e9)
        assert lease is not None
        with pytest.raises(Swept, match="new key"):
            compact(world, lease, _no_step)
        assert not object_keys(node) & set(written)
        object.__setattr__(world, "before_commit", introduce)
        assert compact(world, lease, _no_step) == 1
        assert len(ids_of(node, collection)) == 10

    def test_the_memory_of_a_sweep_ends(self, node: Node, clock: ManualClock) -> None:
        self._orphan(node)
        clock.advance(61)
        garbage.sweep(_world(node), _no_step)
        assert _world(node).objects.count() == 1
        clock.advance(8 * 86_400)
        garbage.sweep(_world(node), _no_step)
        assert _world(node).objects.count() == 0

    def test_one_that_comes_back_after_power_loss_is_swept_again(
        self, node: Node, clock: ManualClock
    ) -> None:
        key = self._orphan(node)
        clock.advance(61)
        assert garbage.sweep(_world(node), _no_step) == 1
        node.store.create(key, b"unlinking it was not durable")
        clock.advance(61)
        assert garbage.sweep(_world(node), _no_step) == 1
        assert object_keys(node) == set()

    def test_an_object_that_is_committed_while_the_sweep_looks_stays(
        self, node: Node, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        collection = make_collection(node)
        add_rows(node, collection, 0, 10)
        world = _world(node)
        condemn = world.objects.condemn

        def commit_first(keys: Any, now_us: int) -> list[str]:
            go_on.set()
            committed.wait(10)
            return condemn(keys, now_us)

        go_on, committed = threading.Event(), threading.Event()
        monkeypatch.setattr(world.objects, "condemn", commit_first)
        sweeper = threading.Thread(target=garbage.sweep, args=(world, _no_step))

        def sweep_meanwhile(_collection: str, _manifest: Any) -> None:
            clock.advance(61)
            sweeper.start()
            assert go_on.wait(10)

        object.__setattr__(world, "before_commit", sweep_meanwhile)
        lease = world.jobs.acquire(collection, "compact", "elsewhere/1/writer", 1e9)
        assert lease is not None
        assert compact(world, lease, _no_step) == 1
        committed.set()
        sweeper.join(10)
        assert len(ids_of(node, collection)) == 10


def test_a_store_in_a_directory_ends_with_exactly_the_referenced_files(
    tmp_path: Path, clock: ManualClock
) -> None:
    with running_node(str(tmp_path), clock=clock, inline_bytes_max=0) as node:
        collection = make_collection(node)
        for number in range(6):
            add_rows(node, collection, 10 * number, 10)
            node.compactor.compact_now(collection)
        clock.advance(61)
        node.compactor.collect_now(sweep_orphans=True)
        clock.advance(61)
        node.compactor.collect_now(sweep_orphans=True)
        current = {
            item.key
            for part in node.versions.parts(collection, node.logs.snapshot(collection).version)
            for item in part.manifest.objects
        }
        assert object_keys(node) == current
        assert len(ids_of(node, collection)) == 60


def test_one_process_collects_and_sweeps(tmp_path: Path) -> None:
    """Others see that somebody has the lease, and leave the work to it."""
    with running_node(str(tmp_path)) as node:
        collection = make_collection(node)
        add_rows(node, collection, 0, 10)
        node.compactor.compact_now(collection)
        node.namespace.delete_collection("default_tenant", "default_database", "records")
        world = node.compactor._world
        object.__setattr__(world, "config", replace(world.config, grace_s=0.0))
        jobs, name = world.jobs, process_name(node.ids)  # Of a process that runs: this one.
        held = [jobs.acquire("", kind, name, 60) for kind in ("collect", "sweep")]
        before = object_keys(node)
        node.compactor._collect_due()
        node.compactor._sweep_due()
        assert object_keys(node) == before
        for lease in held:
            assert lease is not None
            jobs.end(lease)
        node.compactor._collect_due()
        assert object_keys(node) < before
        node.compactor._sweep_due()
        assert jobs.acquire("", "sweep", "elsewhere/1/1/x", 600) is None, "one in each period"
