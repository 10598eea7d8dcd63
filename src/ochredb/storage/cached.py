"""A bounded cache on the local disk, in front of an object store that is far away.

Objects are mapped from whole local copies (`local_copies.py`). They never change, so no copy is
ever stale; what is wrong with a copy is thrown away and fetched again, never served:

* a copy that an earlier process left is compared with its checksum when it is first used;
* whoever finds a mapped copy damaged later (parts check their blocks) calls `refetch`, which puts
  another file under the same addresses, for everybody who reads there;
* what was fetched and is not what its maker stored is used, as parts know which of their blocks
  are whole, and not kept.

    store = CachedStore(S3Store(...), "/var/cache/ochredb", 100 << 30, clock, ids)
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from ochredb.checksum import xxh3
from ochredb.clock import Clock
from ochredb.errors import InvalidArgument, OchreError, StorageFull
from ochredb.ids import IdSource
from ochredb.storage import files
from ochredb.storage.base import (
    Downloads,
    ObjectStore,
    StoredObject,
    byte_views,
    check_key,
    delete_all,
)
from ochredb.storage.local_copies import LocalCopies, name_of
from ochredb.storage.partial import PartialObject
from ochredb.storage.space import is_full

if TYPE_CHECKING:
    from ochredb.cancel import Cancel
    from ochredb.storage.base import Data, Piece, Take

log = logging.getLogger("ochredb.storage")

_PARTLY_BYTES_MIN = 8 << 20  # Below it one request brings everything.
_PIECE_BYTES = 4 << 20  # Of what nobody waits for: one request at a time.
_UNUSED_S = 900.0  # Copies that nobody has used for so long make room for such as may be wanted.
_KEPT_PREFIXES = ("parts/",)  # Kept as they are created: who writes a part opens it next.


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCounters:
    """Since the start. damaged: copies that were thrown away. uncached: objects that found no place
    and are in memory, or in a file without a name, while somebody uses them."""

    hits: int
    misses: int
    fetched_bytes: int
    evictions: int
    damaged: int
    uncached: int


class CachedStore:
    """`LocalStore` over any `ObjectStore`. Thread-safe; for one process, and no fork of it.

    Copies, and what is being fetched to become one, are never more than `bytes_max`: those used
    least recently go, first such as nobody has mapped. A mapped one loses its name; its space comes
    back with the last view. A full disk is treated as a full cache; what still finds no place is
    served from memory.
    """

    def __init__(
        self, store: ObjectStore, directory: str, bytes_max: int, clock: Clock, ids: IdSource
    ) -> None:
        """directory: made if absent; one for each process.

        Raises InvalidArgument; Unavailable if another process uses it or it cannot be written.
        """
        if bytes_max <= 0:
            raise InvalidArgument(f"a cache has at least one byte, not {bytes_max}")
        self.store = store
        self._lock = threading.Lock()
        self._loads: dict[str, Future[memoryview]] = {}
        # What is mapped now, kept or not: the object that a view keeps its mapping by.
        self._shown: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._partial: weakref.WeakValueDictionary[str, PartialObject] = (
            weakref.WeakValueDictionary()
        )
        self._hits = self._misses = self._fetched_bytes = self._damaged = self._uncached = 0
        self._copies = LocalCopies(directory, bytes_max, clock, ids, self._shown.__contains__)

    @property
    def used_bytes(self) -> int:
        """Of the bound."""
        return self._copies.used_bytes

    @property
    def counters(self) -> CacheCounters:
        return CacheCounters(
            hits=self._hits,
            misses=self._misses,
            fetched_bytes=self._fetched_bytes,
            evictions=self._copies.evictions,
            damaged=self._damaged,
            uncached=self._uncached,
        )

    def close(self) -> None:
        """Let another process have the directory. Idempotent; views stay valid."""
        self._copies.close()

    # -- the store

    def create(self, key: str, data: Data) -> None:
        views = byte_views(data)
        self.store.create(key, views)
        if key.startswith(_KEPT_PREFIXES):
            self._keep_created(key, views)

    def get(self, key: str) -> bytes:
        """From the cache if it is there; it is not put there."""
        return bytes(self.map(key)) if self._has(key) else self.store.get(key)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """From the cache if it is there; it is not put there."""
        if not self._has(key):
            return self.store.get_range(key, start, stop)
        view = self.map(key)
        if not 0 <= start <= stop <= view.nbytes:
            raise ValueError(f"range [{start}, {stop}) is not within {key} of {view.nbytes} bytes")
        return bytes(view[start:stop])

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        return self.store.list(prefix, after=after)

    def delete(self, key: str) -> None:
        self.store.delete(key)
        self._forget(key)

    def delete_many(self, keys: Sequence[str]) -> dict[str, OchreError]:
        problems = delete_all(self.store, keys)
        for key in keys:
            self._forget(key)
        return problems

    def _forget(self, key: str) -> None:
        name = name_of(key)
        with self._lock:
            self._shown.pop(name, None)
            self._loads.pop(name, None)  # Whoever fetches it now does not keep it.
            self._partial.pop(name, None)
        self._copies.drop(name)

    def map(self, key: str) -> memoryview:
        """Fetched whole unless it is there; who asks for the same meanwhile waits for that."""
        check_key(key)
        name = name_of(key)
        with self._lock:
            shown = self._shown.get(name)
            load = self._loads.get(name)
            is_mine = shown is None and load is None
            if is_mine:
                load = self._loads[name] = Future()
                self._misses += name not in self._copies
            self._hits += not is_mine or name in self._copies
        if shown is not None:
            self._copies.use(name)
            return memoryview(shown).cast("B").toreadonly()
        assert load is not None
        if not is_mine:
            return load.result()
        try:
            found = self._opened(name)
            view = self._fetched(key, name, load) if found is None else found
        except BaseException as error:
            load.set_exception(error)
            raise
        else:
            load.set_result(view)
            return view
        finally:
            with self._lock:
                if self._loads.get(name) is load:
                    del self._loads[name]

    def map_partly(self, key: str, size: int) -> PartialObject | None:
        """Fetched block by block; None if it is here already, or small, or there is no place."""
        store = self.store
        if size < _PARTLY_BYTES_MIN or not isinstance(store, Downloads):
            return None
        check_key(key)
        name = name_of(key)
        with self._lock:
            found = self._partial.get(name)
            if found is not None or name in self._copies or name in self._shown:
                return found

        def download(ranges: list[tuple[int, int]], take: Take) -> None:
            store.download_ranges(key, size, ranges, take)
            with self._lock:
                self._fetched_bytes += sum(stop - start for start, stop in ranges)

        if not self._copies.reserve(size):
            return None
        try:
            made = PartialObject(self._copies, size, download, lambda: self._completed(name))
        except OSError as error:
            self._copies.release(size)
            log.warning("no place in the cache: %s", error.strerror)
            return None
        with self._lock:
            self._misses += 1
            return self._partial.setdefault(name, made)

    def _completed(self, name: str) -> None:
        """All of an object has been fetched: from now on it is a copy."""
        with self._lock:
            partial = self._partial.pop(name, None)
        if partial is None:
            return  # It was deleted.
        try:
            partial.keep(name)
        except OSError as error:
            log.warning("cannot keep a copy in the cache: %s", error.strerror)
            return
        with self._lock:
            self._shown.setdefault(name, partial.view.obj)

    def keep(self, key: str, size: int, cancel: Cancel) -> bool:
        """Only copies that nobody has used for a quarter of an hour make room for it."""
        cancel.check()
        check_key(key)
        name = name_of(key)
        if self._copies.use(name) is not None:  # From now on it is the one used last.
            return True
        partial = self._partial.get(name)
        if partial is None:
            if not self._copies.make_room(size, _UNUSED_S):
                return False
            partial = self.map_partly(key, size)
        if partial is None:
            self.map(key)
        else:
            for start in range(0, size, _PIECE_BYTES):
                cancel.check()
                partial.fetch([(start, min(start + _PIECE_BYTES, size))])
        return name in self._copies

    def scratch(self, pieces: Iterable[Piece]) -> memoryview:
        def make_room(error: OSError) -> bool:
            return is_full(error) and self._copies.evict_one(idle=True)

        try:
            return files.scratch(self._copies.new_path(), pieces, make_room)
        except OSError as error:
            raise self._copies.failed(error) from error

    def forget_pages(self, view: memoryview) -> None:
        files.forget_pages(view)

    def refetch(self, key: str, view: memoryview) -> bool:
        """Fetch the object again, and show it where `view` and all that was cut from it look."""
        name = name_of(key)
        log.warning("the cached copy of %s is damaged: it is fetched again", key)
        with self._lock:
            self._damaged += 1
        self._copies.drop(name)
        with self._fetching(key) as fetched:
            if not fetched.show_instead_of(view):
                return False
            self._keep(name, fetched)
        return True

    def path(self, key: str) -> str | None:
        """None: a copy may go at any moment."""
        check_key(key)
        return None

    # -- copies

    def _has(self, key: str) -> bool:
        check_key(key)
        name = name_of(key)
        return name in self._copies or name in self._shown

    def _opened(self, name: str) -> memoryview | None:
        """A copy, mapped and verified; None if there is none that is whole."""
        copy = self._copies.use(name)
        if copy is None:
            return None
        try:
            with files.opened(copy.path) as descriptor:
                view = files.map_read_only(descriptor)
        except OSError as error:
            log.warning("cannot read a copy in the cache: %s", error)
        else:
            is_whole = view.nbytes == copy.size
            if is_whole and not copy.verified:
                is_whole = copy.verified = xxh3(view) == copy.checksum
                files.forget_pages(view)  # All were touched.
            if is_whole:
                with self._lock:
                    if view.nbytes:
                        self._shown[name] = view.obj
                return view
        with self._lock:
            self._damaged += 1
        self._copies.drop(name, copy)
        return None

    def _fetched(self, key: str, name: str, load: Future[memoryview]) -> memoryview:
        with self._fetching(key) as fetched:
            view = fetched.view
            with self._lock:
                is_wanted = self._loads.get(name) is load
                if is_wanted and view.nbytes:
                    self._shown[name] = view.obj
            if is_wanted and fetched.is_right:
                self._keep(name, fetched)
            return view

    @contextlib.contextmanager
    def _fetching(self, key: str) -> Iterator[_Fetched]:
        """The object; its file goes at the end unless it was kept, its view stays."""
        fetched = self._fetch(key)
        try:
            yield fetched
        finally:
            fetched.give_up()

    def _fetch(self, key: str) -> _Fetched:
        """The object, which is the caller's to give up."""
        in_memory, was_wrong = False, False
        while True:
            fetched = _Fetched(self._copies, in_memory)
            try:
                fetched.fetch(key, self.store)
            except BaseException as error:
                fetched.give_up()
                if in_memory or not isinstance(error, StorageFull):
                    raise
                in_memory = True
                continue
            with self._lock:
                self._fetched_bytes += fetched.size
            if fetched.is_right:
                return fetched
            if was_wrong:
                log.error("%s is not what was stored, by its checksum", key)
                return fetched
            was_wrong = True  # Perhaps the network's fault.
            fetched.give_up()

    def _keep(self, name: str, fetched: _Fetched) -> None:
        try:
            if fetched.keep(name):
                return
        except OSError as error:
            log.warning("cannot keep a copy in the cache: %s", error.strerror)
        with self._lock:
            self._uncached += 1

    def _keep_created(self, key: str, views: Sequence[memoryview]) -> None:
        if sum(view.nbytes for view in views) > self._copies.bytes_max:
            return
        written = _Fetched(self._copies, in_memory=False)
        try:
            written.write(views)
            self._keep(name_of(key), written)
        except OchreError as error:
            log.info("%s is not kept in the cache: %s", key, error)
        finally:
            written.give_up()


