"""Named points before and after every durable step, at which a test can kill the process.

    reach("object.linked")                          in the engine
    OCHREDB_CRASH_POINT=object.linked ochredb run   ends itself by SIGKILL there
    OCHREDB_CRASH_POINT=object.linked:3             … when it gets there for the third time

Off, which is always but in tests, a point costs one comparison with None (40 ns with its call).
Nothing but the environment that the process was started with can arm one: no setting, no file, no
request. A process that is armed says so at its start, and again with its last breath; a name that
is not in the tables below keeps it from starting. Killing itself is nothing that whoever sets a
process's environment could not do anyway, and losing nothing by it is what the points are to prove.

`tests/crash/test_crash_points.py` kills a process at every point of both tables, by kill -9 and by
power loss, and checks I1 to I8 afterwards (docs/decisions/0020-crash-points.md; how to add a point
is in CONTRIBUTING.md).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping

VARIABLE = "OCHREDB_CRASH_POINT"

log = logging.getLogger("ochredb.crash_points")

# Each SQL transaction of the catalog by the name that it is begun with; of each there are two
# points, `NAME.committing` (everything is written, nothing committed) and `NAME.committed`.
TRANSACTIONS: dict[str, str] = {
    "append": "one flush of the log: offsets, fragments, idempotency keys",
    "append-evaluated": "a delete by filter that was evaluated under the lock",
    "record-nothing": "an idempotency key of a request that found nothing to do",
    "replace-fragment": "damaged bytes of a request are replaced by whole ones",
    "expire-keys": "idempotency keys older than their retention are forgotten",
    "quarantine-drop": "an operation that could not be folded is forgotten",
    "version": "a compaction or merge takes effect: version swap, references, trimmed log",
    "release-replaced": "replaced versions let go of their references",
    "gc-mark": "objects without references become `deleting`",
    "gc-stamp-anew": "stamps from before the clock was set back are given anew",
    "gc-forget": "rows of deleted objects are removed",
    "sweep-condemn": "orphans get rows in state `swept`",
    "sweep-forget": "old rows in state `swept` are removed",
    "lease-acquire": "a lease is taken, or taken over",
    "lease-renew": "a lease is extended",
    "lease-end": "a lease is given back",
    "pin-take": "everything that the catalog refers to is pinned",
    "pin-renew": "a pin is extended",
    "pin-release": "a pin is ended by its holder",
    "pin-expire": "pins of dead holders are ended",
    "defaults-create": "a new store gets its tenant and database",
    "tenant-create": "a tenant is there",
    "tenant-update": "it has another resource name",
    "database-create": "a database is there",
    "database-drop": "a database and its collections release their references",
    "collection-create": "a collection is there, with an empty log",
    "collection-update": "it has another name, metadata or configuration",
    "collection-drop": "a collection releases its references",
    "reset": "every collection releases its references",
    "keys-forget": "a purge forgets metadata keys that no record has any more",
    "jobs-tidy": "a vacuum forgets the errors of jobs, and jobs of dropped collections",
    "free-pages": "free pages of the catalog's file go back to the file system",
    "backup-prune": "a backup's copy of the catalog loses what is not of its state",
    "restore-adopt": "a copy becomes the catalog of another store",
}

# What is true on the disk at each other point.
POINTS: dict[str, str] = {
    "catalog.log-cut": "the catalog's write-ahead log is copied back, and its file cut to nothing",
    "catalog.rewritten": "a purge has written the catalog anew, into its log",
    "directory.created": "the store's folder exists",
    "directory.probe-synced": "a probe file lies in it",
    "directory.probe-published": "under two names",
    "directory.probe-removed": "under none",
    "directory.old-probe-removed": "one that a dead start left is gone",
    "directory.marker-created": "the marker exists, empty",
    "directory.marker-synced": "with content, its name not yet durable",
    "directory.marked": "durable, and so are the folders above",
    "catalog.locked": "this process alone may create or migrate the catalog",
    "catalog.created": "the catalog's file exists, in WAL mode, without tables",
    "migration.committing": "its tables are made or changed, and not committed",
    "migration.committed": "and are, as a whole",
    "catalog.synced": "the catalog's name is durable",
    "store-id.created": "the objects belong to this store",
    "object.opened": "a temporary file exists, empty",
    "object.written": "with its content, unsynced",
    "object.synced": "synced, without its final name",
    "object.linked": "it has its final name too, which is not durable",
    "object.temporary-removed": "it has its final name only",
    "object.name-synced": "which is durable, if those of its folders are",
    "object.folders-synced": "as they are",
    "object.replaced": "a damaged object has its bytes again, its name not durable",
    "object.deleting": "the object is there",
    "object.deleted": "it is gone, its folder is not",
    "object.folder-removed": "its folder is gone",
    "s3.creating": "an object is about to be sent; of a repeated attempt it may be there",
    "s3.created": "it is there, durably, and nobody has been told",
    "s3.resolving": "whether it is there is not known",
    "cache.written": "a copy of an object is on the local disk, without its name",
    "cache.renamed": "with its name",
    "cache.removed": "a copy is gone",
    "temporary.removing": "what a dead writer left is there",
    "temporary.removed": "and gone",
    "flush.object-created": "a flush's object exists, nothing refers to it",
    "flush.acknowledging": "a flush is committed, nobody has been told",
    "flush.acknowledged": "its writers have been told",
    "answer.sending": "a server is about to answer a request that had to wait, as all writes do",
    "answer.sent": "it has handed the answer to the operating system",
    "part.object-created": "some objects of a part exist, nothing refers to them",
    "part.written": "all of them do",
    "deleted-rows.created": "a bitmap of deleted rows exists as an object, unreferenced",
    "quarantine.object-created": "likewise the bytes of an operation that cannot be folded",
    "discard.done": "who lost the race for a version, or failed, has deleted what it wrote",
    "reserve.taken": "the file that keeps space back for deletes is there",
    "reserve.given-up": "it is not",
    "gc.deleted": "some marked objects are gone, their rows are not",
    "sweep.deleted": "an orphan is gone, its row says `swept`",
    "checkpoint.copied": "commits that no reader needs in the write-ahead log are in the database",
    "checkpoint.done": "and the log starts again or is cut off, if it was time for that",
    "mark.forgotten": "no write is marked as the last: what is dropped next will not be missed",
    "seal.opened": "the catalog is about to be written to, its seal says that it is open",
    "seal.removed": "the seal says nothing of the catalog's file, and is gone, not durably",
    "seal.broken": "durably",
    "seal.synced": "a new seal is written, without its name",
    "seal.renamed": "with its name, which is not durable",
    "seal.written": "which is",
    "seal.begun": "the seal says that a checkpoint has begun",
    "seal.settled": "and what the checkpoint has copied, not durably",
    "seal.closed": "the seal says that the catalog is closed",
    "evidence.written": "what a repair keeps or says lies in a file, unsynced, without its name",
    "evidence.synced": "synced",
    "evidence.named": "with its name in `damaged`, as a damaged file has; it is not durable",
    "evidence.kept": "it is",
    "mended-catalog.synced": "the catalog as it was sealed lies in the folder of its repair",
    "mended-catalog.renamed": "with its name, which is not durable",
    "mended-catalog.durable": "which is",
    "file.written": "a file of a backup or of a restored store is written, not synced",
    "file.synced": "synced, its name not durable",
    "backup.claimed": "the target is an empty folder",
    "backup.catalog-copied": "the source is pinned, a copy of its catalog lies in `objects/tmp`",
    "backup.catalog-written": "the copy is in the backup",
    "backup.pruned": "and has nothing but what the backup is of",
    "backup.object-written": "an object is in the backup",
    "backup.copy-removed": "the source is unpinned, its copy is gone",
    "backup.folders-synced": "everything but the manifest is durable",
    "backup.manifest-written": "the manifest is there, its name not durable",
    "backup.done": "the backup is complete",
    "restore.claimed": "the target is an empty folder",
    "restore.object-written": "an object is there",
    "restore.store-id-written": "all of them, and the new store's id",
    "restore.catalog-written": "the catalog is there under another name",
    "restore.adopted": "it belongs to the new store",
    "restore.folders-synced": "everything is durable, nothing takes it for a store",
    "restore.renamed": "the catalog has its name, which is not durable",
    "restore.name-synced": "the store is complete",
}

COMMITTING, COMMITTED = ".committing", ".committed"

Observer = Callable[[str], None]


def every_point() -> tuple[str, ...]:
    """All names that `reach` may be called with."""
    commits = (name + moment for name in TRANSACTIONS for moment in (COMMITTING, COMMITTED))
    return (*POINTS, *commits)


def reach(point: str) -> None:
    """The process is at this point; it ends here if it was started to. From any thread."""
    if _observer is not None:
        _observer(point)


def observe(observer: Observer | None) -> None:
    """Have `observer` called at every point instead; for tests, within their own process."""
    global _observer
    _observer = observer


class _Kill:
    """Ends the process at the given hit of one point: nothing runs after it, no cleanup."""

    def __init__(self, point: str, hit: int) -> None:
        self._point, self._left = point, hit
        self._lock = threading.Lock()

    def __call__(self, point: str) -> None:
        if point != self._point:
            return
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.write(2, f"killed at the crash point {point} ({VARIABLE})\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)


def armed(environ: Mapping[str, str]) -> Observer | None:
    """What the environment asks for: None unless it has the variable. Raises ValueError."""
    text = environ.get(VARIABLE, "")
    if not text:
        return None
    point, _, hit = text.partition(":")
    if point not in every_point():
        raise ValueError(f"{VARIABLE}={text}: no such crash point; unset it in production")
    if hit and not (hit.isascii() and hit.isdigit() and int(hit) > 0):
        raise ValueError(f"{VARIABLE}={text}: the hit must be a number from 1")
    log.warning("%s=%s: this process will kill itself there", VARIABLE, text)
    return _Kill(point, int(hit or 1))


# Once, as the process was started: what changes its environment later arms nothing.
_observer: Observer | None = armed(os.environ)
