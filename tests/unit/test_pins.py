"""Pins: what they keep, what they show, and how they end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ochredb.catalog.database import Session
from ochredb.catalog.pins import PINS_MAX, PinTable
from ochredb.catalog.sqlite import SqliteDatabase
from ochredb.errors import Exhausted, NotFound
from ochredb_node.node import Node

from .kernel import ManualClock, add_rows, make_collection, object_keys, running_node, sql


@pytest.fixture
def node(clock: ManualClock, tmp_path: Path) -> Iterator[Node]:
    with running_node(str(tmp_path / "store"), clock=clock, inline_bytes_max=0) as node:
        yield node


def _pins(node: Node) -> PinTable:
    return PinTable(node.database, node.clock)


def _keys(session: Session, condition: str) -> set[str]:
    return {
        key for (key,) in session.all(sql(f"SELECT key FROM object_references WHERE {condition}"))
    }


def _offset(session: Session) -> int:
    (row,) = session.all(sql("SELECT max(next_offset) FROM logs"))
    return int(row[0])


def test_what_a_pin_keeps_outlives_the_grace_period_and_goes_with_the_pin(
    node: Node, clock: ManualClock
) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 20)
    held = object_keys(node)
    with _pins(node).take("p", "me", 1_000.0):
        pass
    node.namespace.delete_collection("default_tenant", "default_database", "records")
    clock.advance(500)
    node.compactor.collect_now(sweep_orphans=True)
    assert object_keys(node) == held
    _pins(node).release("p")
    node.compactor.collect_now(sweep_orphans=False)
    assert object_keys(node) == held, "the grace period counts from the last reference"
    clock.advance(61)
    node.compactor.collect_now(sweep_orphans=False)
    assert object_keys(node) == set()


def test_a_pin_that_is_not_renewed_expires(node: Node, clock: ManualClock) -> None:
    pins = _pins(node)
    for name in ("dead", "renewed"):
        with pins.take(name, "me", 60.0):
            pass
    clock.advance(40)
    pins.renew("renewed", 60.0)
    pins.release_expired()
    pins.check("dead")
    clock.advance(40)
    pins.release_expired()
    pins.check("renewed")
    with pytest.raises(NotFound, match="dead"):
        pins.check("dead")
    with pytest.raises(NotFound, match="dead"):
        pins.renew("dead", 60.0)


def test_housekeeping_ends_expired_pins(node: Node, clock: ManualClock) -> None:
    add_rows(node, make_collection(node), 0, 3)
    with _pins(node).take("p", "me", 60.0):
        pass
    clock.advance(61)
    node._housekeep()
    with node.database.read() as session:
        assert _keys(session, "kind = 'pin'") == set()


def test_releasing_twice_is_no_error_and_pins_do_not_touch_each_other(node: Node) -> None:
    add_rows(node, make_collection(node), 0, 3)
    pins = _pins(node)
    for name in ("a", "b"):
        with pins.take(name, "me", 60.0):
            pass
    pins.release("a")
    pins.release("a")
    (key,) = object_keys(node)
    pins.check_holds("b", key)
    with pytest.raises(NotFound, match="has no object"):
        pins.check_holds("a", key)
    with pytest.raises(NotFound, match="has no object"):
        pins.check_holds("b", "store_id")


def test_pins_are_not_without_number(node: Node) -> None:
    for number in range(PINS_MAX):
        with _pins(node).take(str(number), "me", 60.0):
            pass
    with pytest.raises(Exhausted, match="retry later"), _pins(node).take("more", "me", 60.0):
        pass


def test_a_failed_take_leaves_nothing(node: Node) -> None:
    with _pins(node).take("same", "me", 60.0):
        pass
    for _ in range(20):  # More than there may be connections to a server.
        with pytest.raises(Exception, match=r"(?i)unique"), _pins(node).take("same", "me", 60.0):
            pass
    if isinstance(node.database, SqliteDatabase):
        assert node.database._reading == 0
    add_rows(node, make_collection(node), 0, 1)


def test_a_write_right_after_the_pin_is_neither_shown_nor_kept(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = make_collection(node)
    add_rows(node, collection, 0, 3)
    before = object_keys(node)
    write = node.database.write_beside

    @contextlib.contextmanager
    def write_and_more(name: str, views: contextlib.ExitStack) -> Iterator[tuple[Session, Session]]:
        with write(name, views) as sessions:
            yield sessions
        add_rows(node, collection, 3, 3)

    monkeypatch.setattr(node.database, "write_beside", write_and_more)
    with _pins(node).take("p", "me", 60.0) as state:
        assert object_keys(node) > before
        assert _keys(state, "kind != 'pin'") == before
        assert _offset(state) == 4
        with node.database.read() as session:
            assert _keys(session, "kind = 'pin'") == before


def test_the_state_shown_is_the_state_kept(node: Node) -> None:
    """While other threads append, compact and collect: never an object more or less."""
    collections = [make_collection(node, f"name-{number}") for number in range(2)]
    stop = threading.Event()

    def write(collection: str) -> None:
        number = 0
        while not stop.is_set():
            add_rows(node, collection, number, 3)
            number += 3
            if number % 12 == 0:
                node.compactor.fold_now(collection)

    threads = [threading.Thread(target=write, args=(name,)) for name in collections]
    for thread in threads:
        thread.start()
    try:
        offsets = []
        for number in range(40):
            with _pins(node).take(str(number), "me", 60.0) as state:
                shown = _keys(state, "kind != 'pin'")
                offsets.append(_offset(state))
                with node.database.read() as session:
                    assert _keys(session, f"kind = 'pin' AND collection = '{number}'") == shown
                assert _offset(state) == offsets[-1]
            assert shown <= object_keys(node)
            _pins(node).release(str(number))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert offsets[0] < offsets[-1], "the writers wrote meanwhile"


def test_pins_of_dead_backups_do_not_count(node: Node) -> None:
    """A store without a server has nobody else who releases them."""
    pins = _pins(node)
    for number in range(PINS_MAX):
        with pins.take(f"dead-{number}", "me", 0.0):
            pass
    with pins.take("alive", "me", 60.0):
        pins.check("alive")
    with pytest.raises(NotFound):
        pins.check("dead-0")