class _Fetched:
    """One object in a temporary file, or in memory if it found no place there.

    reserved: `size` bytes of the cache's bound are its own. is_right: as far as can be told, it is
    what was stored.
    """

    def __init__(self, copies: LocalCopies, in_memory: bool) -> None:
        self._copies, self._in_memory = copies, in_memory
        self.size = self.checksum = 0
        self.is_right = False
        self.view = memoryview(b"")
        self._path: str | None = None
        self._descriptor = -1
        self._reserved = False

    def fetch(self, key: str, store: ObjectStore) -> None:
        """Raises StorageFull if the disk is full although there was room; then all is undone."""
        expected: int | None = None
        if isinstance(store, Downloads):
            expected = store.download(key, self._begin)
        else:
            content = store.get(key)
            take = self._begin(len(content))
            take(0, memoryview(content))
        if self._path is not None:
            try:
                self.view = files.map_read_only(self._descriptor)
            except OSError as error:
                raise self._copies.failed(error) from error
        self.checksum = xxh3(self.view)
        self.is_right = expected is None or expected == self.checksum

    def write(self, views: Sequence[memoryview]) -> None:
        """Be what these buffers hold, if there is place for a file."""
        take = self._begin(sum(view.nbytes for view in views), or_memory=False)
        place, checksum = 0, xxhash.xxh3_64()
        for view in views:
            take(place, view)
            place += view.nbytes
            checksum.update(view)
        self.checksum, self.is_right = checksum.intdigest(), True

    def show_instead_of(self, view: memoryview) -> bool:
        """See `files.show_instead`. Only what is right."""
        return (
            self.is_right and self._path is not None and files.show_instead(view, self._descriptor)
        )

    def keep(self, name: str) -> bool:
        """Let the file be the copy, if it has its place in the bound. Raises OSError."""
        if self._path is None or not self._reserved:
            return False
        self._copies.keep(name, self._path, self.size, self.checksum)
        self._path, self._reserved = None, False
        return True

    def give_up(self) -> None:
        """Remove the file unless it was kept, and give back its place. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._path is not None:
            self._copies.remove(self._path)
            self._path = None
        if self._reserved:
            self._copies.release(self.size)
            self._reserved = False

    def _begin(self, size: int, *, or_memory: bool = True) -> Take:
        """See `Downloads`."""
        self.size = size
        if not self._in_memory:
            try:
                self._open(size)
                return self._take_to_file
            except OSError as error:
                self.give_up()
                if not or_memory:
                    raise self._copies.failed(error) from error
                place = self._copies.directory
                log.warning("no place in the cache %s: %s", place, error.strerror)
        if not size:
            return lambda _place, _piece: None
        memory = mmap.mmap(-1, size)
        self.view = memoryview(memory).toreadonly()

        def take(place: int, piece: memoryview) -> None:
            memory[place : place + piece.nbytes] = piece

        return take

    def _open(self, size: int) -> None:
        """A file that has its blocks."""
        self._reserved = self._copies.reserve(size)
        path = self._copies.new_path()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor, self._path = os.open(path, flags, 0o644), path
        while size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._descriptor, 0, size)
                return
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                    return  # This file system does not do that.
                if not (is_full(error) and self._copies.evict_one(idle=True)):
                    raise

    def _take_to_file(self, place: int, piece: memoryview) -> None:
        try:
            files.write_at(self._descriptor, piece, place)
        except OSError as error:
            raise self._copies.failed(error) from error
