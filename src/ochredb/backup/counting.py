"""How many records live in each collection of a copied catalog, by the shortest way.

A record lives if the last add, upsert or delete of its id was no delete: only ids are looked at,
and of parts only their sizes and, for ids of the tail, their id indexes.
"""

from __future__ import annotations

import numpy as np

from ochredb.catalog.appends import BacklogLimits
from ochredb.catalog.copies import CollectionState
from ochredb.catalog.logs import LogTable
from ochredb.catalog.sqlite import SqliteDatabase
from ochredb.catalog.versions import VersionTable
from ochredb.clock import Clock
from ochredb.configuration import IndexSettings
from ochredb.parts.reader import Part
from ochredb.replay import read_operations
from ochredb.storage.base import LocalStore
from ochredb.types import Op


class Counter:
    """Counts on a catalog and the objects it refers to; verifies what it reads."""

    def __init__(self, database: SqliteDatabase, store: LocalStore, clock: Clock) -> None:
        self._logs = LogTable(database, clock, BacklogLimits())
        self._versions = VersionTable(database, clock)
        self._store = store

    def count(self, collection: CollectionState) -> int:
        """Raises Corrupt, NotFound or Gone if something that it needs is damaged or missing.

        Cost: the tail is read once; memory for its ids.
        """
        parts = self._versions.parts(collection.id, collection.version)
        masks = [part.live_mask(self._store) for part in parts]
        count = sum(part.live_rows for part in parts)
        lives: dict[str, bool] = {}
        for _, operations in read_operations(
            self._logs,
            self._store,
            collection.id,
            collection.indexed_offset + 1,
            collection.last_offset,
            collection.dimension,
            lambda _poison: None,  # Skipped by who counts as by who reads.
        ):
            if operations.op in (Op.ADD, Op.UPSERT, Op.DELETE):
                lives.update(dict.fromkeys(operations.ids, operations.op is not Op.DELETE))
        names = list(lives)
        lived = np.zeros(len(names), np.bool_)
        if names:
            for part, mask in zip(parts, masks, strict=True):
                # Nothing of the part but its ids is opened: how vectors compare is of no matter.
                rows = Part(self._store, part.manifest, IndexSettings()).find_ids(names)
                found = rows >= 0
                lived |= found if mask is None else found & mask[rows]
        return count + sum(lives.values()) - int(lived.sum())
