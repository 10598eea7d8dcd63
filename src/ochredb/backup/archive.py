"""A backup's directory and its manifest (docs/formats/backup.md).

BACKUP/manifest.json      written last: without it the backup is incomplete
BACKUP/catalog.sqlite3    the catalog at one moment, pruned
BACKUP/objects/<key>      every object that this catalog refers to
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
import xxhash

from ochredb.checksum import xxh3
from ochredb.crash_points import reach
from ochredb.errors import Corrupt, InvalidArgument, Unavailable
from ochredb.storage import files
from ochredb.storage.base import is_key

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
CATALOG_FILE = "catalog.sqlite3"
OBJECTS_FOLDER = "objects"
CHUNK_BYTES = 4 << 20  # Read, checked and written at once; a multiple of a checksum's block.
_SYNC_BYTES = 64 << 20  # Written between two syncs, so that none of them takes long.


class Progress(Protocol):
    """Told how far the copying is; may be called thousands of times."""

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None: ...


def silent(what: str, done_bytes: int, total_bytes: int) -> None:
    """Nobody watches."""


class Damage(Corrupt):
    """Objects or files fail their checksums or are missing; `damaged` names them."""

    def __init__(self, what: str, damaged: Sequence[tuple[str, str]]) -> None:
        shown = "; ".join(f"{name}: {reason}" for name, reason in damaged[:5])
        more = f"; and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        super().__init__(f"{what}: {shown}{more}", damaged=list(damaged))
        self.damaged = tuple(damaged)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a backup. size: bytes; checksum: xxh3-64 of all of it, unsigned."""

    name: str
    size: int
    checksum: int


