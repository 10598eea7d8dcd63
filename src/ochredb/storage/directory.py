"""An object store in a directory of a local file system.

A key is a path below the root. An object appears whole or not at all, by

    write tmp/<id> -> fsync -> link to the final name (fails if it exists) -> fsync of its folder

where hard links are refused, `renameat2(RENAME_NOREPLACE)` takes the link's place. An object is
never opened for writing under its final name, never truncated and never replaced, so it may be
memory-mapped; unlinking a mapped file is safe. A failed fsync is never repeated on the same file
(the kernel may have dropped the pages and report success): the create fails, the caller takes a new
key.

The root belongs to the store alone: `list` lists every file below it, except `tmp/`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ochredb.clock import Clock
from ochredb.crash_points import reach
from ochredb.errors import AlreadyExists, Forbidden, NotFound, OutOfMemory, Unavailable
from ochredb.ids import IdSource
from ochredb.storage import files
from ochredb.storage.base import RESERVED_PART, StoredObject, byte_views, check_key, is_key
from ochredb.storage.space import is_full, storage_full

if TYPE_CHECKING:
    from ochredb.storage.base import Data, Piece

_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_PUBLISH_ATTEMPTS_MAX = 100
_DURABLE_FOLDERS_MAX = 10_000


class DirectoryStore:
    """Objects as files below `root`, which is created by the first `create`.

    Holds no descriptor, lock or thread: it may be used on both sides of a fork. A create costs one
    fsync of the file and one of its folder, for 300 KB about 0.6 ms on an SSD; the global
    interpreter lock is released meanwhile.
    """

    def __init__(
        self,
        root: str,
        *,
        clock: Clock | None = None,
        ids: IdSource | None = None,
        on_full: Callable[[], None] = lambda: None,
    ) -> None:
        """on_full: called when the disk is found full, before StorageFull is raised."""
        self._on_full = on_full
        self.root = os.path.abspath(root)
        self._ids = ids or IdSource(clock)
        self._temporary = os.path.join(self.root, RESERVED_PART)
        # Folders known to be durable: their own names, up to the root's, have been synced. A folder
        # below the first level is removed with its last object, and leaves this set *before* that.
        # Such a folder has one writer (its name is a uuid7), so no other process makes it again.
        self._durable_folders: set[str] = set()
        self._root_is_durable = False

    def create(self, key: str, data: Data) -> None:
        final = self._path(key)
        views = byte_views(data)
        try:
            temporary = self._write_temporary(views)
            try:
                exists = not self._publish(temporary, final)
            finally:
                files.unlink_if_exists(temporary)
            reach("object.temporary-removed")
            if exists:
                # Whoever created it may not have synced its name yet, and may never: "exists" must
                # mean "durable", because callers take it for the success of an earlier attempt.
                self._sync_name(final)
            else:
                try:
                    self._sync_name(final)
                except OSError:
                    # Not acknowledged, perhaps not durable: it must not stay to be taken for one.
                    files.unlink_if_exists(final)
                    raise
        except OSError as error:
            raise self._failed("write", final, error) from error
        if exists:
            raise AlreadyExists(f"object {key} exists", key=key)

    def get(self, key: str) -> bytes:
        path = self._path(key)
        try:
            with files.opened(path) as descriptor:
                return files.read_range(descriptor, 0, files.size_of(descriptor))
        except _ABSENT as error:
            raise NotFound(f"no object {key}", key=key) from error
        except OSError as error:
            raise self._failed("read", path, error) from error

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        path = self._path(key)
        try:
            with files.opened(path) as descriptor:
                size = files.size_of(descriptor)
                if not 0 <= start <= stop <= size:
                    raise ValueError(f"range [{start}, {stop}) is not within {key} of {size} bytes")
                return files.read_range(descriptor, start, stop)
        except _ABSENT as error:
            raise NotFound(f"no object {key}", key=key) from error
        except OSError as error:
            raise self._failed("read", path, error) from error

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        folder_key = prefix[: prefix.rfind("/") + 1]
        if folder_key and not is_key(folder_key + "x"):
            return  # No key starts like this; such a prefix must not lead outside the root.
        try:
            yield from self._list_folder(folder_key, prefix, after)
        except OSError as error:
            raise self._failed("list", self.root, error) from error

    def delete(self, key: str) -> None:
        path = self._path(key)
        folders = self._removable_folders(path)
        self._durable_folders.difference_update(folders)
        reach("object.deleting")
        try:
            with contextlib.suppress(FileNotFoundError):  # Who removed it may not have got further.
                os.unlink(path)
            reach("object.deleted")
            for folder in folders:
                os.rmdir(folder)
                reach("object.folder-removed")
        except _ABSENT:
            return
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise self._failed("delete", path, error) from error

    def put_back(self, key: str, data: Data) -> None:
        """Give an object that was damaged, cut or lost the bytes that it was created with.

        The new file takes the old one's name; who has the old one mapped keeps that.
        """
        final = self._path(key)
        try:
            temporary = self._write_temporary(byte_views(data))
            try:
                os.makedirs(os.path.dirname(final), exist_ok=True)
                os.replace(temporary, final)
            except BaseException:
                files.unlink_if_exists(temporary)
                raise
            reach("object.replaced")
            self._sync_name(final)
        except OSError as error:
            raise self._failed("write", final, error) from error

    def map(self, key: str) -> memoryview:
        path = self._path(key)
        try:
            with files.opened(path) as descriptor:
                return files.map_read_only(descriptor)
        except _ABSENT as error:
            raise NotFound(f"no object {key}", key=key) from error
        except OSError as error:
            raise self._failed("map", path, error) from error

    def scratch(self, pieces: Iterable[Piece]) -> memoryview:
        path = f"{self._temporary}/{self._ids.uuid7()}"
        try:
            os.makedirs(self._temporary, exist_ok=True)
            return files.scratch(path, pieces, lambda _error: False)
        except OSError as error:
            raise self._failed("write", path, error) from error

    def forget_pages(self, view: memoryview) -> None:
        files.forget_pages(view)

    def refetch(self, key: str, view: memoryview) -> bool:
        del key, view
        return False  # It is the file itself.

    def path(self, key: str) -> str | None:
        return self._path(key)

    def temporary_count(self) -> int:
        """How many files are not complete, whoever writes them or left them behind."""
        try:
            return len(os.listdir(self._temporary))
        except FileNotFoundError:
            return 0

    def clean_temporary(self, older_than_us: int, keep: frozenset[str] = frozenset()) -> int:
        """Remove what dead writers left behind; returns how many files.

        older_than_us: a wall time, in microseconds since the epoch; who has not written since
            counts as dead. One that is not dead after all gets Unavailable from its `create`.
        keep: names of files that stay whatever their age.
        """
        removed = 0
        try:
            with os.scandir(self._temporary) as entries:
                for entry in entries:
                    modified_us = entry.stat(follow_symlinks=False).st_mtime_ns // 1000
                    if modified_us < older_than_us and entry.name not in keep:
                        reach("temporary.removing")
                        removed += files.unlink_if_exists(entry.path)
                        reach("temporary.removed")
        except FileNotFoundError:
            return removed
        except OSError as error:
            raise self._failed("clean", self._temporary, error) from error
        return removed

    def remove_empty_folders(self) -> int:
        """Remove folders that dead writers and dead collectors left; returns how many.

        Only such as `delete` removes. Whoever is about to fill one makes it again. Cost: a system
        call for each folder, 2 microseconds.
        """
        removed = 0
        try:
            with os.scandir(self.root) as entries:
                tops = [
                    e.path for e in entries if e.is_dir(follow_symlinks=False)
                    and e.name != RESERVED_PART
                ]  # fmt: skip
            for top in tops:
                with os.scandir(top) as entries:
                    folders = [e.path for e in entries if e.is_dir(follow_symlinks=False)]
                for folder in folders:
                    self._durable_folders.discard(folder)
                    try:
                        os.rmdir(folder)
                    except OSError as error:
                        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}:
                            raise
                    else:
                        removed += 1
                        reach("object.folder-removed")
        except FileNotFoundError:
            return removed
        except OSError as error:
            raise self._failed("clean", self.root, error) from error
        return removed

    def _path(self, key: str) -> str:
        check_key(key)
        return f"{self.root}/{key}"

    def _write_temporary(self, views: Sequence[memoryview]) -> str:
        """Write and sync a new file outside the listed tree; nothing is left if that fails."""
        path = f"{self._temporary}/{self._ids.uuid7()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o644)
        except FileNotFoundError:
            os.makedirs(self._temporary, exist_ok=True)
            descriptor = os.open(path, flags, 0o644)
        reach("object.opened")
        try:
            try:
                files.write_all(descriptor, views)
                reach("object.written")
                files.sync(descriptor)
                reach("object.synced")
            finally:
                os.close(descriptor)
        except BaseException:
            files.unlink_if_exists(path)
            raise
        return path

    def _publish(self, temporary: str, final: str) -> bool:
        """Give the file its final name; False if another file has it."""
        for _ in range(_PUBLISH_ATTEMPTS_MAX):
            try:
                files.publish(temporary, final)
            except FileExistsError:
                return False
            except FileNotFoundError:
                if not os.path.exists(temporary):
                    raise  # It was taken for a dead writer's.
                # The first object of its folder, or the folder's last one was just deleted.
                os.makedirs(os.path.dirname(final), exist_ok=True)
            else:
                reach("object.linked")
                return True
        raise FileNotFoundError(errno.ENOENT, "its folder is removed again and again")

    def _sync_name(self, final: str) -> None:
        """Make the object's name durable and, once per process, its folders' names.

        "The folder existed" does not mean that its maker has synced its name, so this does not ask
        who made it. A folder cannot go away while a new object, not yet acknowledged, is in it.
        """
        folder = os.path.dirname(final)
        files.sync_folder(folder)
        reach("object.name-synced")
        if folder in self._durable_folders:
            return
        parent = folder
        while parent != self.root:
            parent = os.path.dirname(parent)
            files.sync_folder(parent)
        if not self._root_is_durable:
            files.sync_parents(self.root)
            self._root_is_durable = True
        if len(self._durable_folders) >= _DURABLE_FOLDERS_MAX:
            self._durable_folders.clear()
        self._durable_folders.add(folder)
        reach("object.folders-synced")

    def _removable_folders(self, path: str) -> Sequence[str]:
        """The folders between the object and the first level, innermost first."""
        folders: Sequence[str] = ()
        folder = os.path.dirname(path)
        while os.path.dirname(folder).startswith(self.root + "/"):
            folders = (*folders, folder)
            folder = os.path.dirname(folder)
        return folders

    def _list_folder(self, folder_key: str, prefix: str, after: str) -> Iterator[StoredObject]:
        """Files below a folder, in byte order of their keys. folder_key: "" or ends in a slash."""
        try:
            with os.scandir(self.root + "/" + folder_key) as entries:
                # A folder sorts as its keys do, with the slash: `a-b` < `a/b` < `a0`.
                names = sorted(
                    (e.name + "/", True) if e.is_dir(follow_symlinks=False) else (e.name, False)
                    for e in entries
                )
        except (FileNotFoundError, NotADirectoryError):
            return
        for name, is_folder in names:
            key = folder_key + name
            if is_folder:
                wanted = key.startswith(prefix) or prefix.startswith(key)
                if not wanted or (after > key and not after.startswith(key)):
                    continue
                if key != RESERVED_PART + "/":
                    yield from self._list_folder(key, prefix, after)
            elif key.startswith(prefix) and key > after:
                try:
                    status = os.stat(self.root + "/" + key, follow_symlinks=False)
                except FileNotFoundError:  # Deleted meanwhile.
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield StoredObject(key, status.st_size, status.st_mtime_ns // 1000)

    def _failed(self, verb: str, path: str, error: OSError) -> Unavailable:
        """The error to raise for one of the operating system's."""
        if is_full(error):
            full = storage_full(verb, path, os.path.dirname(self.root), error)
            self._on_full()
            return full
        kind = OutOfMemory if error.errno == errno.ENOMEM else Unavailable
        cause = error.strerror or str(error)
        return kind(f"cannot {verb} {path}: {cause}", path=path, errno=error.errno)


class ReadOnlyDirectoryStore(DirectoryStore):
    """Of a directory that may only be read."""

    def create(self, key: str, data: Data) -> None:
        del data
        raise Forbidden(f"{self.root} is open for reading only: cannot write {key}", key=key)
