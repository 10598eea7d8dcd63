"""The newest operations of this process's own writes, kept for the readers that fold them next.

Within a second or two after a write the query role and the compactor both read it back. From here
they get it without a look into the catalog and without decoding. Only a shortcut: what is not here
(another process wrote it, or it is older) is read from the log, which holds the same.
"""

from __future__ import annotations

import threading
from dataclasses import replace

from ochredb.types import Operations

_BYTES_MAX = 16 << 20


class RecentOperations:
    """Thread-safe; at most `bytes_max` bytes of requests, dropped by `age`, oldest first."""

    def __init__(self, bytes_max: int = _BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        # Of committed fragments, by (collection, first offset).
        self._young: dict[tuple[str, int], Operations] = {}
        self._old: dict[tuple[str, int], Operations] = {}
        self._young_bytes = 0

    def put(
        self, collection: str, first_offset: int, operations: Operations, size_bytes: int
    ) -> None:
        """Keep a committed request, which nobody may change any more: see `own_copy`."""
        if 2 * size_bytes > self._bytes_max:
            return
        with self._lock:
            if 2 * (self._young_bytes + size_bytes) > self._bytes_max:
                self._turn()
            self._young[collection, first_offset] = operations
            self._young_bytes += size_bytes

    def get(self, collection: str, first_offset: int) -> Operations | None:
        """The operations of the fragment that begins at this offset, if they are here."""
        key = (collection, first_offset)
        found = self._young.get(key)
        return self._old.get(key) if found is None else found

    def holds(self, collection: str, first_offset: int, last_offset: int) -> bool:
        """Whether all of these offsets are here, in whole fragments."""
        while first_offset <= last_offset:
            found = self.get(collection, first_offset)
            if found is None:
                return False
            first_offset += len(found)
        return True

    def age(self) -> None:
        """Drop what was here at the last call already. Called about once a second."""
        if self._young or self._old:
            with self._lock:
                self._turn()

    def _turn(self) -> None:
        self._old, self._young = self._young, {}
        self._young_bytes = 0


def own_copy(operations: Operations, encoded_bytes: int) -> Operations:
    """A copy that shares nothing changeable with its caller's. Cost: one copy of the vectors."""
    embeddings, embedded = operations.embeddings, operations.embedded
    return replace(
        operations,
        ids=list(operations.ids),
        embeddings=None if embeddings is None else embeddings.copy(),
        embedded=None if embedded is None else embedded.copy(),
        documents=None if operations.documents is None else list(operations.documents),
        uris=None if operations.uris is None else list(operations.uris),
        metadatas=None if operations.metadatas is None else list(operations.metadatas),
        encoded_bytes=encoded_bytes,
        encoded=None,  # Not kept twice.
    )