@dataclass(frozen=True, slots=True)
class BackedUpCollection:
    """A collection as it is in the backup.

    records: how many live; None if damage kept them from being counted. last_offset: the newest
    operation of its log that is in the backup.
    """

    id: str
    tenant: str
    database: str
    name: str
    records: int | None
    version: int
    indexed_offset: int
    last_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupManifest:
    """What a complete backup consists of. damaged: (object, what is wrong with it) at the source.

    created_us: the source's time, in microseconds since the epoch, when the state was fixed.
    """

    backup_id: str
    store_id: str
    created_us: int
    catalog: StoredFile
    objects: tuple[StoredFile, ...]
    collections: tuple[BackedUpCollection, ...]
    damaged: tuple[tuple[str, str], ...] = ()

    @property
    def records(self) -> int:
        """Of all collections that could be counted."""
        return sum(item.records or 0 for item in self.collections)

    @property
    def size_bytes(self) -> int:
        return self.catalog.size + sum(item.size for item in self.objects)

    def to_json(self) -> bytes:
        document: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "backup_id": self.backup_id,
            "store_id": self.store_id,
            "created_us": self.created_us,
            "catalog": _file_row(self.catalog),
            "objects": [_file_row(item) for item in self.objects],
            "collections": [
                {name: getattr(item, name) for name in BackedUpCollection.__slots__}
                for item in self.collections
            ],
            "damaged": [list(item) for item in self.damaged],
        }
        document["checksum"] = f"{_checksum(document):016x}"
        return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def from_json(cls, text: bytes) -> BackupManifest:
        """Raises Corrupt; InvalidArgument for a backup of a newer OchreDB."""
        try:
            document = orjson.loads(text)
            if document["format_version"] > FORMAT_VERSION:
                raise InvalidArgument(
                    f"the backup has format version {document['format_version']}; this OchreDB"
                    f" reads up to {FORMAT_VERSION}: install a newer OchreDB"
                )
            if int(document.pop("checksum"), 16) != _checksum(document):
                raise Corrupt(f"{MANIFEST_FILE} fails its checksum")
            manifest = cls(
                backup_id=document["backup_id"],
                store_id=document["store_id"],
                created_us=document["created_us"],
                catalog=_file_of(document["catalog"]),
                objects=tuple(_file_of(row) for row in document["objects"]),
                collections=tuple(BackedUpCollection(**row) for row in document["collections"]),
                damaged=tuple((name, reason) for name, reason in document["damaged"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"{MANIFEST_FILE} is no manifest of a backup: {error}") from error
        if not all(is_key(item.name) for item in manifest.objects):
            raise Corrupt(f"{MANIFEST_FILE} names what is no object")
        return manifest


def _file_row(item: StoredFile) -> list[str | int]:
    return [item.name, item.size, f"{item.checksum:016x}"]


def _file_of(row: Any) -> StoredFile:
    name, size, checksum = row
    return StoredFile(str(name), int(size), int(checksum, 16))


def _checksum(document: dict[str, Any]) -> int:
    return xxh3(orjson.dumps(document, option=orjson.OPT_SORT_KEYS))


def object_path(root: str, key: str) -> str:
    """Where a backup keeps an object."""
    return os.path.join(root, OBJECTS_FOLDER, *key.split("/"))


def read_manifest(root: str) -> BackupManifest:
    """A complete backup's manifest.

    Raises InvalidArgument for a directory that is no complete backup, Corrupt for damage.
    """
    try:
        with open(os.path.join(root, MANIFEST_FILE), "rb") as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        if os.path.exists(os.path.join(root, CATALOG_FILE)):
            raise InvalidArgument(
                f"{root} is an incomplete backup: it ended before {MANIFEST_FILE} was written;"
                " delete it and take another"
            ) from None
        raise InvalidArgument(f"{root} is no backup: it has no {MANIFEST_FILE}") from None
    except OSError as error:
        raise Unavailable(f"cannot read {root}: {error.strerror}") from error
    return BackupManifest.from_json(text)


def claim_folder(path: str, what: str) -> str:
    """Create an empty directory, or take one that is empty; returns its absolute path."""
    if not path or "\0" in path:
        raise InvalidArgument(f"not a path: {path!r}")
    path = os.path.realpath(path)
    try:
        os.makedirs(path, exist_ok=True)
        names = os.listdir(path)
    except (FileExistsError, NotADirectoryError) as error:
        raise InvalidArgument(f"{path} is not a directory") from error
    except OSError as error:
        raise Unavailable(f"cannot use {path}: {error.strerror}") from error
    if names:
        raise InvalidArgument(f"{path} is not empty: {what} needs a new or an empty directory")
    return path


def write_synced(path: str, pieces: Iterator[bytes] | Sequence[bytes]) -> tuple[int, int]:
    """Write a new file, synced (not its name); returns its size and checksum."""
    hashed = xxhash.xxh3_64()
    size = unsynced = 0
    try:
        with files.opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            for piece in pieces:
                if piece:
                    files.write_all(descriptor, [memoryview(piece)])
                hashed.update(piece)
                size += len(piece)
                unsynced += len(piece)
                if unsynced >= _SYNC_BYTES:
                    files.sync(descriptor)
                    unsynced = 0
            reach("file.written")
            files.sync(descriptor)
        reach("file.synced")
    except OSError as error:
        raise Unavailable(f"cannot write {path}: {error.strerror}", path=path) from error
    return size, hashed.intdigest()


def chunks_of(path: str) -> Iterator[bytes]:
    """The content of a file. Raises OSError."""
    with files.opened(path) as descriptor:
        size = files.size_of(descriptor)
        for start in range(0, size, CHUNK_BYTES):
            yield files.read_range(descriptor, start, min(size, start + CHUNK_BYTES))


def size_and_checksum(path: str) -> tuple[int, int]:
    """Of a whole file. Raises OSError."""
    hashed, size = xxhash.xxh3_64(), 0
    for chunk in chunks_of(path):
        hashed.update(chunk)
        size += len(chunk)
    return size, hashed.intdigest()


def sync_folders(root: str) -> None:
    """Make every name below a folder, and the folder's own, durable."""
    for folder, _, _ in os.walk(root):
        files.sync_folder(folder)
    files.sync_parents(root)


def find_damage(root: str, manifest: BackupManifest, progress: Progress) -> list[tuple[str, str]]:
    """Read everything; (name, what is wrong) of each file that is not as the manifest says."""
    damaged = []
    done = 0
    everything = [(os.path.join(root, CATALOG_FILE), manifest.catalog)]
    everything += [(object_path(root, item.name), item) for item in manifest.objects]
    for path, item in everything:
        try:
            size, checksum = size_and_checksum(path)
        except FileNotFoundError:
            damaged.append((item.name, "is missing"))
        except OSError as error:
            damaged.append((item.name, f"cannot be read: {error.strerror}"))
        else:
            if size != item.size:
                damaged.append((item.name, f"has {size} bytes instead of {item.size}"))
            elif checksum != item.checksum:
                damaged.append((item.name, "fails its checksum"))
        done += item.size
        progress(item.name, done, manifest.size_bytes)
    return damaged
