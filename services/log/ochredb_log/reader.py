"""The log read back as it was written: for replay, for change feeds, for operators."""

from __future__ import annotations

from collections.abc import Iterator

from ochredb.cancel import Cancel
from ochredb.catalog.logs import LogTable
from ochredb.peers import LogFragment
from ochredb.replay import read_payloads
from ochredb.storage.base import ObjectStore
from ochredb.types import LogStatus


class LogReader:
    """`ochredb.peers.LogReader` in this process. Thread-safe."""

    def __init__(self, table: LogTable, store: ObjectStore) -> None:
        self._table, self._store = table, store

    def read(
        self, collection_id: str, first_offset: int, last_offset: int | None, *, cancel: Cancel
    ) -> Iterator[LogFragment]:
        """See `ochredb.peers.LogReader.read`. Cost: a statement for 128 fragments, and a range of
        an object for each that is large."""
        snapshot = self._table.snapshot(collection_id)
        last = snapshot.last_offset if last_offset is None else last_offset
        for first, stop, payload in read_payloads(
            self._table, self._store, collection_id, first_offset, last
        ):
            cancel.check()
            yield LogFragment(first, stop, payload)

    def status(self, collection_id: str, *, cancel: Cancel) -> LogStatus:
        """See `ochredb.peers.LogReader.status`. Cost: two single-row statements."""
        cancel.check()
        snapshot = self._table.snapshot(collection_id)
        _, tail_bytes = self._table.tail_size(collection_id)
        return LogStatus(
            floor_offset=snapshot.floor_offset,
            indexed_offset=snapshot.indexed_offset,
            last_offset=snapshot.last_offset,
            tail_bytes=tail_bytes,
        )
