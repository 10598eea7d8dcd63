"""Reading a log back: fragments of the catalog and the store, checked, without holes."""

from __future__ import annotations

from collections.abc import Iterator

from ochredb.catalog.logs import FragmentPlace, LogTable
from ochredb.checksum import signed, xxh3
from ochredb.errors import Corrupt, NotFound, OchreError
from ochredb.fragment import decode
from ochredb.storage.base import ObjectStore
from ochredb.types import Operations

_PAGE_FRAGMENTS = 128  # Fetched at once: bounds the inline payloads in memory to some 32 MiB.


class Gone(OchreError):
    """Part of the log is below its floor: the snapshot is too old, plan again on a new one."""


def read_operations(
    table: LogTable, store: ObjectStore, collection: str, first: int, last: int
) -> Iterator[tuple[int, Operations]]:
    """Yield (first offset, operations) of each fragment of [first, last].

    `first` must be the start and `last` the end of a fragment. Raises Gone if a fragment is not
    there any more, Corrupt if its bytes are damaged.
    """
    expected = first
    while expected <= last:
        recent = table.recent.get(collection, expected)
        if recent is not None:
            yield expected, recent
            expected += len(recent)
            continue
        places = table.fragments(collection, expected, last, _PAGE_FRAGMENTS)
        if not places:
            raise Gone(f"offset {expected} of collection {collection} is below the log's floor")
        for place in places:
            if place.start != expected:
                raise Gone(f"offset {expected} of collection {collection} is below the log's floor")
            operations = decode(_payload(store, collection, place))
            if len(operations) != place.stop - place.start + 1:
                raise Corrupt(
                    f"fragment {place.start} of collection {collection} has a wrong length"
                )
            yield place.start, operations
            expected = place.stop + 1
    if first <= last and expected != last + 1:
        raise Gone(f"offset {last} of collection {collection} is no end of a fragment")


def _payload(store: ObjectStore, collection: str, place: FragmentPlace) -> bytes:
    if place.payload is not None:
        data = place.payload
    else:
        assert place.object_key is not None
        assert place.byte_start is not None and place.byte_stop is not None
        try:
            data = store.get_range(place.object_key, place.byte_start, place.byte_stop)
        except NotFound as error:
            raise Gone(f"object {place.object_key} was collected") from error
        except ValueError as error:
            raise Corrupt(f"object {place.object_key} is shorter than its fragments") from error
    if signed(xxh3(data)) != place.checksum:
        raise Corrupt(
            f"fragment {place.start} of collection {collection} fails its checksum "
            f"({place.object_key or 'inline'})"
        )
    return data
