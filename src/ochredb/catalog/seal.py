"""The seal of a catalog: checksums of the bytes of its file (docs/formats/seal.md).

SQLite notices damaged pages, not damaged values. The database file changes only when the
write-ahead log is copied into it, and whoever of ours does that keeps the checksums of its pages:
before a checkpoint the seal says, durably, that one of this log has begun; afterwards, what the
frames were that were copied. Who opens a catalog that nobody has open compares; so does a check.

Others may copy too: SQLite when a process ends without closing, an older OchreDB, a tool. A seal
speaks of a file only as long as it can tell that they have not: the file has the time that was set
after our checkpoint, or the log has not begun anew since, and then it still holds whatever they
copied. Else it says nothing, and the next checkpoint begins a new one. So it never accuses what
is whole.

Who has the catalog open holds a shared lock on a file of its own, which tells the first and the
last one. Closing any descriptor of the database drops SQLite's locks of the whole process: so the
one that is kept here is closed when nobody in the process holds the catalog any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ochredb.catalog import wal
from ochredb.catalog.seal_check import Compared, compare, has_log, page_checksums
from ochredb.catalog.seal_format import (
    BEGUN,
    CLOSED,
    SETTLED,
    UNKNOWN,
    Checksums,
    Sealed,
    State,
    decode,
    encode,
    encode_record,
)
from ochredb.checksum import BLOCK_BYTES, xxh3
from ochredb.crash_points import reach
from ochredb.errors import Corrupt
from ochredb.storage import files

log = logging.getLogger("ochredb.catalog")

SEAL_FILE = "ochredb.seal"
LOCK_FILE = "open.lock"
CHECKPOINT_LOCK_FILE = "checkpoint.lock"
NO_MARK = bytes(64)
"""In the file that writers lock: no write is remembered (`catalog.mark`)."""
_APPENDED_BYTES_MAX = 32 << 10  # And a quarter of the table: then the seal is written anew.
_NO_PAGES, _NO_CHECKSUMS = np.zeros(0, np.int64), np.zeros(0, np.uint64)


def put_mark(descriptor: int, mark: bytes) -> None:
    """Into the file that writers lock; not synced. A negative descriptor: there is none."""
    if descriptor >= 0:
        with contextlib.suppress(OSError):  # A full disk: an older mark says less, and is true.
            os.pwrite(descriptor, mark, 0)


def forget_mark(descriptor: int) -> None:
    """Remember no write, durably: what is dropped next must not be missed after a power failure."""
    put_mark(descriptor, NO_MARK)
    if descriptor >= 0:
        files.sync(descriptor)
        reach("mark.forgotten")


class _Descriptors:
    """Of database files, closed when nobody in this process holds the catalog any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # Guards the next two.
        self._holders: Counter[str] = Counter()
        self._open: dict[str, list[int]] = {}

    def hold(self, path: str) -> None:
        with self._lock:
            self._holders[path] += 1

    def let_go(self, path: str, descriptor: int) -> None:
        """descriptor: of the database, or negative."""
        with self._lock:
            self._holders[path] -= 1
            if descriptor >= 0:
                self._open.setdefault(path, []).append(descriptor)
            if self._holders[path] <= 0:
                for spent in self._open.pop(path, []):
                    os.close(spent)

    def after_fork(self) -> None:
        self._lock = threading.Lock()


_DESCRIPTORS = _Descriptors()
os.register_at_fork(after_in_child=_DESCRIPTORS.after_fork)


