"""What processes do when they are killed at a crash point, and which points each of them reaches.

A scenario prepares a tree of stores in one process and acts on a copy of it in another, so that a
step is reached at the same hit in each run (`acts`). `points` lists what it reaches, exactly (a
test compares), each at least twice. To cover a new point, extend the scenario of its role, or add
one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .acts import (
    DAY_S,
    catalog,
    clock_set_back,
    collect,
    compact,
    compact_and_lose,
    create,
    mend,
    merge,
    migrate,
    names,
    prepare_backup,
    prepare_catalog,
    prepare_clock_set_back,
    prepare_collect,
    prepare_compact,
    prepare_mend,
    prepare_merge,
    prepare_migrate,
    prepare_names,
    prepare_quarantine,
    prepare_restore,
    prepare_vacuum,
    prepare_write,
    quarantine,
    reserve,
    restore_backup,
    take_backup,
    vacuum,
    write,
)
from .repairs import prepare_repair, prepare_repair_catalog, repair
from .stage import Stage, ids, records, request

# Steps that come together.
OBJECT = (
    "object.opened", "object.written", "object.synced", "object.linked",
    "object.temporary-removed", "object.name-synced", "object.folders-synced",
)  # fmt: skip
DELETE = ("object.deleting", "object.deleted", "object.folder-removed")
PROBE = (
    "directory.created", "directory.probe-synced", "directory.probe-published",
    "directory.probe-removed",
)  # fmt: skip
MARK = ("directory.marker-created", "directory.marker-synced", "directory.marked")
MIGRATE = (
    "catalog.locked", "catalog.created", "migration.committing", "migration.committed",
    "catalog.synced",
)  # fmt: skip
CLOSE = ("checkpoint.copied", "checkpoint.done")
SEAL_ANEW = ("seal.synced", "seal.renamed", "seal.written")
SEAL_COPIED = ("seal.begun", "seal.settled")
SEAL_KEPT = ("seal.opened", "seal.closed")
SEAL_GONE = ("seal.removed", "seal.broken")
SEAL = (*SEAL_ANEW, *SEAL_COPIED, *SEAL_KEPT, *SEAL_GONE)
FLUSH = ("flush.acknowledging", "flush.acknowledged")
PART = ("part.object-created", "part.written")


def commits(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{moment}" for name in names for moment in ("committing", "committed"))


SERVER_REQUESTS = (
    request("create-collection", "alpha"),
    request("add", "alpha", records(0, 3), key="key-1"),  # Parsed on the event loop, submitted.
    request("upsert", "alpha", records(0, 500, 1), key="key-2"),  # In the pool of writers.
    request("delete", "alpha", ids([0]), key="key-3"),
    request("delete", "alpha", {"where": {"number": {"$lt": 9}}}, key="key-4"),
)
# What a server reaches while it answers them, one after the other, and at which hits. (That the
# client looks the collection up by its name is one more answer before each but the first.)
SERVER_POINTS = {
    "answer.sending": (1, 3, 5, 7, 9),
    "answer.sent": (1, 3, 5, 7, 9),
    "flush.acknowledging": (1, 2),
    "flush.acknowledged": (1, 2),
}


# Reached on other components than a directory; the test that kills a process there.
ELSEWHERE = {
    "s3.creating": "tests/distributed/test_s3_store.py",
    "s3.created": "tests/distributed/test_s3_store.py",
    "s3.resolving": "tests/distributed/test_s3_store.py",
    "cache.written": "tests/unit/test_local_copies.py",
    "cache.renamed": "tests/unit/test_local_copies.py",
    "cache.removed": "tests/unit/test_local_copies.py",
}


def nothing(_stage: Stage) -> None:
    """It begins with an empty tree."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """run: in the process that is killed. prepare: once, in another.

    points: what `run` reaches and is killed at, each at least twice. also: what it reaches besides,
        and another scenario of the same role is killed at. (Those of opening and closing a store
        need not be listed.)
    later_s: how much later the next process looks, for runs that move their clock.
    """

    run: Callable[[Stage], None]
    prepare: Callable[[Stage], None] = nothing
    points: tuple[str, ...]
    also: tuple[str, ...] = ()
    later_s: float = 0.0


LEASE = commits("lease-acquire", "lease-end")
FILE = ("file.written", "file.synced")
KEPT = ("evidence.written", "evidence.synced", "evidence.named", "evidence.kept")
PUT_BACK = (*OBJECT[:3], "object.replaced", *OBJECT[-2:])
CHECK = (
    "backup.catalog-copied", "backup.copy-removed",
    *commits("pin-take", "pin-renew", "pin-release"),
)  # fmt: skip
MENDED_CATALOG = (
    "mended-catalog.synced", "mended-catalog.renamed", "mended-catalog.durable",
)  # fmt: skip

SCENARIOS: dict[str, Scenario] = {
    "create": Scenario(
        run=create,
        points=(
            *PROBE, *MARK, *MIGRATE, *OBJECT, *CLOSE, *SEAL_ANEW, "store-id.created",
            *commits("defaults-create"),
        ),
    ),
    "migrate": Scenario(
        prepare=prepare_migrate,
        run=migrate,
        points=(*MIGRATE, *SEAL_GONE),
        also=MARK,
    ),
    "catalog": Scenario(
        prepare=prepare_catalog,
        run=catalog,
        points=(
            *CLOSE, *SEAL_COPIED, "directory.old-probe-removed", *commits("free-pages"),
        ),
    ),
    "write": Scenario(
        prepare=prepare_write,
        run=write,
        points=(
            *FLUSH, *OBJECT[:-1], "flush.object-created",
            *commits("append", "record-nothing", "append-evaluated"),
        ),
        also=("object.folders-synced",),
    ),
    "names": Scenario(
        prepare=prepare_names,
        run=names,
        points=(
            "mark.forgotten",
            *commits(
                "tenant-create", "tenant-update", "database-create", "database-drop",
                "collection-create", "collection-update", "collection-drop", "reset",
            ),
        ),
    ),
    "compact": Scenario(
        prepare=prepare_compact,
        run=compact,
        points=(*LEASE, *OBJECT, *PART, "deleted-rows.created", *commits("version")),
    ),
    "lose": Scenario(
        prepare=prepare_compact,
        run=compact_and_lose,
        points=(*LEASE, *DELETE, "discard.done", *commits("version", "lease-renew")),
        also=(*OBJECT, *PART),
    ),
    "merge": Scenario(
        prepare=prepare_merge,
        run=merge,
        points=(*LEASE, *OBJECT, *PART, *commits("version")),
    ),
    "quarantine": Scenario(
        prepare=prepare_quarantine,
        run=quarantine,
        points=("quarantine.object-created", *commits("version", "quarantine-drop")),
        also=(*LEASE, *OBJECT, *PART),
    ),
    "collect": Scenario(
        prepare=prepare_collect,
        run=collect,
        points=(
            *DELETE, "temporary.removing", "temporary.removed", "gc.deleted",
            "sweep.deleted",
            *commits(
                "pin-expire", "expire-keys", "release-replaced", "gc-mark", "gc-forget",
                "sweep-condemn", "sweep-forget",
            ),
        ),
        also=("reserve.taken",),
        later_s=30 * DAY_S,
    ),
    "vacuum": Scenario(
        prepare=prepare_vacuum,
        run=vacuum,
        points=("catalog.log-cut", "catalog.rewritten", *commits("keys-forget", "jobs-tidy")),
        also=(
            *LEASE, *OBJECT, *PART, *DELETE, "gc.deleted",
            *commits("version", "release-replaced", "gc-mark", "gc-forget", "sweep-forget"),
        ),
        later_s=DAY_S,
    ),
    "clock": Scenario(
        prepare=prepare_clock_set_back,
        run=clock_set_back,
        points=commits("gc-stamp-anew", "gc-mark"),
        also=(*DELETE, "gc.deleted", "mark.forgotten", *commits("gc-forget", "collection-drop")),
    ),
    "reserve": Scenario(
        prepare=prepare_write,
        run=reserve,
        points=("reserve.taken", "reserve.given-up"),
    ),
    "mend": Scenario(
        prepare=prepare_mend,
        run=mend,
        points=(*SEAL_KEPT, *commits("replace-fragment")),
    ),
    "repair": Scenario(
        prepare=prepare_repair,
        run=repair,
        points=(
            *KEPT, *OBJECT, *PART, *LEASE, "object.replaced",
            *commits("version", "replace-fragment"),
        ),
        also=CHECK,
    ),
    "repair-catalog": Scenario(
        prepare=prepare_repair_catalog,
        run=repair,
        points=(*KEPT, *MENDED_CATALOG, "object.replaced"),
        also=(*PUT_BACK, *CHECK),
    ),
    "backup": Scenario(
        prepare=prepare_backup,
        run=take_backup,
        points=(
            *FILE, "backup.claimed", "backup.catalog-copied", "backup.catalog-written",
            "backup.pruned", "backup.object-written", "backup.copy-removed",
            "backup.folders-synced", "backup.manifest-written", "backup.done",
            *commits("pin-take", "pin-renew", "pin-release", "backup-prune"),
        ),
    ),
    "restore": Scenario(
        prepare=prepare_restore,
        run=restore_backup,
        points=(
            *MARK, *FILE, *CLOSE, "restore.claimed", "restore.object-written",
            "restore.store-id-written", "restore.catalog-written", "restore.adopted",
            "restore.folders-synced", "restore.renamed", "restore.name-synced",
            *commits("restore-adopt"),
        ),
        also=("reserve.taken",),
    ),
}  # fmt: skip
