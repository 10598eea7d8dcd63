"""Bytes of fragments that were just written, for the readers of other processes.

A large request lies in the object store, a few milliseconds away; for a minute its bytes are in
Redis too. Whoever takes them from there compares them with the checksum in the catalog, so wrong
ones cost a second look and nothing else. `ochredb.recent` is the same within one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ochredb.hints.link import RedisLink

Bytes = bytes | memoryview

_BYTES_MAX = 1_250_000  # Of one fragment; more takes longer than is worth it.


class HotFragments(Protocol):
    """Never waits long, never raises."""

    def put(self, object_key: str, byte_start: int, data: Bytes) -> None:
        """Keep a fragment's bytes for a while, perhaps."""
        ...

    def get(self, object_key: str, byte_start: int, size: int) -> bytes | None:
        """So many bytes, which may be wrong ones; None: ask the object store."""
        ...


class NoHotFragments:
    """The object store alone."""

    def put(self, object_key: str, byte_start: int, data: Bytes) -> None:
        """Forgotten at once."""

    def get(self, object_key: str, byte_start: int, size: int) -> bytes | None:  # noqa: ARG002
        return None


class RedisHotFragments:
    """In Redis, whose memory is bounded by `ttl_s` and by its own `maxmemory`."""

    def __init__(self, link: RedisLink, ttl_s: float = 60.0) -> None:
        self._link, self._ttl_ms = link, int(ttl_s * 1000)

    def put(self, object_key: str, byte_start: int, data: Bytes) -> None:
        size = len(data)
        if size <= _BYTES_MAX:
            key, ttl_ms = self._key(object_key, byte_start), self._ttl_ms
            self._link.later(key, size, lambda pipeline: pipeline.set(key, data, px=ttl_ms))

    def get(self, object_key: str, byte_start: int, size: int) -> bytes | None:
        if size > _BYTES_MAX:
            return None
        key = self._key(object_key, byte_start)
        data = self._link.ask(lambda client: client.get(key))
        return data if isinstance(data, bytes) and len(data) == size else None

    def _key(self, object_key: str, byte_start: int) -> str:
        return f"{self._link.prefix}fragment:{object_key}:{byte_start}"