class Seal:
    """Of one catalog, as one user of it sees it. Thread-safe but for holding and letting go."""

    def __init__(self, catalog_path: str) -> None:
        self.catalog = os.path.realpath(catalog_path)
        folder = os.path.dirname(self.catalog)
        self.path = os.path.join(folder, SEAL_FILE)
        self._lock_path = os.path.join(folder, LOCK_FILE)
        self._turn_path = os.path.join(folder, CHECKPOINT_LOCK_FILE)
        self._turn = threading.Lock()  # As the lock of `_turn_path`, between threads.
        self._lock_fd = self._turn_fd = self._catalog_fd = -1
        self._is_broken = False
        self._compared_ns = -1  # The file's time when it was compared, by the first one.
        self.is_first = False
        """Whether nobody else had the catalog open when this user began to hold it."""

    def hold(self) -> None:
        """Say that the catalog is open, before it is. Raises Corrupt if it is not as it was sealed.

        Cost: the first time 10 µs; nobody else has it open: the catalog is read, 0.2 ms per MB.
        """
        if self._lock_fd >= 0:
            return
        try:
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:  # A read-only file system: nobody seals or breaks anything there.
            self._verify()
            return
        try:
            if not _try_exclusive(descriptor):
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # Somebody opens it, or seals it.
            self.is_first = _try_exclusive(descriptor)
            if self.is_first:
                self._verify()
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            os.close(descriptor)
            raise
        _DESCRIPTORS.hold(self.catalog)
        self._lock_fd, self._is_broken = descriptor, False

    @contextlib.contextmanager
    def kept_shut(self) -> Iterator[Compared | None]:
        """The catalog compared with its seal; until the end nobody can open it, who tries waits.

        None if somebody has it open, if it may only be read, or if the seal says nothing of it.
        Raises Corrupt for a catalog that is missing.
        """
        try:
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            yield None
            return
        try:
            yield compare(self.path, self.catalog) if _try_exclusive(descriptor) else None
        finally:
            os.close(descriptor)

    def _verify(self) -> None:
        """Of a catalog that nobody has open."""
        compared = compare(self.path, self.catalog)
        if compared is None:
            return
        self._compared_ns = os.stat(self.catalog).st_mtime_ns
        if compared.problem is not None:
            raise Corrupt(
                f"{compared.problem}; `ochredb repair` may mend it, or restore a backup;"
                f" without {SEAL_FILE} it is opened as it is"
            )

    def break_before_write(self) -> None:
        """Before the first write: that the catalog is closed is not true any more."""
        if self._is_broken:
            return
        with self._alone():
            sealed, size = self._load()
            state = None if sealed is None else sealed.state
            if sealed is not None and state is not None and state.kind == CLOSED:
                found = os.stat(self.catalog)
                known = found.st_mtime_ns in (state.mtime_ns, self._compared_ns)
                settled = State(SETTLED, 0, 0, found.st_size, found.st_mtime_ns)
                if not (known and _is_of_pages(sealed) and self._appended(size, settled)):
                    self._remove()
                reach("seal.opened")
            elif sealed is None and size:
                self._remove()
        self._is_broken = True

    @contextlib.contextmanager
    def copying(self) -> Iterator[Copying]:
        """Around a checkpoint; see `Copying`. Raises OSError if none can be made now."""
        with self._alone(), wal.opened(self.catalog) as found:
            if found is None:
                if has_log(self.catalog):  # Damaged while it is used.
                    self._remove()
                yield Copying(self, None, None, 0, is_idle=not has_log(self.catalog))
                return
            sealed, size = self._load()
            first = None if sealed is None else self._first_frame(found, sealed)
            if sealed is None or first is None:
                yield self._begun_anew(found)
                return
            if not found.has_commit(first):
                yield Copying(self, found, sealed, first, is_idle=True)
                return
            begun = replace(sealed.state, kind=BEGUN, salt=found.salt, frames=first)
            if not self._appended(size, begun):
                self._remove()
                sealed = None
            reach("seal.begun")
            yield Copying(self, found, sealed, first)

    def problem(self) -> str | None:
        """What is wrong with the file of a catalog that is held, if the seal can tell; else None.

        Cost: the file is read, 0.2 ms per MB; checkpoints wait.
        """
        if self._lock_fd < 0:
            return None
        with self._alone():
            try:
                compared = compare(self.path, self.catalog, self._descriptor())
            except FileNotFoundError:
                return None
        return None if compared is None else compared.problem

    def let_go(self, *, seal: bool = True) -> None:
        """Say that this user's connections are closed; if it is the last one, seal the catalog."""
        if self._lock_fd < 0:
            return
        try:
            if seal and _try_exclusive(self._lock_fd):
                self._close()
        except OSError as error:  # Unsealed, it is only less well guarded.
            log.warning("the catalog was closed without a seal: %s", error)
        finally:
            self._drop()

    def forget(self) -> None:
        """In a forked child: the locks are the parent's, which still holds them."""
        self._turn = threading.Lock()
        if self._lock_fd >= 0:
            self._drop()
        self._is_broken = False

    def _drop(self) -> None:
        os.close(self._lock_fd)
        if self._turn_fd >= 0:
            os.close(self._turn_fd)
        _DESCRIPTORS.let_go(self.catalog, self._catalog_fd)
        self._lock_fd = self._turn_fd = self._catalog_fd = -1

    def _close(self) -> None:
        """Nobody has the catalog open."""
        if has_log(self.catalog):
            return  # Not all of it is in the file: somebody was killed.
        sealed, size = self._load()
        state = None if sealed is None else sealed.state
        if state is not None and state.kind == CLOSED:
            return  # Nobody wrote.
        time_ns = os.stat(self.catalog).st_mtime_ns
        if state is not None and state.kind == SETTLED and state.mtime_ns == time_ns:
            closed = replace(state, kind=CLOSED, salt=0, frames=0)
            if self._appended(size, closed):
                reach("seal.closed")
                return
        with files.opened(self.catalog) as descriptor:
            page_bytes = int.from_bytes(files.read_range(descriptor, 16, 18), "big")
            page_bytes = 65536 if page_bytes == 1 else page_bytes
            if page_bytes < 512:
                return  # It is no database.
            self._seal_anew(descriptor, page_bytes, State(CLOSED, 0, 0, 0, 0))

    def _first_frame(self, found: wal.Log, sealed: Sealed) -> int | None:
        """The first frame whose page may not be as the seal says; None if it says nothing."""
        state = sealed.state
        if state.kind == CLOSED or sealed.block_bytes != found.page_bytes:
            return None
        if state.salt == found.salt:
            return state.frames
        same_time = state.mtime_ns == os.stat(self.catalog).st_mtime_ns
        return 0 if state.kind == SETTLED and same_time else None

    def _begun_anew(self, found: wal.Log) -> Copying:
        """A seal of the file as it is, of which a checkpoint begins."""
        sealed = None
        try:
            state = State(BEGUN, found.salt, 0, 0, 0)
            sealed = self._seal_anew(self._descriptor(), found.page_bytes, state)
        except OSError as error:
            log.warning("a checkpoint without a seal: %s", error)
        if sealed is None:
            self._remove()
        reach("seal.begun")
        return Copying(self, found, sealed, 0)

    def _seal_anew(self, descriptor: int, page_bytes: int, state: State) -> Sealed | None:
        """None if somebody writes the file meanwhile."""
        before, time_ns = _stamp(self.catalog)
        checksums = page_checksums(descriptor, page_bytes)
        after = os.stat(self.catalog)
        if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
            return None
        state = replace(state, size_bytes=after.st_size, mtime_ns=time_ns)
        sealed = Sealed(page_bytes, checksums, state)
        self._write_anew(sealed)
        return sealed

    def _write_anew(self, sealed: Sealed) -> None:
        """Durably, instead of what there is."""
        content = encode(sealed.block_bytes, sealed.checksums, sealed.state)
        temporary = self.path + ".new"
        with files.opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            files.write_all(descriptor, [memoryview(content)])
            files.sync(descriptor)
        reach("seal.synced")
        os.replace(temporary, self.path)
        reach("seal.renamed")
        files.sync_folder(os.path.dirname(self.path))
        reach("seal.written")

    def add(
        self, sealed: Sealed, state: State, pages: NDArray[np.int64], checksums: Checksums
    ) -> None:
        """Append a record to what is sealed; not synced. A seal with many of them is written
        anew, which is."""
        size = os.path.getsize(self.path)
        self._append(size, encode_record(state, pages, checksums))
        if size > sealed.checksums.nbytes * 5 // 4 + _APPENDED_BYTES_MAX:
            whole, _ = self._load()
            if whole is not None:
                self._write_anew(whole)

    def _append(self, size: int, record: bytes) -> None:
        """Behind the `size` bytes that the seal has."""
        with files.opened(self.path, os.O_WRONLY) as descriptor:
            files.write_at(descriptor, memoryview(record), size)

    def _appended(self, size: int, state: State) -> bool:
        """Whether it now says so, durably. Its caller has the crash point."""
        record = encode_record(state, _NO_PAGES, _NO_CHECKSUMS)
        try:
            self._append(size, record)
            with files.opened(self.path, os.O_WRONLY) as descriptor:
                files.sync(descriptor)
        except OSError as error:  # A full disk, most likely.
            log.warning("the catalog goes on without a seal: %s", error)
            return False
        return True

    def _remove(self) -> None:
        """Durably. Raises OSError if it stays."""
        if files.unlink_if_exists(self.path):
            reach("seal.removed")
            files.sync_folder(os.path.dirname(self.path))
            reach("seal.broken")

    def _load(self) -> tuple[Sealed | None, int]:
        """What the seal says, None for nothing; and its bytes, 0 if there is none."""
        try:
            with open(self.path, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            return None, 0
        return decode(content), len(content)

    def _descriptor(self) -> int:
        if self._catalog_fd < 0:
            self._catalog_fd = os.open(self.catalog, os.O_RDONLY | os.O_CLOEXEC)
        return self._catalog_fd

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else looks at the seal, or copies pages that it speaks of."""
        with self._turn:
            if self._turn_fd < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                self._turn_fd = os.open(self._turn_path, flags, 0o644)
            fcntl.flock(self._turn_fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._turn_fd, fcntl.LOCK_UN)


class Copying:
    """A checkpoint. Between its begin and `settle` the log must not begin anew: a reader sees to
    that. is_idle: there is nothing to copy, and nothing must be. first: frames that were copied,
    and settled, before."""

    def __init__(
        self,
        seal: Seal,
        found: wal.Log | None,
        sealed: Sealed | None,
        first: int,
        *,
        is_idle: bool = False,
    ) -> None:
        self.is_idle, self.first = is_idle, first
        self._seal, self._log, self._sealed = seal, found, sealed

    def settle(self, logged: int, copied: int) -> None:
        """Say what the pages are now. logged: frames of the log that the checkpoint has seen.
        copied: how many of them are in the database's file.

        Not synced: without it, the seal says less.
        """
        if self._log is None or self._sealed is None or copied < self.first:
            return
        try:
            headers = self._log.headers(self.first, logged)
            if len(headers.page) < logged - self.first:
                return
            pages, checksums = self._copied(headers, copied)
            if not self._log.is_same():
                return
            found, time_ns = _stamp(self._seal.catalog)
            # With frames left to copy somebody else may just have copied them. And the log does not
            # begin anew before they are, so the time is not needed.
            time_ns = time_ns if copied == logged else 0
            state = State(SETTLED, self._log.salt, copied, found.st_size, time_ns)
            self._seal.add(self._sealed, state, pages, checksums)
            reach("seal.settled")
        except OSError as error:
            log.warning("the seal does not know what was copied: %s", error)

    def _copied(self, headers: wal.Headers, copied: int) -> tuple[NDArray[np.int64], Checksums]:
        """The pages, from 0, that are other ones since the last time, and their checksums."""
        assert self._log is not None
        assert self._sealed is not None
        latest = {page: frame for frame, page in enumerate(headers.page.tolist(), self.first)}
        # Of a page that is in the log again SQLite copies nothing. Who was killed may have.
        later = headers.page[: copied - self.first].tolist()
        changed = {page - 1: UNKNOWN for page in later if latest[page] >= copied}
        sizes = headers.commit[headers.commit > 0]
        if len(sizes):  # Cut off and there again: nobody knows what is in pages without a frame.
            gone = range(int(sizes.min()), len(self._sealed.checksums))
            changed |= dict.fromkeys(gone, UNKNOWN)
            end = int(sizes[-1])
            latest = {page: at for page, at in latest.items() if at < copied and page <= end}
        frames = np.sort(np.fromiter(latest.values(), np.int64, len(latest)))
        for numbers, some, are_whole in self._log.checked(frames, self.first, headers):
            pages_of = headers.page[numbers - self.first].tolist()
            for number, page, frame, is_whole in zip(
                numbers.tolist(), pages_of, some, are_whole.tolist(), strict=True
            ):
                checksum = xxh3(frame["words"].tobytes())
                if not is_whole:
                    log.error("frame %d of the catalog's write-ahead log is damaged", number)
                    checksum ^= (1 << 64) - 1  # What page it was is not known; it is not this one.
                changed[page - 1] = checksum
        pages = np.fromiter(changed.keys(), np.int64, len(changed))
        return pages, np.fromiter(changed.values(), np.uint64, len(changed))


def _stamp(path: str) -> tuple[os.stat_result, int]:
    """Give a file a time that any later write changes, however soon: the kernel's clock for it
    stands still for some milliseconds. Returns what the file is then, and that time; 0 if it
    cannot be set."""
    found = os.stat(path)
    time_ns = found.st_mtime_ns + 1
    with contextlib.suppress(PermissionError):  # It is another user's.
        os.utime(path, ns=(found.st_atime_ns, time_ns))
    found = os.stat(path)
    return found, time_ns if found.st_mtime_ns == time_ns else 0


def _is_of_pages(sealed: Sealed) -> bool:
    return sealed.block_bytes != BLOCK_BYTES


def _try_exclusive(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
