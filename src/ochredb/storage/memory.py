"""An object store in this process's memory: for EphemeralClient, and the model for the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from ochredb.clock import Clock, SystemClock
from ochredb.errors import AlreadyExists, NotFound
from ochredb.storage.base import StoredObject, byte_views, check_key

if TYPE_CHECKING:
    from ochredb.storage.base import Data, Piece


class _Entry(NamedTuple):
    content: bytes
    modified_us: int


class MemoryStore:
    """Objects as bytes in a dict; durable as long as the process.

    No lock: each method is one atomic operation of the dict (also in free-threaded Python), so
    there is nothing that a fork could leave locked.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._entries: dict[str, _Entry] = {}

    def create(self, key: str, data: Data) -> None:
        check_key(key)
        content = data if type(data) is bytes else b"".join(byte_views(data))
        entry = _Entry(content, self._clock.now_us())
        if self._entries.setdefault(key, entry) is not entry:
            raise AlreadyExists(f"object {key} exists", key=key)

    def get(self, key: str) -> bytes:
        check_key(key)
        entry = self._entries.get(key)
        if entry is None:
            raise NotFound(f"no object {key}", key=key)
        return entry.content

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        content = self.get(key)
        if not 0 <= start <= stop <= len(content):
            raise ValueError(f"range [{start}, {stop}) is not within {key} of {len(content)} bytes")
        return content[start:stop]

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        for key in sorted(self._entries.copy()):
            if key.startswith(prefix) and key > after:
                entry = self._entries.get(key)
                if entry is not None:  # None: deleted since the copy.
                    yield StoredObject(key, len(entry.content), entry.modified_us)

    def delete(self, key: str) -> None:
        check_key(key)
        self._entries.pop(key, None)

    def map(self, key: str) -> memoryview:
        return memoryview(self.get(key))

    def scratch(self, pieces: Iterable[Piece]) -> memoryview:
        content = bytearray()
        for piece in pieces:
            for view in byte_views(piece):
                content += view
        return memoryview(content).toreadonly()

    def forget_pages(self, view: memoryview) -> None:
        """Nothing is mapped: the view is the object itself."""

    def refetch(self, key: str, view: memoryview) -> bool:
        del key, view
        return False  # It is the object itself.

    def path(self, key: str) -> str | None:
        check_key(key)
        return None
