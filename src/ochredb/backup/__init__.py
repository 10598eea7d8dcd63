"""Backups of a store that goes on working, and stores made from them.

    from ochredb.backup import backup, check, restore

    backup("./data", "./monday")                    # or "http://127.0.0.1:8000"
    check("./monday")                               # read everything, compare checksums
    restore("./monday", "./data-of-monday")         # a new store, with an id of its own

A backup is the state at one moment: every write that was acknowledged before it began is in it, and
each request is in it as a whole or not at all. How: `source` keeps the state, `take` copies it and
checks what it copies, `archive` is what lies on disk, `restore` makes a store of it.
"""

from ochredb.backup.archive import BackedUpCollection, BackupManifest, Damage, Progress, StoredFile
from ochredb.backup.restore import check, restore
from ochredb.backup.take import backup

__all__ = [
    "BackedUpCollection",
    "BackupManifest",
    "Damage",
    "Progress",
    "StoredFile",
    "backup",
    "check",
    "restore",
]
