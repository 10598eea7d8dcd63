"""The object that says which store the others belong to: it can be made again from the catalog."""

from __future__ import annotations

import contextlib

from ochredb.backup.source import open_store
from ochredb.catalog import facts
from ochredb.errors import NotFound
from ochredb.integrity.evidence import Evidence
from ochredb.storage.directory import DirectoryStore

KEY = "store_id"
_PRESENT_SHARE_MIN = 0.8


def mend_store_id(path: str, evidence: Evidence) -> str | None:
    """Put the store id back if it is damaged and the objects are the catalog's; what was done.

    They are if most of what the catalog refers to is there. Else the catalog was paired with
    another store's objects, and the two must stay apart: nothing is done.
    """
    with contextlib.closing(open_store(path, as_it_is=True)) as opened:
        store = opened.store
        assert isinstance(store, DirectoryStore)
        with contextlib.suppress(NotFound):
            if store.get(KEY) == opened.store_id.encode():
                return None
        with opened.database.read_consistent() as session:
            sizes = facts.held_objects(session)
        there = {item.key: item.size for item in store.list("")}
        present = sum(there.get(key) == size for key, size in sizes)
        if present < _PRESENT_SHARE_MIN * len(sizes):
            return None
        evidence.keep_object(KEY)
        store.put_back(KEY, opened.store_id.encode())
        return f"{present} of {len(sizes)} objects are those of the catalog"
