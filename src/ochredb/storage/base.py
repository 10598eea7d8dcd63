"""The object store's interface: whole objects, created once, never changed.

There is no overwrite and no append: what changes lives in the catalog, inside a transaction. So an
object that was read once may be cached for ever, and two writers can never disagree about one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from ochredb.errors import InvalidArgument, OchreError

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from ochredb.cancel import Cancel

    Piece = Buffer | NDArray[Any]  # Type checkers know arrays as buffers from Python 3.12 only.

    # One buffer, or several that are written one after the other (so that nobody has to join them).
    Data = Piece | Sequence[Piece]

    # Takes a piece that begins at a place of the object.
    Take = Callable[[int, memoryview], None]
    # Told the object's size, gives what takes its pieces.
    Begin = Callable[[int], Take]

KEY_BYTES_MAX = 1024
KEY_PART_BYTES_MAX = 200
RESERVED_PART = "tmp"  # As the first part of a key: where stores keep what is not complete.

_KEY = re.compile(
    rf"(?!{RESERVED_PART}(?:/|\Z))"
    rf"(?!\.\.?(?:/|\Z))[A-Za-z0-9._-]{{1,{KEY_PART_BYTES_MAX}}}"
    rf"(?:/(?!\.\.?(?:/|\Z))[A-Za-z0-9._-]{{1,{KEY_PART_BYTES_MAX}}})*\Z"
)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One row of a listing. size: bytes; modified_us: microseconds since the epoch."""

    key: str
    size: int
    modified_us: int


class ObjectStore(Protocol):
    """Flat keys to immutable bytes. An object is created once and never changed.

    Keys are relative paths of `[A-Za-z0-9._-]` parts between single slashes, not `.` or `..`, not
    below `tmp/`; a bad key raises InvalidArgument. No key may also be a folder of another key (what
    then happens differs between stores). All methods may be called from any thread and process.
    """

    def create(self, key: str, data: Data) -> None:
        """Write the whole object, durably, if and only if `key` does not exist.

        data: C-contiguous buffers of any item type, written as bytes, one after the other.

        Raises AlreadyExists, with nothing written; the object that exists is durable. After
        Unavailable the outcome is unknown: the caller reads back (`data` names its writer) or takes
        a new key; it never assumes.
        """
        ...

    def get(self, key: str) -> bytes:
        """The whole object. Raises NotFound."""
        ...

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Raises NotFound; ValueError outside 0 <= start <= stop <= size."""
        ...

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        """Objects whose key starts with `prefix` and is greater than `after`, in byte order.

        Any string is a prefix, `""` is all. Objects created or deleted meanwhile may or may not
        be listed; all others are. Cost: proportional to the folders and objects looked at.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove the object; removing an absent one is not an error.

        Not durable: after power loss a deleted object may be back.
        """
        ...


@runtime_checkable
class Downloads(Protocol):
    """A store that gives a large object piece by piece, faster than `get` and without the heap."""

    def download(self, key: str, begin: Begin) -> int | None:
        """The whole object; returns the xxh3 that its maker gave it, if that is known.

        begin: called once, before the first piece. What it gives is called from several threads at
        once, in any order, for a place more than once if a transfer breaks off; both raise nothing
        but OchreError, which ends the download. The piece's memory is used again afterwards.

        Raises NotFound, Unavailable. The checksum is the caller's to compare.
        """
        ...

    def download_ranges(
        self, key: str, size: int, ranges: Sequence[tuple[int, int]], take: Take
    ) -> None:
        """Bytes [start, stop) of each range, some at a time, into `take`, as above.

        Raises NotFound, Unavailable, and Corrupt if the object has not this size.
        """
        ...


class Partly(Protocol):
    """A mapped object of which only what is read is fetched. Thread-safe."""

    @property
    def view(self) -> memoryview:
        """Of the whole object; only what was fetched may be used of it."""
        ...

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have bytes [start, stop) of each range there. Raises NotFound, Unavailable, Corrupt."""
        ...


@runtime_checkable
class MapsPartly(Protocol):
    """A store whose objects are far away."""

    def map_partly(self, key: str, size: int) -> Partly | None:
        """An object of this size; None: `map` it, which brings all of it."""
        ...


@runtime_checkable
class KeepsCopies(Protocol):
    """A store whose objects are far away, with a bounded place near by for copies."""

    def keep(self, key: str, size: int, cancel: Cancel) -> bool:
        """Have a copy of an object near, as reads of it may come; whether there is one.

        It takes no room from what is read here. size: bytes; 0: not known, and small. May take
        long. Raises InvalidArgument, NotFound, Unavailable, Cancelled.
        """
        ...


@runtime_checkable
class DeletesMany(Protocol):
    """A store that deletes many objects at once, much faster than one by one."""

    def delete_many(self, keys: Sequence[str]) -> dict[str, OchreError]:
        """As `delete` of each; returns the keys that may still be there, and why."""
        ...


class Mappable(Protocol):
    """A store whose objects can be used in place, without copying them into the heap."""

    def map(self, key: str) -> memoryview:
        """The whole object as a read-only view of bytes; raises NotFound.

        The view stays valid after `delete`. It costs address space and page cache only, and no file
        descriptor; it is released with its last reference.
        """
        ...

    def scratch(self, pieces: Iterable[Piece]) -> memoryview:
        """What is too large for the heap: the pieces, one after the other, as a read-only view.

        It has no name and no other reader, is not durable, and is gone with its last reference or
        with the process. Each piece is taken when the one before is written. Raises Unavailable.
        """
        ...

    def forget_pages(self, view: memoryview) -> None:
        """Let go of a mapped object's resident pages; they stay in the page cache.

        view: whole, as `map` or `scratch` gave it. Its content is unchanged; reading it faults the
        pages in again.
        """
        ...

    def refetch(self, key: str, view: memoryview) -> bool:
        """Of a mapped object whose bytes proved damaged: have it show the stored ones.

        view: whole, as `map` gave it. False if it shows the stored object itself, or nothing
        better can be had now.
        """
        ...

    def path(self, key: str) -> str | None:
        """The local file that holds the object (if it exists), or None if the store has no files.

        To read, or to hand to a library that loads by path; never to write.
        """
        ...


class LocalStore(ObjectStore, Mappable, Protocol):
    """Both: what the embedded engine and the single server run on."""


def is_key(key: str) -> bool:
    """Whether every store accepts `key`."""
    return len(key) <= KEY_BYTES_MAX and _KEY.match(key) is not None


def check_key(key: str) -> None:
    """Raises InvalidArgument unless `is_key`."""
    if not is_key(key):
        raise InvalidArgument(f"not an object key: {key!r}", key=key)


def delete_all(store: ObjectStore, keys: Sequence[str]) -> dict[str, OchreError]:
    """As `DeletesMany`, of any store."""
    if isinstance(store, DeletesMany):
        return store.delete_many(keys)
    problems: dict[str, OchreError] = {}
    for key in keys:
        try:
            store.delete(key)
        except OchreError as error:
            problems[key] = error
    return problems


def byte_views(data: Data) -> list[memoryview]:
    """The buffers of `data` as one-dimensional views of bytes, without the empty ones; no copy.

    Raises TypeError for what is no buffer, or not C-contiguous.
    """
    pieces = data if isinstance(data, list | tuple) else (data,)
    views = [memoryview(cast("Buffer", piece)) for piece in pieces]
    return [view.cast("B") for view in views if view.nbytes]
