"""Making a store of a backup. It gets an id of its own: it is another store from then on.

The catalog's final name comes last, so a restore that was interrupted leaves a directory that no
process takes for a store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from urllib.parse import quote

import orjson

from ochredb.backup.archive import (
    CATALOG_FILE,
    BackupManifest,
    Damage,
    Progress,
    StoredFile,
    chunks_of,
    claim_folder,
    find_damage,
    object_path,
    read_manifest,
    silent,
    sync_folders,
    write_synced,
)
from ochredb.catalog.copies import adopt, check_copy
from ochredb.catalog.migrate import CATALOG_NAME
from ochredb.clock import SystemClock
from ochredb.crash_points import reach
from ochredb.errors import Corrupt, Unavailable
from ochredb.ids import IdSource
from ochredb.storage import files
from ochredb.storage.open_directory import check_directory

_UNFINISHED = CATALOG_NAME + ".restoring"


def check(path: str, *, keep_going: bool = False, progress: Progress = silent) -> BackupManifest:
    """Read a whole backup and compare it with its manifest, which is returned.

    keep_going: accept what was damaged at the source already.

    Raises InvalidArgument for what is no complete backup, Damage naming everything wrong.
    """
    root = os.path.realpath(path)
    manifest = read_manifest(root)
    damaged = find_damage(root, manifest, progress)
    if not keep_going:
        damaged += manifest.damaged
    if damaged:
        raise Damage(f"the backup {path} is damaged", damaged)
    store_id = check_copy(os.path.join(root, CATALOG_FILE))
    if store_id != manifest.store_id:
        raise Corrupt(f"the catalog of {path} names another store than its manifest")
    return manifest


def restore(
    path: str, target: str, *, keep_going: bool = False, progress: Progress = silent
) -> tuple[BackupManifest, str]:
    """Make a store from a backup in a new or empty directory; returns its new store id.

    The whole backup is checked first; then it is copied, opened and counted.
    keep_going: restore what was damaged at the source too; what needs it will fail when it is read.

    Raises what `check` raises, InvalidArgument for a target that is not empty, Unavailable if it
    cannot be written, Corrupt if the new store does not have what the backup had.
    """
    source = os.path.realpath(path)
    root = claim_folder(target, "a restored store")
    reach("restore.claimed")
    manifest = check(path, keep_going=keep_going, progress=progress)
    store_id = IdSource(SystemClock()).uuid7()
    folder = os.path.join(root, "objects")
    os.makedirs(folder, exist_ok=True)
    done = 0
    for item in manifest.objects:
        final = os.path.join(folder, *item.name.split("/"))
        _copy(object_path(source, item.name), final, item)
        reach("restore.object-written")
        done += item.size
        progress(item.name, done, manifest.size_bytes)
    write_synced(os.path.join(folder, "store_id"), [store_id.encode()])
    reach("restore.store-id-written")
    unfinished = os.path.join(root, _UNFINISHED)
    _copy(os.path.join(source, CATALOG_FILE), unfinished, manifest.catalog)
    reach("restore.catalog-written")
    adopt(unfinished, store_id)
    reach("restore.adopted")
    sync_folders(root)
    reach("restore.folders-synced")
    try:
        os.rename(unfinished, os.path.join(root, CATALOG_NAME))
        reach("restore.renamed")
        files.sync_folder(root)
        reach("restore.name-synced")
    except OSError as error:
        raise Unavailable(f"cannot write {root}: {error.strerror}") from error
    check_directory(root)  # Marks it as ours, and refuses what no store can live on.
    _compare(root, manifest)
    return manifest, store_id


def _copy(source: str, target: str, item: StoredFile) -> None:
    """Copy a file, which is checked a second time: it is these bytes that the store will have."""

    def chunks() -> Iterator[bytes]:
        try:
            yield from chunks_of(source)
        except OSError as error:
            raise Unavailable(f"cannot read {source}: {error.strerror}") from error

    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
    except OSError as error:
        raise Unavailable(f"cannot write {target}: {error.strerror}") from error
    if write_synced(target, chunks()) != (item.size, item.checksum):
        raise Damage("the backup changed while it was read", [(item.name, "fails its checksum")])


def _compare(root: str, manifest: BackupManifest) -> None:
    """Open the new store as any program does, and count."""
    from ochredb.embedded import open_transport

    transport = open_transport(root)
    try:
        wrong = []
        for item in manifest.collections:
            if item.records is None:
                continue
            path = (
                f"/api/v2/tenants/{quote(item.tenant, safe='')}"
                f"/databases/{quote(item.database, safe='')}/collections/{item.id}/count"
            )
            answer = transport.send("GET", path)
            if answer.status != 200 and manifest.damaged:
                continue  # It was accepted that something cannot be read.
            if answer.status != 200 or orjson.loads(answer.body) != item.records:
                found = answer.body.decode(errors="replace")
                wrong.append((item.name, f"has {found} records instead of {item.records}"))
    finally:
        transport.close()
    if wrong:
        raise Damage(f"the restored store {root} is not as the backup", wrong)
