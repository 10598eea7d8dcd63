"""Making a store of a backup where several processes share it: in PostgreSQL and a bucket.

The catalog's rows come last, in one transaction, so a restore that was interrupted leaves a store
without collections and objects that belong to nothing. No process of the store may run meanwhile:
its sweep would take the objects for orphans.
"""

from __future__ import annotations

import mmap
import os

from ochredb.backup.archive import (
    CATALOG_FILE,
    BackupManifest,
    Progress,
    object_path,
    silent,
)
from ochredb.backup.restore import check
from ochredb.catalog.database import Database
from ochredb.catalog.postgres_copy import fill
from ochredb.errors import InvalidArgument, Unavailable
from ochredb.storage import files
from ochredb.storage.base import ObjectStore


def restore_shared(
    path: str,
    database: Database,
    store: ObjectStore,
    store_id: str,
    *,
    keep_going: bool = False,
    progress: Progress = silent,
) -> BackupManifest:
    """Put a backup into a new catalog and an empty object store, which becomes that catalog's.

    The whole backup is checked first. keep_going: see `restore`.

    Raises what `check` raises, InvalidArgument for a catalog or a store that holds something
    already, Unavailable if one of them cannot be written.
    """
    source = os.path.realpath(path)
    manifest = check(path, keep_going=keep_going, progress=progress)
    found = next(iter(store.list("")), None)
    if found is not None:
        raise InvalidArgument(f"the object store is not empty: it has {found.key}")
    done = 0
    for item in manifest.objects:
        _upload(store, item.name, object_path(source, item.name))
        done += item.size
        progress(item.name, done, manifest.size_bytes)
    store.create("store_id", store_id.encode())
    fill(database, os.path.join(source, CATALOG_FILE))
    return manifest


def _upload(store: ObjectStore, key: str, path: str) -> None:
    """From the mapped file, which may be larger than memory."""
    try:
        with files.opened(path) as descriptor:
            if files.size_of(descriptor) == 0:
                store.create(key, b"")
                return
            with (
                mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as view,
            ):
                store.create(key, view)
    except OSError as error:
        raise Unavailable(f"cannot read {path}: {error.strerror}") from error
