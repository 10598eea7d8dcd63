"""Reading a log back: fragments of the catalog and the store, checked, without holes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from ochredb.catalog.fragment_rows import FragmentPlace
from ochredb.catalog.logs import LogTable
from ochredb.checksum import signed, xxh3
from ochredb.errors import Corrupt, Gone, NotFound
from ochredb.hints.hot import HotFragments
from ochredb.poison import Admitted, Poison, admitted
from ochredb.storage.base import ObjectStore
from ochredb.types import Operations

_PAGE_FRAGMENTS = 128  # Fetched at once: bounds the inline payloads in memory to some 32 MiB.


def read_operations(
    table: LogTable,
    store: ObjectStore,
    collection: str,
    first: int,
    last: int,
    dimension: int | None,
    found: Callable[[Poison], None],
) -> Iterator[tuple[int, Operations]]:
    """Yield (first offset, operations) of consecutive runs that cover [first, last].

    `first` must be the start and `last` the end of a fragment. dimension: the collection's, as of
    a snapshot that has `last`. found: told of what is skipped (`ochredb.poison`). Raises Gone if a
    fragment is not there any more, Corrupt if its bytes are damaged.
    """
    fragments = read_fragments(table, store, collection, first, last, dimension, found)
    return chain.from_iterable(fragments)


def read_fragments(
    table: LogTable,
    store: ObjectStore,
    collection: str,
    first: int,
    last: int,
    dimension: int | None,
    found: Callable[[Poison], None],
) -> Iterator[Admitted]:
    """The same, the runs of one fragment together: nearly always one."""
    expected = first
    while expected <= last:
        recent = table.recent.get(collection, expected)
        if recent is not None:
            yield [(expected, recent)]
            expected += len(recent)
            continue
        for place in _page(table, collection, expected, last):
            data = _payload(table.hot, store, collection, place)
            yield admitted(place.start, place.stop, data, dimension, found)
            expected = place.stop + 1
    _check_end(collection, first, last, expected)


def read_payloads(
    table: LogTable, store: ObjectStore, collection: str, first: int, last: int
) -> Iterator[tuple[int, int, bytes]]:
    """(first offset, last offset, bytes as they were written) of the fragments in [first, last].

    As `read_operations`, but nothing is decoded: only checksums are verified.
    """
    expected = first
    while expected <= last:
        for place in _page(table, collection, expected, last):
            yield place.start, place.stop, _payload(table.hot, store, collection, place)
            expected = place.stop + 1
    _check_end(collection, first, last, expected)


def _page(table: LogTable, collection: str, expected: int, last: int) -> Iterator[FragmentPlace]:
    """The next fragments up to `last`; the first begins at `expected`. Raises Gone for a hole."""
    places = table.fragments(collection, expected, last, _PAGE_FRAGMENTS)
    if not places:
        raise _below_floor(collection, expected)
    for place in places:
        if place.start != expected:
            raise _below_floor(collection, expected)
        yield place
        expected = place.stop + 1


def _below_floor(collection: str, offset: int) -> Gone:
    return Gone(f"offset {offset} of collection {collection} is below the log's floor")


def _check_end(collection: str, first: int, last: int, expected: int) -> None:
    """Raises Gone unless the fragments of [first, last] ended before `expected`."""
    if first <= last and expected != last + 1:
        raise Gone(f"offset {last} of collection {collection} is no end of a fragment")


def _payload(hot: HotFragments, store: ObjectStore, collection: str, place: FragmentPlace) -> bytes:
    if place.payload is not None:
        data = place.payload
    else:
        assert place.object_key is not None
        assert place.byte_start is not None and place.byte_stop is not None
        found = hot.get(place.object_key, place.byte_start, place.byte_count)
        if found is not None and signed(xxh3(found)) == place.checksum:
            return found
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
