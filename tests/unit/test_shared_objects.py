"""An object with the requests of several collections, whose commits are not one."""

from __future__ import annotations

from typing import Any

from ochredb import fragment
from ochredb.cancel import Cancel
from ochredb.catalog.appends import AppendRequest, Busy
from ochredb.catalog.logs import LogTable
from ochredb.errors import OchreError
from ochredb.ids import IdSource
from ochredb.types import Appended, Op
from ochredb_log.flush import Flusher
from ochredb_log.line import Waiting
from ochredb_node.node import Node

from .kernel import ManualClock, ids_of, make_collection, object_keys, operations, sql


class _BusyOnce:
    """A log table of which somebody else holds one collection's lock the first time."""

    def __init__(self, table: LogTable, busy: str) -> None:
        self._table, self._busy = table, busy

    def append(
        self, requests: list[AppendRequest], *, skip_locked: bool = False
    ) -> list[Appended | OchreError]:
        busy, self._busy = self._busy, ""
        free = [request for request in requests if request.collection != busy]
        done = iter(self._table.append(free, skip_locked=skip_locked))
        return [
            Busy("locked elsewhere") if request.collection == busy else next(done)
            for request in requests
        ]


def test_what_waited_until_its_object_was_collected_is_written_again(
    node: Node, clock: ManualClock
) -> None:
    """The other collection's part of the object was folded meanwhile; found by the simulator."""
    folded, late = make_collection(node, "folded"), make_collection(node, "late")
    table: Any = _BusyOnce(node.logs, late)
    log: Any = node.log
    flusher = Flusher(table, node.store, IdSource(), log._reserve, waits_for_locks=False)
    batch = []
    for collection in (folded, late):
        rows = operations(Op.ADD, ["a"], [[1.0, 2.0]])
        payload = fragment.encode(rows)
        request = log._request(collection, rows, payload, None, None, None, None)
        batch.append(Waiting(request, rows, payload, Cancel(), is_large=True))
    first, busy = flusher.flush(batch)
    assert isinstance(first, Appended) and isinstance(busy, Busy)
    (shared,) = object_keys(node)
    node.compactor.compact_now(folded)
    clock.advance(61)
    node.compactor.collect_now(sweep_orphans=False)
    assert shared not in object_keys(node)
    (second,) = flusher.flush(batch[1:])
    assert isinstance(second, Appended)
    assert ids_of(node, late) == ["a"]
    clock.advance(61)
    node.compactor.collect_now(sweep_orphans=True)
    assert ids_of(node, late) == ["a"]
    with node.database.read() as session:
        assert session.one(sql("SELECT count(*) FROM objects")) == (len(object_keys(node)),)
